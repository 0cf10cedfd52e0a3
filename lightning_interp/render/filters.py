"""Convolution weights as pictures: each filter a tile, or a row of its input channels."""

from __future__ import annotations

from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_interp.render.canvas import WHITE, cells, stack, text_block, text_width, usable_width, wrap

__all__ = ["FilterKind", "filter_grid"]

FilterKind = Literal["image", "channels"]
ZERO = 128
GAP = 1
BACKGROUND = 40
_WIDEST = 1200
_NARROWEST = 360
_TITLE_SIZE = 15
_LABEL_SIZE = 10
_MOST_CHANNELS = 64
_MARGIN = 40  # for the numbers beside the rows


def filter_grid(
    weights: Tensor,
    *,
    name: str = "",
    kind: FilterKind = "image",
    max_filters: int = 64,
    title: str | None = None,
) -> Tensor:
    """Draw a convolution's filters, each scaled by its largest absolute weight, zero as mid-grey.

    Args:
        weights: (F, C, kh, kw) floating, on any device. A filter that isn't finite is all mid-grey, and the
            caption counts it.
        name: The layer's name, for the caption.
        kind: ``"image"`` for a first convolution: each filter is a tile, in colour where C is 3 and in grey
            where it is 1. ``"channels"`` for any other: a row for each filter, largest norm first, and a
            column for each input channel; both are numbered.
        max_filters: How many are shown; those of the largest norm.
        title: Stands above the filters.

    Returns:
        (h, w, 3) uint8 on the CPU, w about 1200 at most.

    Raises:
        ValueError: If ``weights`` are no such filters, ``kind`` doesn't suit their channels, or
            ``max_filters`` is not positive.

    Example:
        >>> import torch
        >>> filter_grid(torch.randn(64, 3, 7, 7), name="conv1").shape
        torch.Size([497, 457, 3])
    """
    if weights.ndim != 4 or weights.numel() == 0 or not weights.is_floating_point():
        raise ValueError(
            "weights must be floating (F, C, kh, kw) with no side 0, as Conv2d keeps them, got "
            f"{weights.dtype} {tuple(weights.shape)}"
        )
    if kind not in get_args(FilterKind):
        raise ValueError(f"kind must be 'image' or 'channels', got {kind!r}")
    if max_filters < 1:
        raise ValueError(f"max_filters must be at least 1, got {max_filters}")
    count, channels, height, width = weights.shape
    if kind == "image" and channels not in (1, 3):
        raise ValueError(f"filters of {channels} input channels are no images (1 or 3 expected); use kind='channels'")
    weights = weights.detach().float()
    low, high = weights.flatten(1).aminmax(dim=1)
    peak = torch.maximum(-low, high)
    bad = ~peak.isfinite()
    norms = torch.linalg.vector_norm(weights, dim=(1, 2, 3)).masked_fill(bad, -1.0)
    order = norms.sort(descending=True, stable=True).indices[:max_filters]
    if kind == "image":
        order = order.sort().values
    peak = torch.where(bad | (peak == 0), torch.inf, peak)[order]  # divided by infinity: all zero
    shown = weights[order].masked_fill(bad[order][:, None, None, None], 0.0)

    counted = f"{len(shown)} of {count} filters"
    if kind == "channels" and channels > 1:
        chosen = _strongest_channels(shown, _channel_columns(height, width))
        shown = shown[:, chosen]
        body = _channel_rows(_grey(shown, peak), order.tolist(), chosen.tolist())
        what = f"{counted} (rows, largest norm first) x {len(chosen)} of {channels} input channels"
        what += f" (columns{'' if len(chosen) == channels else ', those of largest norm'}), {height} x {width}"
    else:
        values = _grey(shown, peak).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
        body = _tiles(values)
        what = f"{counted}{', largest norm first' if kind == 'channels' else ''}, "
        what += f"{channels} x {height} x {width}"
    not_finite = int(bad.sum())
    caption = (
        f"{name + ': ' if name else ''}{what}, each scaled by its largest absolute weight (0 = grey)"
        f"{f'; {not_finite} of {count} not finite' if not_finite else ''}"
    )
    span = max(body.shape[1], _NARROWEST)
    strips = [body, text_block(wrap(caption, usable_width(span), max_rows=5), span)]
    if title:
        rows = wrap(title, usable_width(span), size=_TITLE_SIZE, max_rows=3)
        strips.insert(0, text_block(rows, span, size=_TITLE_SIZE))
    return stack(strips)


