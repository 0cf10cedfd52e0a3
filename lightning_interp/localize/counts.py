"""What the localisation scores count for a batch of maps, and what the counts come to."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.localize.boxes import Normalization, box_hits, check_grid, normalize, threshold_grid
from lightning_interp.localize.ground_truth import Boxes, boxes_to_masks, check_boxes, check_maps, check_masks, is_mask

__all__ = [
    "TOLERANCE",
    "accuracy_counts",
    "average_precision",
    "best_accuracy",
    "check_tolerance",
    "check_version",
    "energy_rows",
    "pixel_counts",
    "pointing_rate",
    "pointing_rows",
]

TOLERANCE = 15 / 224  # of the shorter side: 15 pixels at 224

_VERSIONS: dict[int, tuple[Literal["largest", "all"], tuple[float, ...]]] = {
    1: ("largest", (0.5,)),
    2: ("all", (0.3, 0.5, 0.7)),
}


def check_version(version: Any) -> tuple[Literal["largest", "all"], tuple[float, ...]]:
    """Say which components a version of the box accuracy looks at, and which overlaps it asks for.

    Args:
        version: 1 or 2.

    Returns:
        The components and the IoUs.

    Raises:
        ConfigurationError: If there is no such version.

    Example:
        >>> check_version(2)
        ('all', (0.3, 0.5, 0.7))
    """
    if version not in _VERSIONS:
        raise ConfigurationError(f"version must be 1 or 2, got {version!r}")
    return _VERSIONS[version]


def accuracy_counts(
    maps: Tensor, boxes: Boxes, version: int, n_thresholds: int, normalization: Normalization
) -> tuple[Tensor, Tensor]:
    """Count hits at each threshold, and those of centred boxes of each size.

    Args:
        maps: (N, H, W), floating.
        boxes: As for ``max_box_accuracy``.
        version: As for ``max_box_accuracy``.
        n_thresholds: As for ``max_box_accuracy``; as many sizes are tried.
        normalization: As for ``max_box_accuracy``.

    Returns:
        Two (IoUs, n_thresholds) int64 on the CPU. The centred boxes' sides are 1 / n, 2 / n, ... 1 of the image's.

    Example:
        >>> import torch
        >>> _, centered = accuracy_counts(torch.ones(1, 8, 8), torch.tensor([[2, 2, 6, 6]]), 1, 4, "relu_max")
        >>> centered
        tensor([[0, 1, 0, 0]])
    """
    components, ious = check_version(version)
    true = check_boxes(boxes, check_maps(maps))
    hits = box_hits(maps, true, ious, n_thresholds=n_thresholds, components=components, normalization=normalization)
    size = torch.tensor([maps.shape[2], maps.shape[1]], dtype=torch.float64)
    share = torch.arange(1, n_thresholds + 1, dtype=torch.float64)[:, None] / n_thresholds
    in_the_middle = torch.cat([(1 - share) * size, (1 + share) * size], dim=1) / 2
    wanted = torch.tensor(ious, dtype=torch.float64)[:, None]
    centered = torch.zeros_like(hits)
    for each in true:
        centered += box_iou(in_the_middle, each).amax(1) >= wanted
    return hits, centered


def best_accuracy(hits: Tensor, count: Tensor | int) -> Tensor:
    """Take the best threshold for each IoU, then the mean over the IoUs.

    Args:
        hits: (IoUs, T) integers.
        count: Of how many images.

    Returns:
        () float32; NaN where ``count`` is 0.

    Example:
        >>> import torch
        >>> best_accuracy(torch.tensor([[1, 4, 2], [0, 1, 2]]), 4)
        tensor(0.7500)
    """
    return (hits.amax(1).float() / count).mean()


def pixel_counts(
    maps: Tensor, masks: Tensor, ignore: Tensor | None, n_thresholds: int, normalization: Normalization
) -> Tensor:
    """Count how many background and object pixels stand at each step of the normalised maps.

    Args:
        maps: As for ``pixel_average_precision``.
        masks: As for ``pixel_average_precision``.
        ignore: As for ``pixel_average_precision``.
        n_thresholds: As for ``pixel_average_precision``.
        normalization: As for ``pixel_average_precision``.

    Returns:
        (2, n_thresholds + 1) int64 on the maps' device: background, objects. Step k is [k / n, (k + 1) / n); the last
        is 1 alone.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[True, False, True, False]]])
        >>> pixel_counts(torch.tensor([[[0.9, 0.2, 1.0, 0.1]]]), masks, None, 2, "relu_max")
        tensor([[2, 0, 0],
                [0, 1, 1]])
    """
    values = normalize(maps, normalization)
    inside = check_masks(masks, maps)
    upper = threshold_grid(check_grid(n_thresholds)).to(maps.device)[1:]
    edges = torch.cat([upper, upper.new_ones(1)])
    steps = torch.bucketize(values, edges, right=True) + inside * (n_thresholds + 1)
    if ignore is not None:
        steps = steps[~check_masks(ignore, maps, "ignore")]
    return torch.bincount(steps.flatten(), minlength=2 * (n_thresholds + 1)).reshape(2, -1)


def average_precision(counts: Tensor) -> Tensor:
    """Sum precision times the step in recall, from the highest scores down.

    Args:
        counts: (2, T) integers, as ``pixel_counts`` gives them.

    Returns:
        () float32; NaN without pixels of objects.

    Example:
        >>> import torch
        >>> average_precision(torch.tensor([[2, 1, 0], [0, 1, 1]]))
        tensor(0.8333)
    """
    # In double precision: there are many pixels. On the CPU, because not every device has it.
    background, objects = counts.cpu().double().flip(1)
    found = objects.cumsum(0)
    precision = found / (found + background.cumsum(0)).clamp(min=1)
    area: Tensor = (precision * objects).sum() / found[-1]
    return area.float().to(counts.device)


def check_tolerance(tolerance: Any) -> float:
    """Check a tolerance.

    Args:
        tolerance: Pixels as an int, a share of the shorter side as a float.

    Returns:
        The tolerance.

    Raises:
        ConfigurationError: If it is neither, negative, or a share above 1.

    Example:
        >>> check_tolerance(15)
        15
    """
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not number or not tolerance >= 0 or (isinstance(tolerance, float) and tolerance > 1):
        raise ConfigurationError(
            "tolerance is a number of pixels as an int, or a share of the image's shorter side as a float in [0, 1]; "
            f"got {tolerance!r}"
        )
    checked: float = tolerance
    return checked


def pointing_rows(maps: Tensor, truth: Boxes, classes: Tensor | None, tolerance: float) -> Tensor:
    """Say for each image whether its map, and whether the image's centre, points at the object.

    Args:
        maps: As for ``pointing_game``.
        truth: As for ``pointing_game``.
        classes: As for ``pointing_game``.
        tolerance: As for ``pointing_game``.

    Returns:
        (N, 3) float32 on the maps' device: class (-1 where none is given), hit, hit of the centre.

    Example:
        >>> import torch
        >>> pointing_rows(torch.eye(5)[None].flip(1), torch.tensor([[2, 2, 3, 3]]), None, 1)
        tensor([[-1.,  0.,  1.]])
    """
    values, (n, height, width) = check_maps(maps), maps.shape
    reach = check_tolerance(tolerance) * (min(height, width) if isinstance(tolerance, float) else 1)
    named = _check_classes(classes, n)
    # The highest point stands first: argmax has no such rule on a GPU.
    flat = values.flatten(1).cpu()
    peak = flat.amax(1, keepdim=True)
    place = (flat == peak).int().argmax(1)
    points = torch.stack([place % width, place // width], dim=1).double()
    centers = torch.tensor([width // 2, height // 2], dtype=torch.float64).expand(n, 2)
    both = torch.stack([points, centers], dim=1)  # (N, 2, 2)
    near = _distances(both, truth, values) <= reach + 1e-6
    near[:, 0] &= peak[:, 0] > 0
    return torch.cat([named[:, None], near.float()], dim=1).to(maps.device)


def _check_classes(classes: Any, n: int) -> Tensor:
    if classes is None:
        return torch.full((n,), -1.0)
    whole = isinstance(classes, Tensor) and not classes.is_floating_point() and classes.dtype != torch.bool
    if not whole or classes.shape != (n,) or bool((classes < 0).any()):
        raise ConfigurationError(f"classes must be {n} integers from 0, int64 (N,), got {describe(classes)}")
    checked: Tensor = classes.detach().cpu().float()
    return checked


def _distances(points: Tensor, truth: Boxes, maps: Tensor) -> Tensor:
    """(N, P): how many pixels lie from each point (x, y) of an image to its objects' nearest pixel."""
    found = torch.zeros(points.shape[:2], dtype=torch.float64)
    if is_mask(truth):
        masks = check_masks(truth, maps, objects=True).cpu()
        for row, own, mask in zip(found, points, masks, strict=True):
            row.copy_(torch.cdist(own, mask.nonzero().flip(1).double()).amin(1))
        return found
    for row, own, boxes in zip(found, points, check_boxes(truth, maps), strict=True):
        # A box's last pixel stands one before its maximum.
        outside = torch.maximum(boxes[:, :2] - own[:, None], own[:, None] - (boxes[:, 2:] - 1)).clamp(min=0)
        row.copy_(outside.norm(dim=2).amin(1))
    return found


