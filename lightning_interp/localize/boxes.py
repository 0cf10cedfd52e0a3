"""From maps to masks and boxes, and the threshold that makes the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label  # type: ignore[attr-defined]
from torch import Tensor
from torchvision.ops import box_iou

from lightning_interp.errors import ConfigurationError
from lightning_interp.localize.components import component_tree
from lightning_interp.localize.ground_truth import Boxes, check_boxes, check_maps

__all__ = [
    "Normalization",
    "best_threshold",
    "box_hits",
    "check_grid",
    "fit_threshold",
    "maps_to_boxes",
    "maps_to_masks",
    "normalize",
    "threshold_grid",
]

Normalization = Literal["relu_max", "min_max"]

_USUAL = 0.2


def normalize(maps: Tensor, normalization: Normalization = "relu_max") -> Tensor:
    """Bring each map to [0, 1].

    Args:
        maps: (N, H, W), floating.
        normalization: ``"relu_max"``: what is negative becomes 0, then division by the map's maximum.
            ``"min_max"``: from the map's minimum to its maximum.

    Returns:
        (N, H, W) float32; 0 everywhere where a map has nothing to show: no positive value (of ``"min_max"``: no two
        different ones), NaN, or an infinite maximum.

    Raises:
        ConfigurationError: If there are no maps, or no such normalisation.

    Example:
        >>> import torch
        >>> normalize(torch.tensor([[[-1.0, 2.0, 4.0]], [[-1.0, -2.0, -4.0]]])).tolist()
        [[[0.0, 0.5, 1.0]], [[0.0, 0.0, 0.0]]]
    """
    values = check_maps(maps)
    if normalization not in ("relu_max", "min_max"):
        raise ConfigurationError(f"normalization must be 'relu_max' or 'min_max', got {normalization!r}")
    values = values if values.dtype == torch.float64 else values.float()
    values = values.clamp(min=0) if normalization == "relu_max" else values - values.amin((1, 2), keepdim=True)
    peak = values.amax((1, 2), keepdim=True)
    usable = (peak > 0) & torch.isfinite(peak)
    return torch.where(usable, values / torch.where(usable, peak, 1), 0).float()


def maps_to_masks(maps: Tensor, threshold: float, *, normalization: Normalization = "relu_max") -> Tensor:
    """Mark where maps stand above a share of their maximum.

    Args:
        maps: (N, H, W), floating: any maps, saliency too.
        threshold: In [0, 1), a share of each map's maximum.
        normalization: See ``normalize``. ReLU and division by the maximum localises better than min-max in the
            published comparisons.

    Returns:
        (N, H, W) bool on the maps' device; False everywhere where a map has nothing to show.

    Raises:
        ConfigurationError: If there are no maps, or the threshold is outside [0, 1).

    Example:
        >>> import torch
        >>> maps_to_masks(torch.tensor([[[-1.0, 1.0, 2.0, 4.0]]]), 0.25).tolist()
        [[[False, False, True, True]]]

    Reference:
        Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
        raise ConfigurationError(f"threshold is a share of each map's maximum, 0 <= threshold < 1; got {threshold!r}")
    values = normalize(maps, normalization)
    return values > torch.tensor(float(threshold), dtype=torch.float32, device=values.device)


