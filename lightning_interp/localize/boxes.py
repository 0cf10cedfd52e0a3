"""Masks and bounding boxes of the high values of maps."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label  # type: ignore[attr-defined]
from torch import Tensor

from lightning_interp.checks import check_choice, check_number
from lightning_interp.explain.maps import NormalizeMode, normalize_maps
from lightning_interp.localize.ground_truth import check_maps

__all__ = ["DEFAULT_THRESHOLD", "Normalization", "check_normalization", "maps_to_boxes", "maps_to_masks", "normalize"]

Normalization = Literal["relu_max", "min_max"]

DEFAULT_THRESHOLD = 0.2
_MODES: dict[Normalization, NormalizeMode] = {"relu_max": "relu", "min_max": "min_max"}


def check_normalization(normalization: Normalization) -> Normalization:
    """Return the name of a normalisation; otherwise raise a :class:`ConfigurationError`.

    Example:
        >>> check_normalization("min_max")
        'min_max'
    """
    return check_choice("normalization", normalization, tuple(_MODES))


def normalize(maps: Tensor, normalization: Normalization = "relu_max") -> Tensor:
    """Scale each map to [0, 1].

    Args:
        maps: (N, H, W), floating.
        normalization: ``"relu_max"``: negative values become 0, then division by the map's maximum.
            ``"min_max"``: from the map's minimum to its maximum.

    Returns:
        (N, H, W) float32; 0 everywhere for a map without contrast: without a positive value (for ``"min_max"``:
        without two different ones), with NaN, or with an infinite maximum (for ``"min_max"``: any infinity).

    Raises:
        ConfigurationError: If there are no maps, or no such normalisation.

    Example:
        >>> import torch
        >>> normalize(torch.tensor([[[-1.0, 2.0, 4.0]], [[-1.0, -2.0, -4.0]]])).tolist()
        [[[0.0, 0.5, 1.0]], [[0.0, 0.0, 0.0]]]
    """
    values = check_maps(maps)
    mode = _MODES[check_normalization(normalization)]
    if mode == "relu":
        values = values.clamp(min=0)  # first, so that -inf counts as any negative value
    is_finite = values.isfinite().all(2).all(1)
    return normalize_maps(values, mode) * is_finite[:, None, None]


def maps_to_masks(maps: Tensor, threshold: float, *, normalization: Normalization = "relu_max") -> Tensor:
    """Mark the pixels above a fraction of each map's maximum.

    Args:
        maps: (N, H, W), floating: any maps, saliency too.
        threshold: In [0, 1), a fraction of each map's maximum.
        normalization: See ``normalize``. ReLU and division by the maximum localises better than min-max in the
            published comparisons.

    Returns:
        (N, H, W) bool on the maps' device; False everywhere for a map without contrast.

    Raises:
        ConfigurationError: If there are no maps, or the threshold is outside [0, 1).

    Example:
        >>> import torch
        >>> maps_to_masks(torch.tensor([[[-1.0, 1.0, 2.0, 4.0]]]), 0.25).tolist()
        [[[False, False, True, True]]]

    Reference:
        Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020.
    """
    takes = "a fraction of each map's maximum, 0 <= threshold < 1"
    threshold = check_number("threshold", threshold, takes, lambda fraction: 0 <= fraction < 1)
    values = normalize(maps, normalization)
    return values > torch.tensor(threshold, dtype=torch.float32, device=values.device)


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
    threshold: float = DEFAULT_THRESHOLD,
    components: Literal["largest", "all"] = "largest",
    *,
    normalization: Normalization = "relu_max",
) -> Tensor | list[Tensor]:
    """Draw boxes around the connected components above a fraction of the maps' maximum.

    The largest component is the one of the greatest area within the polygon through its outer pixels' centres, as
    OpenCV measures it, less its holes: four neighbouring pixels count 1, three of them a half. Of components of equal
    area (lines have none), it is the one with most pixels, then the first in reading order. Pixels that touch at a
    corner are connected.

    The usual threshold of 20 % is often a poor choice: fit it with ``fit_threshold``.

    Args:
        maps: (N, H, W), floating: any maps, saliency too.
        threshold: In [0, 1), a fraction of each map's maximum.
        components: ``"largest"`` for one box a map, ``"all"`` for one a component, the largest first.
        normalization: See ``normalize``.

    Returns:
        (N, 4) float32 on the maps' device: x1, y1, x2, y2 in pixels, maxima exclusive. A map without contrast
        gets the box 0, 0, 0, 0, which overlaps no other box and so counts as a miss. With ``components="all"`` a list
        of N tensors (M, 4), where M may be 0.

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
    check_choice("components", components, ("largest", "all"))
    masks = maps_to_masks(maps, threshold, normalization=normalization)
    boxes = [torch.from_numpy(_component_boxes(mask)).to(maps.device) for mask in masks.cpu().numpy()]
    if components == "all":
        return boxes
    largest = torch.zeros(len(boxes), 4, device=maps.device, dtype=torch.float32)
    for row, image_boxes in zip(largest, boxes, strict=True):
        row.copy_(image_boxes[:1].sum(0))  # 0, 0, 0, 0 without a box
    return largest


def _component_boxes(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Bounding boxes (M, 4) of a mask's components, the largest first."""
    labels, count = label(mask, structure=np.ones((3, 3)))
    corners = [labels[:-1, :-1], labels[:-1, 1:], labels[1:, :-1], labels[1:, 1:]]
    # Pixels of a square of four all touch, so those within the mask belong to one component.
    half_squares = np.maximum(sum((corner > 0).astype(int) for corner in corners) - 2, 0)
    components = np.maximum.reduce(corners)
    areas = np.bincount(components.ravel(), half_squares.ravel(), count + 1)[1:]
    pixels = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in find_objects(labels)]
    order = np.lexsort((-pixels, -areas))
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)[order]
