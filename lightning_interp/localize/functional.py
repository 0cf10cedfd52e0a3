"""How well maps localise, as functions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_interp.localize.boxes import Normalization
from lightning_interp.localize.counts import (
    TOLERANCE,
    accuracy_counts,
    average_precision,
    best_accuracy,
    energy_rows,
    pixel_counts,
    pointing_rate,
    pointing_rows,
)
from lightning_interp.localize.ground_truth import Boxes

__all__ = ["energy_pointing_game", "max_box_accuracy", "pixel_average_precision", "pointing_game"]


def max_box_accuracy(
    maps: Tensor,
    boxes: Boxes,
    *,
    version: Literal[1, 2] = 1,
    n_thresholds: int = 1000,
    normalization: Normalization = "relu_max",
) -> Tensor:
    """Measure on what share of images a box drawn from the map is right, at the best threshold for the set.

    Args:
        maps: (N, H, W), floating.
        boxes: The true boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4), or a list of N tensors
            (M, 4), of which any may be matched.
        version: 1: the largest component's box, IoU at least 0.5. 2: the best over all components' boxes, the mean
            over IoU 0.3, 0.5 and 0.7, each at its own best threshold.
        n_thresholds: How many thresholds are tried: 0, 1 / n, 2 / n, ...
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
    hits, _ = accuracy_counts(maps, boxes, version, n_thresholds, normalization)
    return best_accuracy(hits, len(maps))


def pixel_average_precision(
    maps: Tensor,
    masks: Tensor,
    ignore: Tensor | None = None,
    *,
    n_thresholds: int = 1000,
    normalization: Normalization = "relu_max",
) -> Tensor:
    """Measure the area under the precision-recall curve of all images' pixels together (PxAP).

    Args:
        maps: (N, H, W), floating.
        masks: (N, H, W) bool, which pixels belong to the objects. An image of background alone is one too.
        ignore: (N, H, W) bool, which pixels are left out, those of objects too.
        n_thresholds: Into how many steps the normalised maps are divided.
        normalization: See ``maps_to_masks``.

    Returns:
        () float32 in [0, 1]; NaN where no pixel belongs to an object.

    Raises:
        ConfigurationError: If masks are of another type or size, or an option is out of range.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[True, False, True, False]]])
        >>> pixel_average_precision(torch.tensor([[[0.9, 0.2, 1.0, 0.1]]]), masks)
        tensor(1.)

    Reference:
        Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020.
    """
    return average_precision(pixel_counts(maps, masks, ignore, n_thresholds, normalization))


def pointing_game(maps: Tensor, boxes: Boxes, classes: Tensor | None = None, *, tolerance: float = TOLERANCE) -> Tensor:
    """Measure on what share of images the map's highest point lies on the object.

    Args:
        maps: (N, H, W), floating. Of several highest points the first in reading order counts.
        boxes: The objects' boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4) or a list of N tensors
            (M, 4), of which any may be hit; or their masks, (N, H, W) bool.
        classes: int64 (N,), the class that each map is of: then the rates of the classes are averaged, as in the paper.
        tolerance: How far from the object the point may lie: an int in pixels, a float as a share of the image's
            shorter side. The default is the paper's 15 pixels at 224.

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
    return pointing_rate(pointing_rows(maps, boxes, classes, tolerance)[:, :2])


def energy_pointing_game(maps: Tensor, boxes: Boxes) -> Tensor:
    """Measure what share of the maps' positive values lies on the objects, as the mean over images.

    Args:
        maps: (N, H, W), floating.
        boxes: The objects' boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4) or a list of N tensors
            (M, 4), of which the pixels count whose centres lie in any; or their masks, (N, H, W) bool.

    Returns:
        () float32 in [0, 1]; NaN without images. A map without a positive value, or with NaN, counts 0.

    Raises:
        ConfigurationError: If boxes or masks are missing, empty, of another size or outside the image.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[3.0, 0.0, -5.0, 1.0]]])
        >>> energy_pointing_game(maps, torch.tensor([[0, 0, 2, 1]]))
        tensor(0.7500)

    Reference:
        Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks", CVPR
        workshops 2020.
    """
    return energy_rows(maps, boxes)[:, 0].double().mean().float()
