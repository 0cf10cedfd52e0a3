"""Checks of maps, and of the boxes and masks that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_interp.data.boxes import check_boxes as check_image_boxes
from lightning_interp.data.boxes import check_masks as check_image_masks
from lightning_interp.errors import ConfigurationError, describe

__all__ = ["Boxes", "boxes_to_masks", "check_boxes", "check_maps", "check_masks", "is_mask"]

Boxes = Tensor | Sequence[Tensor]


def check_maps(maps: Any) -> Tensor:
    """Check maps.

    Args:
        maps: (N, H, W), floating.

    Returns:
        The maps, without their graph.

    Raises:
        ConfigurationError: If the type or the shape is another one.

    Example:
        >>> import torch
        >>> check_maps(torch.zeros(2, 8, 8)).shape
        torch.Size([2, 8, 8])
    """
    if not isinstance(maps, Tensor) or maps.ndim != 3 or not maps.is_floating_point() or 0 in maps.shape[1:]:
        raise ConfigurationError(
            f"maps must be a floating tensor (N, H, W), got {describe(maps)}; of maps of all classes (N, K, H, W), "
            "select one class for each image"
        )
    return maps.detach()


def check_boxes(boxes: Any, maps: Tensor) -> tuple[Tensor, ...]:
    """Check that there are boxes for each map, none of them empty or outside it.

    Args:
        boxes: x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4), or a list of N tensors (M, 4) with M at
            least 1.
        maps: (N, H, W).

    Returns:
        N tensors (M, 4) float64 on the CPU.

    Raises:
        ConfigurationError: If they are of another number or shape, empty, or reach outside the image.

    Example:
        >>> import torch
        >>> check_boxes(torch.tensor([[1, 2, 4, 8]]), torch.zeros(1, 8, 8))
        (tensor([[1., 2., 4., 8.]], dtype=torch.float64),)
    """
    n, height, width = maps.shape
    return check_image_boxes(boxes, n, image_size=(height, width), allow_empty=False)


def is_mask(boxes: Any) -> bool:
    """Whether an argument that takes boxes or masks holds masks (N, H, W).

    Example:
        >>> import torch
        >>> is_mask(torch.zeros(2, 8, 8, dtype=torch.bool)), is_mask(torch.zeros(2, 4))
        (True, False)
    """
    return isinstance(boxes, Tensor) and boxes.ndim == 3


def check_masks(masks: Any, maps: Tensor, name: str = "masks", *, allow_empty: bool = True) -> Tensor:
    """Check that there is a mask of its size for each map.

    Args:
        masks: (N, H, W) bool.
        maps: (N, H, W).
        name: The argument's name in messages.
        allow_empty: Whether a mask may be without an object.

    Returns:
        (N, H, W) bool on the maps' device.

    Raises:
        ConfigurationError: If they are of another type or shape, or empty where that is not allowed.

    Example:
        >>> import torch
        >>> check_masks(torch.ones(1, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8)).dtype
        torch.bool
    """
    n, height, width = maps.shape
    return check_image_masks(masks, (n, height, width), name, allow_empty=allow_empty).to(maps.device)


def boxes_to_masks(boxes: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Mark the pixels whose centres lie within any of an image's boxes.

    Args:
        boxes: N tensors (M, 4), x1, y1, x2, y2 in pixels.
        height: Height of the images.
        width: Width of the images.

    Returns:
        (N, height, width) bool on the CPU.

    Example:
        >>> import torch
        >>> boxes_to_masks([torch.tensor([[1, 0, 3, 1]])], 2, 3).int()
        tensor([[[0, 1, 1],
                 [0, 0, 0]]], dtype=torch.int32)
    """
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    for mask, rows in zip(masks, boxes, strict=True):
        for x1, y1, x2, y2 in rows.tolist():
            mask |= ((y1 <= y) & (y < y2))[:, None] & ((x1 <= x) & (x < x2))
    return masks