def _grey(filters: Tensor, peak: Tensor) -> Tensor:
    """-peak..peak to 1..255, so that zero is exactly 128 and signs are symmetrical."""
    scaled = filters / peak[:, None, None, None]
    values: Tensor = (ZERO + 127 * scaled).round().clamp(1, 255).to(torch.uint8).cpu()
    return values


def _tiles(pictures: Tensor) -> Tensor:
    """About as many rows as columns; a cell is 50 pixels where there is room, and 24 at least."""
    count, height, width, _ = pictures.shape
    side = max(height, width)
    smallest = ceil(24 / side)
    columns = max(1, min(ceil(count**0.5), _WIDEST // (smallest * width + GAP)))
    factor = min(56 // side, (_WIDEST // columns - GAP) // width)
    return cells(_magnified(pictures, max(smallest, factor)), columns, GAP, BACKGROUND)


def _channel_columns(height: int, width: int) -> int:
    smallest = ceil(12 / max(height, width))
    return max(1, min(_MOST_CHANNELS, (_WIDEST - _MARGIN) // (smallest * width + GAP)))


def _strongest_channels(filters: Tensor, most: int) -> Tensor:
    norms = torch.linalg.vector_norm(filters, dim=(0, 2, 3))
    strongest: Tensor = norms.sort(descending=True, stable=True).indices[:most].sort().values
    return strongest


def _channel_rows(values: Tensor, filters: list[int], channels: list[int]) -> Tensor:
    """The grid with the filters' numbers to its left and the channels' above, as many as find room."""
    rows, columns, height, width = values.shape
    side = max(height, width)
    factor = max(ceil(12 / side), min(ceil(24 / side), ((_WIDEST - _MARGIN) // columns - GAP) // width))
    pictures = values.reshape(rows * columns, height, width, 1).expand(-1, -1, -1, 3)
    grid = cells(_magnified(pictures, factor), columns, GAP, BACKGROUND)
    pitch, line = height * factor + GAP, _LABEL_SIZE + 10
    margin = max(text_width(str(number), _LABEL_SIZE) for number in filters) + 8
    left = torch.full((grid.shape[0], margin, 3), WHITE, dtype=torch.uint8)
    for row in range(0, rows, ceil((_LABEL_SIZE + 1) / pitch)):
        label = text_block([str(filters[row])], margin, size=_LABEL_SIZE)[4:-3]
        start = min(max(0, row * pitch + (pitch - label.shape[0]) // 2), left.shape[0])
        part = left[start : start + label.shape[0]]
        part.copy_(torch.minimum(part, label[: part.shape[0]]))
    pitch = width * factor + GAP
    top = torch.full((line, grid.shape[1], 3), WHITE, dtype=torch.uint8)
    widest = max(text_width(str(number), _LABEL_SIZE) for number in channels) + 8
    for column in range(0, columns, ceil(widest / pitch)):
        label = text_block([str(channels[column])], widest, size=_LABEL_SIZE)[:line]
        part = top[:, column * pitch : column * pitch + widest]
        part.copy_(label[:, : part.shape[1]])
    corner = torch.full((line, margin, 3), WHITE, dtype=torch.uint8)
    return torch.cat([torch.cat([corner, top], 1), torch.cat([left, grid], 1)])


def _magnified(pictures: Tensor, factor: int) -> Tensor:
    return pictures.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