@overload
def maps_to_boxes(
    maps: Tensor,
    threshold: float = ...,
    components: Literal["largest"] = ...,
    *,
    normalization: Normalization = ...,
) -> Tensor: ...
@overload
def maps_to_boxes(
    maps: Tensor, threshold: float = ..., *, components: Literal["all"], normalization: Normalization = ...
) -> list[Tensor]: ...
@overload
def maps_to_boxes(
    maps: Tensor, threshold: float, components: Literal["all"], *, normalization: Normalization = ...
) -> list[Tensor]: ...
def maps_to_boxes(
    maps: Tensor,
    threshold: float = _USUAL,
    components: Literal["largest", "all"] = "largest",
    *,
    normalization: Normalization = "relu_max",
) -> Tensor | list[Tensor]:
    """Draw boxes around what stands above a share of the maps' maximum.

    The largest component is the one of the greatest area within the polygon through its outer pixels' centres, as
    OpenCV measures it, less its holes: four neighbouring pixels count 1, three of them a half. Of components of one
    area (lines have none), it is the one with most pixels, then the first in reading order. Pixels that touch at a
    corner are connected.

    The usual threshold of 20 % is often a poor choice: fit it with ``fit_threshold``.

    Args:
        maps: (N, H, W), floating: any maps, saliency too.
        threshold: In [0, 1), a share of each map's maximum.
        components: ``"largest"`` for one box a map, ``"all"`` for one a component, the largest first.
        normalization: See ``normalize``.

    Returns:
        (N, 4) float32 on the maps' device: x1, y1, x2, y2 in pixels, maxima exclusive. A map with nothing to show
        gets the box 0, 0, 0, 0, which overlaps nothing and so counts as a miss. With ``components="all"`` a list of N
        tensors (M, 4), where M may be 0.

    Raises:
        ConfigurationError: If there are no maps, the threshold is outside [0, 1), or an option has no such value.

    Example:
        >>> import torch
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 1:7] = 1.0
        >>> maps_to_boxes(maps).tolist()
        [[1.0, 2.0, 7.0, 5.0]]

    Reference:
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
    """
    if components not in ("largest", "all"):
        raise ConfigurationError(f"components must be 'largest' or 'all', got {components!r}")
    masks = maps_to_masks(maps, threshold, normalization=normalization)
    found = [torch.from_numpy(_boxes(mask)).to(maps.device) for mask in masks.cpu().numpy()]
    if components == "all":
        return found
    largest = torch.zeros(len(found), 4, device=maps.device, dtype=torch.float32)
    for row, each in zip(largest, found, strict=True):
        row.copy_(each[:1].sum(0))  # of no box, 0, 0, 0, 0
    return largest


def _boxes(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The boxes of a mask's components, the largest first."""
    labels, count = label(mask, structure=np.ones((3, 3)))
    corners = [labels[:-1, :-1], labels[:-1, 1:], labels[1:, :-1], labels[1:, 1:]]
    # Four neighbours all touch, so those of them that are inside belong to one component.
    half_squares = np.maximum(sum((corner > 0).astype(int) for corner in corners) - 2, 0)
    owners = np.maximum.reduce(corners)
    areas = np.bincount(owners.ravel(), half_squares.ravel(), count + 1)[1:]
    pixels = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    boxes = [(across.start, down.start, across.stop, down.stop) for down, across in find_objects(labels)]
    order = np.lexsort((-pixels, -areas))
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)[order]


def fit_threshold(
    maps: Tensor,
    boxes: Boxes,
    *,
    iou: float = 0.5,
    n_thresholds: int = 1000,
    normalization: Normalization = "relu_max",
) -> float:
    """Find the threshold at which the most images' largest components match their objects' boxes.

    How far a map's heat spreads depends on the model, so the usual 20 % is often a poor choice: with a SqueezeNet
    trained on ImageNet and photographs of pets, 20 % finds 45 % of the pets at IoU 0.5, the fitted 4 % finds 93 %.
    Fit on other images than those that are then scored.

    Args:
        maps: (N, H, W), floating.
        boxes: The true boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4), or a list of N tensors
            (M, 4), of which any may be matched.
        iou: From which overlap on a box matches, in (0, 1].
        n_thresholds: How many thresholds are tried: 0, 1 / n, 2 / n, ...
        normalization: See ``normalize``; the one with which the threshold is then used.

    Returns:
        The threshold, to be given to ``maps_to_boxes``. Where several do equally well, the middle of the longest run of
        them, so that it does as well elsewhere; 0.2 where none finds anything.

    Raises:
        ConfigurationError: If there are no images, boxes are missing, empty or outside the image, or an option is out
            of range.

    Example:
        >>> import torch
        >>> bump = torch.exp(-(((torch.arange(64) - 31.5) / 10) ** 2))
        >>> maps = (bump[:, None] * bump)[None]
        >>> threshold = fit_threshold(maps, torch.tensor([[20, 20, 44, 44]]), iou=0.9)
        >>> maps_to_boxes(maps, threshold).tolist()
        [[20.0, 20.0, 44.0, 44.0]]
    """
    if len(check_maps(maps)) == 0:
        raise ConfigurationError("at least one map is needed to fit a threshold, got none")
    hits = box_hits(maps, check_boxes(boxes, maps), [iou], n_thresholds=n_thresholds, normalization=normalization)
    return best_threshold(hits.sum(0))


