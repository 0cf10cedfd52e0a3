"""Box accuracy at the best threshold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from lightning_interp.checks import check_choice
from lightning_interp.localize.boxes import Normalization
from lightning_interp.localize.ground_truth import Boxes, check_boxes, check_maps
from lightning_interp.localize.thresholds import count_hits

__all__ = ["max_box_accuracy", "max_box_accuracy_compute", "max_box_accuracy_update", "version_options"]

_VERSIONS: dict[int, tuple[Literal["largest", "all"], tuple[float, ...]]] = {
    1: ("largest", (0.5,)),
    2: ("all", (0.3, 0.5, 0.7)),
}


def version_options(version: int) -> tuple[Literal["largest", "all"], tuple[float, ...]]:
    """Return the components that a version of the metric considers, and the IoUs that it requires.

    Raises:
        ConfigurationError: If there is no such version.

    Example:
        >>> version_options(2)
        ('all', (0.3, 0.5, 0.7))
    """
    return _VERSIONS[check_choice("version", version, tuple(_VERSIONS))]


def max_box_accuracy_update(
    maps: Tensor, boxes: Boxes, version: int, n_thresholds: int, normalization: Normalization
) -> tuple[Tensor, Tensor]:
    """Count the hits at each threshold, and those of centred boxes of each size.

    Args:
        maps: (N, H, W), floating.
        boxes: As for ``max_box_accuracy``.
        version: As for ``max_box_accuracy``.
        n_thresholds: As for ``max_box_accuracy``; as many sizes are tried.
        normalization: As for ``max_box_accuracy``.

    Returns:
        Two (IoUs, n_thresholds) int64 on the CPU. The centred boxes' sides are 1 / n, 2 / n, ... 1 of the image's.

    Example:
        >>> _, centered = max_box_accuracy_update(torch.ones(1, 8, 8), torch.tensor([[2, 2, 6, 6]]), 1, 4, "relu_max")
        >>> centered
        tensor([[0, 1, 0, 0]])
    """
    components, ious = version_options(version)
    targets = check_boxes(boxes, check_maps(maps))
    hits = count_hits(
        maps, targets, ious, n_thresholds=n_thresholds, components=components, normalization=normalization
    )
    size = torch.tensor([maps.shape[2], maps.shape[1]], dtype=torch.float64)
    fraction = torch.arange(1, n_thresholds + 1, dtype=torch.float64)[:, None] / n_thresholds
    centered_boxes = torch.cat([(1 - fraction) * size, (1 + fraction) * size], dim=1) / 2
    smallest = torch.tensor(ious, dtype=torch.float64)[:, None]
    centered = torch.zeros_like(hits)
    for image_boxes in targets:
        centered += box_iou(centered_boxes, image_boxes).amax(1) >= smallest
    return hits, centered


def max_box_accuracy_compute(hits: Tensor, count: Tensor | int) -> Tensor:
    """Take the best threshold for each IoU, then the mean over the IoUs.

    Args:
        hits: (IoUs, T) integers.
        count: Number of images.

    Returns:
        () float32; NaN where ``count`` is 0.

    Example:
        >>> max_box_accuracy_compute(torch.tensor([[1, 4, 2], [0, 1, 2]]), 4)
        tensor(0.7500)
    """
    return (hits.amax(1).float() / count).mean()


def max_box_accuracy(
    maps: Tensor,
    boxes: Boxes,
    *,
    version: Literal[1, 2] = 1,
    n_thresholds: int = 1000,
    normalization: Normalization = "relu_max",
) -> Tensor:
    """Compute the fraction of images for which a box drawn from the map is correct, at the best threshold for the set.

    Args:
        maps: (N, H, W), floating.
        boxes: The objects' boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4), or a list of N tensors
            (M, 4), of which any may be matched.
        version: 1: the largest component's box, IoU at least 0.5. 2: the best over all components' boxes, the mean
            over IoU 0.3, 0.5 and 0.7, each at the best threshold for it.
        n_thresholds: Number of thresholds that are tried, n: 0, 1 / n, 2 / n, ...
        normalization: See ``maps_to_masks``.

    Returns:
        () float32 in [0, 1]; NaN without images.

    Raises:
        ConfigurationError: If boxes are missing, empty or outside the image, or an option is out of range.

    Example:
        >>> import torch
        >>> maps = torch.zeros(2, 8, 8)
        >>> maps[:, 2:6, 2:6] = 1.0
        >>> max_box_accuracy(maps, torch.tensor([[2, 2, 6, 6], [0, 0, 3, 3]]))
        tensor(0.5000)

    Reference:
        Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020.
    """
    hits, _ = max_box_accuracy_update(maps, boxes, version, n_thresholds, normalization)
    return max_box_accuracy_compute(hits, len(maps))
