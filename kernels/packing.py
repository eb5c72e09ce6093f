"""The one layout of quantised weights: whole numbers of 4 or 8 bits in words of 32, row by row.

Owns the layout, and packing and unpacking in plain torch. Knows nothing of where numbers come from,
nor of the products that read them (``quantised_projection``).

A weight of ``(out, in)`` is ``(number - zero) * scale``. Numbers are unsigned; each group of
``group_size`` neighbouring columns of a row has a scale and a zero, both ``(groups, out)``, so that
what a tile of rows needs of one group lies side by side.

A row is cut into lines of 32 words, 128 bytes: 256 columns of 4 bits, or 128 of 8. Of a line's
columns the first 32 lie in the lowest bits of its words, the next 32 in the bits above, and so on:
word ``w`` holds the columns ``w``, ``32 + w``, ``64 + w`` ... of its line. So a kernel reads whole
words, and one shift gives it 32 neighbouring columns, which have one scale. The last line is filled
up with zeros.
"""

import torch

WORDS = 32
"""Words of a line, and columns that one shift gives."""


def columns_per_line(bits: int) -> int:
    """Columns of a weight that a line holds."""
    return WORDS * (32 // bits)


def num_lines(in_size: int, bits: int) -> int:
    """Lines of a row of ``in_size`` columns."""
    return -(-in_size // columns_per_line(bits))


def pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack ``numbers``, ``(out, in)`` of any integer type, into words ``(out, lines * 32)``, int32.

    Args:
        numbers: each below ``2 ** bits``.
        bits: 4 or 8.
    """
    out_size, in_size = numbers.shape
    lines, fields = num_lines(in_size, bits), 32 // bits
    padded = torch.zeros(out_size, lines * fields * WORDS, dtype=torch.uint8, device=numbers.device)
    padded[:, :in_size] = numbers
    by_field = padded.view(out_size, lines, fields, WORDS)
    words = torch.zeros(out_size, lines, WORDS, dtype=torch.int32, device=numbers.device)
    for field in range(fields):
        words |= by_field[:, :, field].int() << (field * bits)
    return words.view(out_size, lines * WORDS)


def unpack(packed: torch.Tensor, bits: int, in_size: int) -> torch.Tensor:
    """The numbers ``(out, in)``, uint8, of what ``pack`` gave."""
    out_size, fields = packed.shape[0], 32 // bits
    words = packed.view(out_size, -1, WORDS)
    numbers = torch.empty(
        out_size, words.shape[1], fields, WORDS, dtype=torch.uint8, device=packed.device
    )
    for field in range(fields):
        numbers[:, :, field] = (words >> (field * bits)) & (2**bits - 1)
    return numbers.view(out_size, -1)[:, :in_size]
