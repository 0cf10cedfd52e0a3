"""The assembly of pictures: stacked strips, cells in a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["cells", "check_images", "stack"]

WHITE = 255


def check_images(images: Tensor, name: str) -> None:
    """Refuse anything but a stack of uint8 images.

    Args:
        images: Expected to be (N, H, W, 3) uint8, no side zero.
        name: The argument, for the message.

    Raises:
        ValueError: If ``images`` is anything else.

    Example:
        >>> import torch
        >>> check_images(torch.zeros(2, 3, 8, 8), "images")
        Traceback (most recent call last):
        ...
        ValueError: images must be uint8 (N, H, W, 3) with N, H, W > 0, got torch.float32 (2, 3, 8, 8);...
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.numel() == 0:
        raise ValueError(
            f"{name} must be uint8 (N, H, W, 3) with N, H, W > 0, got {images.dtype} {tuple(images.shape)}; "
            "undo the normalisation, scale to 0..255 and move the channels last"
        )


def stack(strips: Sequence[Tensor]) -> Tensor:
    """Put strips below one another, left-aligned on white.

    Args:
        strips: (h, w, 3) uint8, of any sizes.

    Returns:
        (sum of h, largest w, 3) uint8.

    Example:
        >>> import torch
        >>> stack([torch.zeros(2, 5, 3, dtype=torch.uint8), torch.zeros(1, 3, 3, dtype=torch.uint8)]).shape
        torch.Size([3, 5, 3])
    """
    height, width = sum(strip.shape[0] for strip in strips), max(strip.shape[1] for strip in strips)
    canvas = torch.full((height, width, 3), WHITE, dtype=torch.uint8)
    top = 0
    for strip in strips:
        canvas[top : top + strip.shape[0], : strip.shape[1]] = strip
        top += strip.shape[0]
    return canvas


def cells(pictures: Tensor, columns: int, gap: int, background: int, factor: int = 1) -> Tensor:
    """Lay pictures out in rows, with a gap around each.

    Args:
        pictures: (N, H, W, 3) uint8.
        columns: Pictures in a row.
        gap: Pixels between two pictures, and around all.
        background: Grey value of the gap.
        factor: Every pixel becomes a square of as many pixels a side.

    Returns:
        (h, w, 3) uint8.

    Example:
        >>> import torch
        >>> cells(torch.zeros(3, 4, 6, 3, dtype=torch.uint8), 2, 1, 255).shape
        torch.Size([11, 15, 3])
    """
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (rows * (height * factor + gap) + gap, columns * (width * factor + gap) + gap, 3)
    canvas = torch.full(size, background, dtype=torch.uint8)
    spots = canvas[gap:, gap:].view(rows, height * factor + gap, columns, width * factor + gap, 3)
    spots = spots[:, : height * factor, :, : width * factor]
    spots = spots.view(rows, height, factor, columns, width, factor, 3)
    whole = count // columns
    in_rows = pictures[: whole * columns].reshape(whole, columns, height, width, 3).transpose(1, 2)
    spots[:whole] = in_rows[:, :, None, :, :, None]
    left_over = pictures[whole * columns :]
    if len(left_over):
        spots[whole, :, :, : len(left_over)] = left_over.transpose(0, 1)[:, None, :, :, None]
    return canvas
