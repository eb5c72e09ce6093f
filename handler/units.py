"""Numbers as people read them. Imports nothing."""

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
