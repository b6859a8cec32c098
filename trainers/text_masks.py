"""How a family tells a transformer that wants a mask over its text rows that every row counts.

Such a mask changes nothing, but attention with a mask is slower (no flash attention), and which rows it names cannot be
asked without waiting for the device. So it is one stored True, repeated: that is seen without reading it.

Shape suffixes: B batch, L text rows, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .family import TextRecord


def rows_that_count(lengths: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """(B, L) bool, True on each caption's own rows; None when all captions are equally long: every row counts."""
    if len(set(lengths)) == 1:
        return None
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def padded(records: Sequence[TextRecord], lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(B, L, D): the first rows of each record, as many as its length says, and zeros up to the longest."""
    embeds_BLD = torch.zeros(len(records), max(lengths), records[0].embeds_LD.shape[1], device=device, dtype=dtype)
    for row, record, length in zip(embeds_BLD, records, lengths, strict=True):
        row[:length] = record.embeds_LD[:length].to(device, dtype)
    return embeds_BLD


def every_row(embeds_BLD: torch.Tensor) -> torch.Tensor:
    """(B, L) bool, True everywhere, for transformers that take no None."""
    return torch.ones(1, dtype=torch.bool, device=embeds_BLD.device).as_strided(embeds_BLD.shape[:2], (0, 0))


def says_nothing(mask_BL: torch.Tensor) -> bool:
    """Whether a mask is one of `every_row`."""
    return mask_BL.stride(1) == 0
