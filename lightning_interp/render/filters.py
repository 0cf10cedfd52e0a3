"""Convolution weights as pictures: a tile for each filter, or a row of its input channels."""

from __future__ import annotations

from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_interp.render.canvas import WHITE, cells, stack
from lightning_interp.render.text import draw_text, text_block, text_width, usable_width, wrap

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
        weights: (F, C, kh, kw) floating, on any device. Filters that are not finite are all mid-grey, and the caption
            counts them.
        name: The layer's name, for the caption.
        kind: ``"image"`` for a first convolution: each filter is a tile, in colour where C is 3 and in grey
            where it is 1. ``"channels"`` for any other: a row for each filter, largest norm first, and a
            column for each input channel; both are numbered.
        max_filters: Maximum number of filters; those of the largest norm are shown.
        title: Drawn above the filters.

    Returns:
        (h, w, 3) uint8 on the CPU, w about 1200 at most.

    Raises:
        ValueError: If ``weights`` is no such tensor, ``kind`` does not suit its channels, or ``max_filters`` is not
            positive.

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
    """Map -peak..peak to 1..255, so that zero is exactly 128 and signs are symmetrical."""
    scaled = filters / peak[:, None, None, None]
    values: Tensor = (ZERO + 127 * scaled).round().clamp(1, 255).to(torch.uint8).cpu()
    return values


def _tiles(pictures: Tensor) -> Tensor:
    """Draw about as many rows as columns, with cells of 50 pixels if there is room, and of 24 at least."""
    count, height, width, _ = pictures.shape
    side = max(height, width)
    smallest = ceil(24 / side)
    columns = max(1, min(ceil(count**0.5), _WIDEST // (smallest * width + GAP)))
    factor = min(56 // side, (_WIDEST // columns - GAP) // width)
    return cells(pictures, columns, GAP, BACKGROUND, max(smallest, factor))


def _channel_columns(height: int, width: int) -> int:
    smallest = ceil(12 / max(height, width))
    return max(1, min(_MOST_CHANNELS, (_WIDEST - _MARGIN) // (smallest * width + GAP)))


def _strongest_channels(filters: Tensor, most: int) -> Tensor:
    norms = torch.linalg.vector_norm(filters, dim=(0, 2, 3))
    strongest: Tensor = norms.sort(descending=True, stable=True).indices[:most].sort().values
    return strongest


def _channel_rows(values: Tensor, filters: list[int], channels: list[int]) -> Tensor:
    """Draw the grid with the filters' numbers to its left and the channels' above, as many as there is room for."""
    rows, columns, height, width = values.shape
    side = max(height, width)
    factor = max(ceil(12 / side), min(ceil(24 / side), ((_WIDEST - _MARGIN) // columns - GAP) // width))
    pictures = values.reshape(rows * columns, height, width, 1).expand(-1, -1, -1, 3)
    grid = cells(pictures, columns, GAP, BACKGROUND, factor)
    line = _LABEL_SIZE + 10
    margin = max(text_width(str(number), _LABEL_SIZE) for number in filters) + 8
    canvas = torch.full((line + grid.shape[0], margin + grid.shape[1], 3), WHITE, dtype=torch.uint8)
    canvas[line:, margin:] = grid
    pixels = canvas.numpy()
    pitch = height * factor + GAP
    for row in range(0, rows, ceil((_LABEL_SIZE + 1) / pitch)):
        baseline = line + row * pitch + (pitch + _LABEL_SIZE) // 2 - 1
        draw_text(pixels, str(filters[row]), margin - 5, baseline, size=_LABEL_SIZE, align="right")
    pitch = width * factor + GAP
    widest = max(text_width(str(number), _LABEL_SIZE) for number in channels) + 8
    for column in range(0, columns, ceil(widest / pitch)):
        middle = margin + column * pitch + pitch / 2
        draw_text(pixels, str(channels[column]), middle, line - 5, size=_LABEL_SIZE, align="center")
    return canvas
