"""The threshold at which the most boxes drawn from maps are correct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from lightning_interp.checks import check_integer, check_number
from lightning_interp.errors import ConfigurationError
from lightning_interp.localize.boxes import DEFAULT_THRESHOLD, Normalization, normalize
from lightning_interp.localize.components import component_tree
from lightning_interp.localize.ground_truth import Boxes, check_boxes, check_maps

__all__ = ["best_threshold", "count_hits", "fit_threshold", "threshold_grid"]


def fit_threshold(
    maps: Tensor,
    boxes: Boxes,
    *,
    iou: float = 0.5,
    n_thresholds: int = 1000,
    normalization: Normalization = "relu_max",
) -> float:
    """Find the threshold at which the most images' largest components match their objects' boxes.

    The extent of high values depends on the model, so the usual 20 % is often a poor choice: with a SqueezeNet
    trained on ImageNet and photographs of pets, 20 % finds 45 % of the pets at IoU 0.5, the fitted 4 % finds 93 %.
    Fit on other images than those that are then scored.

    Args:
        maps: (N, H, W), floating.
        boxes: The objects' boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4), or a list of N tensors
            (M, 4), of which any may be matched.
        iou: The smallest overlap of a match, in (0, 1].
        n_thresholds: Number of thresholds that are tried, n: 0, 1 / n, 2 / n, ...
        normalization: See ``normalize``; the one with which the threshold is then used.

    Returns:
        The threshold, for ``maps_to_boxes``. Where several are equally good, the middle of the longest run of
        them, which generalises best; 0.2 where none matches any box.

    Raises:
        ConfigurationError: If there are no images, boxes are missing, empty or outside the image, or an option is out
            of range.

    Example:
        >>> import torch
        >>> from lightning_interp.localize import maps_to_boxes
        >>> bump = torch.exp(-(((torch.arange(64) - 31.5) / 10) ** 2))
        >>> maps = (bump[:, None] * bump)[None]
        >>> threshold = fit_threshold(maps, torch.tensor([[20, 20, 44, 44]]), iou=0.9)
        >>> maps_to_boxes(maps, threshold).tolist()
        [[20.0, 20.0, 44.0, 44.0]]
    """
    if len(check_maps(maps)) == 0:
        raise ConfigurationError("at least one map is needed to fit a threshold, got none")
    iou = check_number("iou", iou, "an overlap in (0, 1]", lambda overlap: 0 < overlap <= 1)
    hits = count_hits(maps, check_boxes(boxes, maps), [iou], n_thresholds=n_thresholds, normalization=normalization)
    return best_threshold(hits.sum(0))


def best_threshold(hits: Tensor) -> float:
    """Choose the threshold with the most hits.

    Args:
        hits: (T,), numbers of hits at the thresholds 0, 1 / T, 2 / T, ...

    Returns:
        The middle of the longest run of thresholds with the most hits, or 0.2 where there are none.

    Example:
        >>> import torch
        >>> best_threshold(torch.tensor([0, 3, 1, 3, 3, 3, 2, 0]))
        0.5
    """
    scores = hits.cpu().numpy()
    if scores.max() == 0:
        return DEFAULT_THRESHOLD
    edges = np.flatnonzero(np.diff(np.concatenate([[0], scores == scores.max(), [0]])))
    starts, stops = edges[::2], edges[1::2]
    longest = int(np.argmax(stops - starts))
    return float(threshold_grid(len(scores))[(starts[longest] + stops[longest] - 1) // 2])


def threshold_grid(n_thresholds: int) -> Tensor:
    """Return the thresholds 0, 1 / n, 2 / n, ...

    Args:
        n_thresholds: Their number, n.

    Returns:
        (n_thresholds,) float32 on the CPU.

    Raises:
        ConfigurationError: If ``n_thresholds`` is no positive integer.

    Example:
        >>> threshold_grid(4).tolist()
        [0.0, 0.25, 0.5, 0.75]
    """
    n = check_integer("n_thresholds", n_thresholds)
    return (torch.arange(n, dtype=torch.float64) / n).float()


def count_hits(
    maps: Tensor,
    boxes: Sequence[Tensor],
    ious: Sequence[float],
    *,
    n_thresholds: int = 1000,
    components: Literal["largest", "all"] = "largest",
    normalization: Normalization = "relu_max",
) -> Tensor:
    """Count the images whose object is localised, at each threshold of a grid.

    Args:
        maps: (N, H, W), floating.
        boxes: N tensors (M, 4) float64 on the CPU, as ``check_boxes`` returns them.
        ious: The smallest overlaps of a match.
        n_thresholds: Number of thresholds, n: 0, 1 / n, 2 / n, ...
        components: Whether the largest component must match, or any.
        normalization: See ``normalize``.

    Returns:
        (len(ious), n_thresholds) int64 on the CPU.

    Raises:
        ConfigurationError: If an option is out of range.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[0.2, 1.0, 1.0, 0.6]]])
        >>> count_hits(maps, [torch.tensor([[1.0, 0, 3, 1]]).double()], [0.6, 0.9], n_thresholds=4)
        tensor([[0, 1, 1, 1],
                [0, 0, 0, 1]])
    """
    # The level of a pixel is the number of thresholds below its value.
    grid = threshold_grid(n_thresholds).to(maps.device)
    levels = torch.bucketize(normalize(maps, normalization), grid, out_int32=True).cpu().numpy()
    hits = torch.zeros(len(ious), n_thresholds, dtype=torch.int64)
    smallest = torch.tensor(ious, dtype=torch.float64)[:, None]
    for level, targets in zip(levels, boxes, strict=True):
        tree = component_tree(level, n_thresholds)
        if components == "all":
            overlaps = torch.from_numpy(tree.max_per_level(_best_overlaps(tree.boxes, targets).numpy(), 0.0))
        else:
            overlaps = _best_overlaps(tree.largest_boxes(), targets)
        hits += overlaps >= smallest
    return hits


def _best_overlaps(boxes: NDArray[np.int64], targets: Tensor) -> Tensor:
    """(M,) float64: the IoU of each box with the target that it matches best."""
    return box_iou(torch.from_numpy(boxes).double(), targets).amax(1)
