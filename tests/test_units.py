import pytest

from pagetier.handler.units import format_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (700 * 2**20, "700 MiB"),
        (1023 * 2**20, "1.0 GiB"),
        (80 * 2**30, "80.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_suits(num_bytes, text):
    assert format_bytes(num_bytes) == text
