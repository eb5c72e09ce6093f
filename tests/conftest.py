"""Settings of all tests."""

import os

from hypothesis import settings

# The same examples in every run; PAGETIER_RANDOM_TESTS=1 draws new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("random", print_blob=True)
settings.load_profile("random" if os.environ.get("PAGETIER_RANDOM_TESTS") else "fixed")
