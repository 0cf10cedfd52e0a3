"""Bounding boxes on images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from lightning_interp.render.canvas import check_images

__all__ = ["draw_boxes"]

_OUTLINE = (0, 0, 0)


def draw_boxes(
    images: Tensor, boxes: Sequence[Tensor], color: tuple[int, int, int] = (0, 230, 80), *, width: int = 3
) -> Tensor:
    """Draw each image's boxes, outlined in black for contrast on any background.

    Args:
        images: (N, H, W, 3) uint8.
        boxes: N tensors (M, 4), x1, y1, x2, y2 in these images' pixels, maxima exclusive. Boxes that are empty or not
            finite are not drawn.
        color: Red, green and blue, 0 to 255.
        width: The line's width in pixels; the outline adds one on each side.

    Returns:
        (N, H, W, 3) uint8 on the CPU.

    Raises:
        ValueError: If ``images`` is no stack of images, or the number of sets of boxes is another.

    Example:
        >>> import torch
        >>> images = torch.zeros(1, 9, 9, 3, dtype=torch.uint8)
        >>> drawn = draw_boxes(images, [torch.tensor([[2, 2, 7, 7]])], (255, 0, 0), width=1)
        >>> drawn[0, 2, :, 0].tolist()
        [0, 0, 255, 255, 255, 255, 255, 0, 0]
    """
    check_images(images, "images")
    if len(boxes) != len(images):
        raise ValueError(f"boxes of each of the {len(images)} images are expected, got those of {len(boxes)}")
    pictures = images.detach().cpu().permute(0, 3, 1, 2)
    drawn = [_draw(picture, rows, color, width) for picture, rows in zip(pictures, boxes, strict=True)]
    return torch.stack(drawn).permute(0, 2, 3, 1).contiguous()


def _draw(picture: Tensor, boxes: Tensor, color: tuple[int, int, int], width: int) -> Tensor:
    rows = boxes.detach().cpu().float().reshape(-1, 4)
    rows = rows[rows.isfinite().all(1) & (rows[:, 2:] > rows[:, :2]).all(1)]
    if len(rows) == 0:
        return picture  # torchvision warns if no box is left
    height, across = picture.shape[1:]
    corners = torch.cat([rows[:, :2], torch.maximum(rows[:, 2:] - 1, rows[:, :2])], dim=1).round()
    corners = corners.clamp(torch.zeros(4, dtype=torch.int64), torch.tensor([across, height, across, height]) - 1)
    # torchvision's lines grow inwards, so the outline starts a pixel further out.
    outer = corners + torch.tensor([-1, -1, 1, 1])
    outlined: Tensor = draw_bounding_boxes(picture, outer, colors=_OUTLINE, width=width + 2)
    drawn: Tensor = draw_bounding_boxes(outlined, corners, colors=color, width=width)
    return drawn
