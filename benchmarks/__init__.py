"""Measurements, each a module run as ``python -m benchmarks.NAME``; results go to ``results/``.

``python -m`` puts the current folder in front of ``sys.path``, where transformers would take this
repository's ``kernels/`` for Hugging Face's package of that name. So the folder is taken out here,
before anything else is imported.
"""

import pathlib
import sys

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != _ROOT]
