"""Numbers as people read and write them."""

import re

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(num_bytes: float) -> str:
    """``num_bytes`` with three digits or so, in the binary unit that suits it."""
    step = 0
    while num_bytes >= 1000 and step < len(_UNITS) - 1:
        num_bytes /= 1024
        step += 1
    if step == 0 or num_bytes >= 100:
        return f"{num_bytes:.0f} {_UNITS[step]}"
    return f"{num_bytes:.1f} {_UNITS[step]}"


def format_seconds(seconds: float) -> str:
    """``seconds`` with three digits or so, in s or ms."""
    return f"{seconds:.2f} s" if seconds >= 1.0 else f"{1e3 * seconds:.1f} ms"


def parse_bytes(text: str) -> int:
    """Bytes from ``12GiB``, ``12 GB``, ``500MiB``; a number alone is GiB.

    Raises:
        ValueError: it is none of these; says what would be.
    """
    found = re.fullmatch(r"(\d{1,18}(?:\.\d*)?|\.\d+)\s*(b|[kmgt]i?b)?", text.strip().lower())
    if found is None:
        raise ValueError(f"'{text}' is no size; write it like 12GiB, 12GB or 500MiB.")
    number, unit = found.groups(default="gib")
    return int(float(number) * (1024 if "i" in unit else 1000) ** "bkmgt".index(unit[0]))
