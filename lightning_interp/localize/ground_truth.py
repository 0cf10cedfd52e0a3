"""What maps are measured against: boxes and masks of the true objects, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_interp.errors import ConfigurationError, describe

__all__ = ["Boxes", "boxes_to_masks", "check_boxes", "check_maps", "check_masks", "is_mask"]

Boxes = Tensor | Sequence[Tensor]

_SLACK = 1e-3  # pixels: what a resized box may lose to rounding


def check_maps(maps: Any) -> Tensor:
    """Check that these are maps.

    Args:
        maps: (N, H, W), floating.

    Returns:
        The maps, without a graph.

    Raises:
        ConfigurationError: If they are not.

    Example:
        >>> import torch
        >>> check_maps(torch.zeros(2, 8, 8)).shape
        torch.Size([2, 8, 8])
    """
    if not isinstance(maps, Tensor) or maps.ndim != 3 or not maps.is_floating_point() or 0 in maps.shape[1:]:
        raise ConfigurationError(
            f"maps must be a floating tensor (N, H, W), got {describe(maps)}; of maps of all classes (N, K, H, W), "
            "take one class each"
        )
    return maps.detach()


def check_boxes(boxes: Any, maps: Tensor) -> list[Tensor]:
    """Check that each map's image has its boxes, and that they lie within it.

    Args:
        boxes: x1, y1, x2, y2 in the map's pixels, maxima exclusive: (N, 4), or a list of N tensors (M, 4) with M at
            least 1.
        maps: (N, H, W).

    Returns:
        N tensors (M, 4) float64 on the CPU.

    Raises:
        ConfigurationError: If they are of another number or shape, empty, or reach outside the image.

    Example:
        >>> import torch
        >>> check_boxes(torch.tensor([[1, 2, 4, 8]]), torch.zeros(1, 8, 8))
        [tensor([[1., 2., 4., 8.]], dtype=torch.float64)]
    """
    n, height, width = maps.shape
    given = list(boxes[:, None]) if isinstance(boxes, Tensor) and boxes.shape == (n, 4) else boxes
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, Tensor) for each in given):
        raise ConfigurationError(
            f"boxes must be a tensor (N, 4) or a list of N tensors (M, 4), N = {n} as there are maps; got "
            f"{describe(boxes)}"
        )
    if len(given) != n:
        raise ConfigurationError(f"boxes of {n} images are expected, as many as there are maps; got {len(given)}")
    checked = []
    for image, each in enumerate(given):
        if each.ndim != 2 or each.shape[1] != 4 or each.dtype == torch.bool:
            raise ConfigurationError(f"the boxes of image {image} must be a tensor (M, 4), got {describe(each)}")
        if len(each) == 0:
            raise ConfigurationError(f"image {image} has no box; leave images without an object out")
        checked.append(each.detach().cpu().double())
    if not checked:
        return checked
    rows = torch.cat(checked)
    low, high = rows[:, :2], rows[:, 2:]
    limit = torch.tensor([width, height], dtype=torch.float64)
    # Written so that NaN fails too.
    if not bool(((low >= -_SLACK) & (high <= limit + _SLACK)).all()):
        row = int((~((low >= -_SLACK) & (high <= limit + _SLACK)).all(1)).nonzero()[0])
        raise ConfigurationError(
            f"{_which(checked, row)} reaches outside its image of {width} x {height} pixels (width x height); boxes "
            "are given in the maps' pixels: scale them as the images were scaled"
        )
    if not bool((high > low).all()):
        row = int((~(high > low).all(1)).nonzero()[0])
        raise ConfigurationError(
            f"{_which(checked, row)} is empty; x1, y1, x2, y2 with x1 < x2 and y1 < y2 are expected, maxima exclusive"
        )
    return checked


def _which(boxes: list[Tensor], row: int) -> str:
    image = int((torch.tensor([len(each) for each in boxes]).cumsum(0) <= row).sum())
    numbers = ", ".join(f"{number:g}" for number in torch.cat(boxes)[row].tolist())
    return f"box ({numbers}) of image {image}"


def is_mask(truth: Any) -> bool:
    """Tell masks (N, H, W) from boxes.

    Args:
        truth: Boxes or masks.

    Returns:
        Whether they are masks.

    Example:
        >>> import torch
        >>> is_mask(torch.zeros(2, 8, 8, dtype=torch.bool)), is_mask(torch.zeros(2, 4))
        (True, False)
    """
    return isinstance(truth, Tensor) and truth.ndim == 3


def check_masks(masks: Any, maps: Tensor, name: str = "masks", *, objects: bool = False) -> Tensor:
    """Check that each map has a mask of its size.

    Args:
        masks: (N, H, W) bool.
        maps: (N, H, W).
        name: What they are called.
        objects: Whether each must hold an object.

    Returns:
        (N, H, W) bool on the maps' device.

    Raises:
        ConfigurationError: If they are of another type or shape, or empty where they must not be.

    Example:
        >>> import torch
        >>> check_masks(torch.ones(1, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8)).dtype
        torch.bool
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.shape != maps.shape:
        raise ConfigurationError(
            f"{name} must be a bool tensor {tuple(maps.shape)}, as the maps are; got {describe(masks)}. Resize them as "
            "the images were resized, and of masks of numbers say which belong to the object, as in masks == 1"
        )
    if objects and not bool((found := masks.flatten(1).any(1)).all()):
        image = int((~found).nonzero()[0])
        raise ConfigurationError(f"the mask of image {image} is empty; leave images without an object out")
    return masks.detach().to(maps.device)


def boxes_to_masks(boxes: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Mark the pixels whose centres lie within any of an image's boxes.

    Args:
        boxes: N tensors (M, 4), x1, y1, x2, y2 in pixels.
        height: Of the images.
        width: Of the images.

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
    for mask, own in zip(masks, boxes, strict=True):
        for x1, y1, x2, y2 in own.tolist():
            mask |= ((y1 <= y) & (y < y2))[:, None] & ((x1 <= x) & (x < x2))
    return masks