def best_threshold(hits: Tensor) -> float:
    """Choose a threshold by how many hits each has.

    Args:
        hits: (T,), for the thresholds 0, 1 / T, 2 / T, ...

    Returns:
        The middle of the longest run of thresholds with the most hits, or 0.2 where there are none.

    Example:
        >>> import torch
        >>> best_threshold(torch.tensor([0, 3, 1, 3, 3, 3, 2, 0]))
        0.5
    """
    scores = hits.cpu().numpy()
    if scores.max() == 0:
        return _USUAL
    edges = np.flatnonzero(np.diff(np.concatenate([[0], scores == scores.max(), [0]])))
    starts, stops = edges[::2], edges[1::2]
    longest = int(np.argmax(stops - starts))
    return float(threshold_grid(len(scores))[(starts[longest] + stops[longest] - 1) // 2])


def threshold_grid(n_thresholds: int) -> Tensor:
    """Make the thresholds 0, 1 / n, 2 / n, ...

    Args:
        n_thresholds: How many, n.

    Returns:
        (n_thresholds,) float32 on the CPU.

    Example:
        >>> threshold_grid(4).tolist()
        [0.0, 0.25, 0.5, 0.75]
    """
    return (torch.arange(n_thresholds, dtype=torch.float64) / n_thresholds).float()


def check_grid(n_thresholds: Any) -> int:
    """Check a number of thresholds.

    Args:
        n_thresholds: The number.

    Returns:
        The number.

    Raises:
        ConfigurationError: If it is no whole number, or not at least 1.

    Example:
        >>> check_grid(1000)
        1000
    """
    if isinstance(n_thresholds, bool) or not isinstance(n_thresholds, int) or n_thresholds < 1:
        raise ConfigurationError(f"n_thresholds must be a whole number, at least 1; got {n_thresholds!r}")
    return n_thresholds


def box_hits(
    maps: Tensor,
    boxes: Sequence[Tensor],
    ious: Sequence[float],
    *,
    n_thresholds: int = 1000,
    components: Literal["largest", "all"] = "largest",
    normalization: Normalization = "relu_max",
) -> Tensor:
    """Count at each threshold of a grid how many images' objects are found.

    Args:
        maps: (N, H, W), floating.
        boxes: N tensors (M, 4) float64 on the CPU, as ``check_boxes`` gives them.
        ious: From which overlaps on a box matches, each in (0, 1].
        n_thresholds: How many thresholds there are: 0, 1 / n, 2 / n, ...
        components: Whether the largest component alone must match, or any.
        normalization: See ``normalize``.

    Returns:
        (len(ious), n_thresholds) int64 on the CPU.

    Raises:
        ConfigurationError: If an option is out of range.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[0.2, 1.0, 1.0, 0.6]]])
        >>> box_hits(maps, [torch.tensor([[1.0, 0, 3, 1]]).double()], [0.6, 0.9], n_thresholds=4)
        tensor([[0, 1, 1, 1],
                [0, 0, 0, 1]])
    """
    if not all(0 < iou <= 1 for iou in ious):
        raise ConfigurationError(f"an IoU from which on a box matches lies in (0, 1], got {list(ious)}")
    # The level of a pixel is how many of the thresholds it stands above.
    grid = threshold_grid(check_grid(n_thresholds)).to(maps.device)
    levels = torch.bucketize(normalize(maps, normalization), grid, out_int32=True).cpu().numpy()
    hits = torch.zeros(len(ious), n_thresholds, dtype=torch.int64)
    wanted = torch.tensor(ious, dtype=torch.float64)[:, None]
    for level, true in zip(levels, boxes, strict=True):
        tree = component_tree(level, n_thresholds)
        if components == "all":
            overlaps = torch.from_numpy(tree.best(_overlaps(tree.boxes, true).numpy(), 0.0))
        else:
            overlaps = _overlaps(tree.largest_boxes(), true)
        hits += overlaps >= wanted
    return hits


def _overlaps(boxes: NDArray[np.int64], true: Tensor) -> Tensor:
    """(M,) float64: each box's IoU with the true box that it matches best."""
    return box_iou(torch.from_numpy(boxes).double(), true).amax(1)