def pointing_rate(rows: Tensor) -> Tensor:
    """Average hits over images of each class, then over classes.

    Args:
        rows: (N, 2): class, hit.

    Returns:
        () float32; NaN without rows.

    Example:
        >>> import torch
        >>> pointing_rate(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [5.0, 0.0]]))
        tensor(0.5000)
    """
    _, own = torch.unique(rows[:, 0], return_inverse=True)
    total = torch.bincount(own)
    # Counted as integers: their sum does not depend on the order, so neither does the score.
    hits = torch.bincount(own[rows[:, 1] > 0], minlength=len(total))
    return (hits / total).mean()


def energy_rows(maps: Tensor, truth: Boxes) -> Tensor:
    """Say for each image what share of its map's positive values, and of its area, is the object's.

    Args:
        maps: As for ``energy_pointing_game``.
        truth: As for ``energy_pointing_game``.

    Returns:
        (N, 2) float32 on the maps' device.

    Example:
        >>> import torch
        >>> energy_rows(torch.tensor([[[3.0, 0.0, -5.0, 1.0]]]), torch.tensor([[0, 0, 2, 1]]))
        tensor([[0.7500, 0.5000]])
    """
    values = normalize(maps)  # a share stays the same, and huge values do not overflow
    if is_mask(truth):
        masks = check_masks(truth, maps, objects=True)
    else:
        masks = boxes_to_masks(check_boxes(truth, maps), *maps.shape[1:]).to(maps.device)
    total = values.sum((1, 2))
    inside = (values * masks).sum((1, 2)) / torch.where(total > 0, total, 1)
    return torch.stack([inside, masks.float().mean((1, 2))], dim=1)
