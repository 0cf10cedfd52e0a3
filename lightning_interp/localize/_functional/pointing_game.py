"""Pointing game: whether the maximum of a map lies on the object."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_interp.checks import check_number, is_integer
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.localize.ground_truth import Boxes, check_boxes, check_maps, check_masks, is_mask

__all__ = ["DEFAULT_TOLERANCE", "check_tolerance", "pointing_game", "pointing_game_compute", "pointing_game_update"]

DEFAULT_TOLERANCE = 15 / 224  # of the shorter side: 15 pixels at 224


def check_tolerance(tolerance: int | float) -> int | float:
    """Return a tolerance, pixels as an ``int`` or a fraction of the shorter side as a ``float``.

    Raises:
        ConfigurationError: If it is neither, negative, or a fraction above 1.

    Example:
        >>> check_tolerance(15)
        15
    """
    takes = "a number of pixels as an int, or a fraction of the image's shorter side as a float in [0, 1]"
    checked = check_number(
        "tolerance", tolerance, takes, lambda value: value >= 0 and (is_integer(value) or value <= 1)
    )
    return int(tolerance) if is_integer(tolerance) else checked


def pointing_game_update(maps: Tensor, boxes: Boxes, classes: Tensor | None, tolerance: float) -> Tensor:
    """Compute for each image whether the map's maximum, and whether the image's centre, lies on the object.

    Args:
        maps: As for ``pointing_game``.
        boxes: As for ``pointing_game``.
        classes: As for ``pointing_game``.
        tolerance: As for ``pointing_game``.

    Returns:
        (N, 3) float32 on the maps' device: class (-1 without classes), hit, hit of the centre.

    Example:
        >>> pointing_game_update(torch.eye(5)[None].flip(1), torch.tensor([[2, 2, 3, 3]]), None, 1)
        tensor([[-1.,  0.,  1.]])
    """
    values, (n, height, width) = check_maps(maps), maps.shape
    tolerance = check_tolerance(tolerance)
    pixels = tolerance * (min(height, width) if isinstance(tolerance, float) else 1)
    class_column = _check_classes(classes, n)
    # Of equal maxima the first: argmax on a GPU returns any.
    flat = values.flatten(1).cpu()
    maxima = flat.amax(1, keepdim=True)
    index = (flat == maxima).int().argmax(1)
    maximum_points = torch.stack([index % width, index // width], dim=1).double()
    centers = torch.tensor([width // 2, height // 2], dtype=torch.float64).expand(n, 2)
    points = torch.stack([maximum_points, centers], dim=1)  # (N, 2, 2)
    hits = _distances(points, boxes, values) <= pixels + 1e-6
    hits[:, 0] &= maxima[:, 0] > 0
    return torch.cat([class_column[:, None], hits.float()], dim=1).to(maps.device)


def pointing_game_compute(rows: Tensor) -> Tensor:
    """Average the hits over the images of each class, then over classes.

    Args:
        rows: (N, 2): class, hit.

    Returns:
        () float32; NaN without rows.

    Example:
        >>> pointing_game_compute(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [5.0, 0.0]]))
        tensor(0.5000)
    """
    _, class_indices = torch.unique(rows[:, 0], return_inverse=True)
    total = torch.bincount(class_indices)
    # Counted as integers: their sum does not depend on the order, so neither does the score.
    hits = torch.bincount(class_indices[rows[:, 1] > 0], minlength=len(total))
    return (hits / total).mean()


def pointing_game(
    maps: Tensor, boxes: Boxes, classes: Tensor | None = None, *, tolerance: float = DEFAULT_TOLERANCE
) -> Tensor:
    """Compute the fraction of images whose map has its maximum on the object.

    Args:
        maps: (N, H, W), floating. Of several maxima the first in reading order counts.
        boxes: The objects' boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4) or a list of N tensors
            (M, 4), of which any may be hit; or their masks, (N, H, W) bool.
        classes: int64 (N,), the class that each map explains: then the rates of the classes are averaged, as in the
            paper.
        tolerance: The largest distance from the object that counts as a hit: an int in pixels, a float as a fraction
            of the image's shorter side. The default is the paper's 15 pixels at 224.

    Returns:
        () float32 in [0, 1]; NaN without images. A map without a positive value, or with NaN, is a miss.

    Raises:
        ConfigurationError: If boxes or masks are missing, empty, of another size or outside the image, classes are
            negative or of another number, or the tolerance is out of range.

    Example:
        >>> import torch
        >>> maps = torch.zeros(2, 32, 32)
        >>> maps[:, 4, 4] = 1.0
        >>> pointing_game(maps, torch.tensor([[5, 5, 9, 9], [20, 20, 30, 30]]), tolerance=2)
        tensor(0.5000)

    Reference:
        Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016; IJCV 2018.
    """
    return pointing_game_compute(pointing_game_update(maps, boxes, classes, tolerance)[:, :2])


def _check_classes(classes: Any, n: int) -> Tensor:
    """The column of classes, float32 (N,) on the CPU."""
    if classes is None:
        return torch.full((n,), -1.0)
    is_integral = isinstance(classes, Tensor) and not classes.is_floating_point() and classes.dtype != torch.bool
    if not is_integral or classes.shape != (n,) or bool((classes < 0).any()):
        raise ConfigurationError(f"classes must be {n} integers from 0, int64 (N,), got {describe(classes)}")
    checked: Tensor = classes.detach().cpu().float()
    return checked


def _distances(points: Tensor, boxes: Boxes, maps: Tensor) -> Tensor:
    """(N, P): the distance in pixels of each point (x, y) of an image from its objects' nearest pixel."""
    distances = torch.zeros(points.shape[:2], dtype=torch.float64)
    if is_mask(boxes):
        masks = check_masks(boxes, maps, allow_empty=False).cpu()
        for row, image_points, mask in zip(distances, points, masks, strict=True):
            row.copy_(torch.cdist(image_points, mask.nonzero().flip(1).double()).amin(1))
        return distances
    for row, image_points, rows in zip(distances, points, check_boxes(boxes, maps), strict=True):
        # The last pixel of a box is one before its maximum.
        low, high = rows[:, :2], rows[:, 2:] - 1
        outside = torch.maximum(low - image_points[:, None], image_points[:, None] - high).clamp(min=0)
        row.copy_(outside.norm(dim=2).amin(1))
    return distances
