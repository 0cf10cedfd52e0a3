"""Layouts of activations other than (N, C, h, w): tokens and channels-last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

__all__ = ["Layout", "layout_of", "on_grid", "to_grid"]

Layout = Literal["channels_first", "channels_last"] | int | None

_MAX_PREFIX_TOKENS = 16  # class, distillation and register tokens


def to_grid(activations: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Return activations as (N, C, h, w), where they are spatial.

    Args:
        activations: (N, C, h, w), (N, h, w, C), or tokens (N, T, C): first those without a position (class,
            distillation, registers), then the others in row-major order.
        image_size: (H, W) of the images, whose aspect ratio the grid has; where it fits both dimensions 1 and 2 and
            dimensions 2 and 3, the latter are the grid.

    Returns:
        A view (N, C, h, w); ``activations`` themselves where they have none of these layouts.

    Example:
        >>> import torch
        >>> [tuple(to_grid(torch.zeros(shape), (224, 224)).shape) for shape in [(2, 197, 8), (2, 7, 7, 96), (2, 96)]]
        [(2, 8, 14, 14), (2, 96, 7, 7), (2, 96)]
    """
    return on_grid(activations, layout_of(activations, image_size), image_size)


def on_grid(activations: Tensor, layout: Layout, image_size: tuple[int, int]) -> Tensor:
    """Return activations of a known layout as (N, C, h, w).

    Example:
        >>> import torch
        >>> on_grid(torch.zeros(2, 197, 8), 1, (224, 224)).shape
        torch.Size([2, 8, 14, 14])
    """
    if layout is None or layout == "channels_first":
        return activations
    if layout == "channels_last":
        return activations.permute(0, 3, 1, 2)
    assert isinstance(layout, int)
    tokens = activations[:, layout:]
    height, width = _grid(tokens.shape[1], image_size)
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def layout_of(activations: Tensor, image_size: tuple[int, int]) -> Layout:
    """Return the layout of activations.

    Args:
        activations: A layer's output.
        image_size: (H, W) of the images.

    Returns:
        ``"channels_first"``, ``"channels_last"``, for tokens the number of those without a position, or None.

    Example:
        >>> import torch
        >>> layout_of(torch.zeros(1, 201, 8), (224, 224))  # a class token and four registers
        5
    """
    shape, (height, width) = activations.shape, image_size
    if activations.ndim == 4:
        is_last = _is_grid(shape[1:3], image_size) and not _is_grid(shape[2:], image_size)
        return "channels_last" if is_last else "channels_first"
    if activations.ndim != 3:
        return None
    candidates = [
        (_leaves_border(patch, image_size), shape[1] - grid)
        for patch in range(1, min(height, width) + 1)
        if 0 <= shape[1] - (grid := (height // patch) * (width // patch)) <= min(_MAX_PREFIX_TOKENS, grid - 1)
    ]
    return min(candidates)[1] if candidates else None


def _is_grid(shape: Sequence[int], image_size: tuple[int, int]) -> bool:
    """Whether a shape is smaller than the image and of the same aspect ratio, up to one row or column."""
    (rows, columns), (height, width) = shape, image_size
    return rows < height and columns < width and abs(rows * width - columns * height) <= max(height, width)


def _leaves_border(patch: int, image_size: tuple[int, int]) -> bool:
    """Whether patches of this side do not cover the whole image, which few models allow."""
    return any(side % patch for side in image_size)


def _grid(tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return (h, w) of the grid with this number of tokens."""
    height, width = image_size
    patches = range(min(height, width), 0, -1)
    for patch in sorted(patches, key=lambda patch: _leaves_border(patch, image_size)):
        if (height // patch) * (width // patch) == tokens:
            return height // patch, width // patch
    raise ValueError(f"{tokens} tokens do not fit images of {height} x {width}")
