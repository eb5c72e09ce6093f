import pytest

from pagetier.handler.units import format_bytes, format_seconds, parse_bytes


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


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("12GiB", 12 * 2**30),
        ("12 gib", 12 * 2**30),
        ("12GB", 12 * 10**9),
        ("8", 8 * 2**30),
        (" 0.5 ", 2**29),
        (".25TiB", 2**38),
        ("500MiB", 500 * 2**20),
        ("3kb", 3000),
        ("7B", 7),
        ("0", 0),
    ],
)
def test_sizes_are_read_as_people_write_them(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "12G", "12GX", "1e3", "1.2.3GB", "12iB", "a lot"]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="write it like 12GiB"):
        parse_bytes(text)


def test_seconds_are_shown_in_the_unit_that_suits():
    assert format_seconds(0.0125) == "12.5 ms"
    assert format_seconds(1.5) == "1.50 s"
