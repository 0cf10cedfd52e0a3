"""Pixel average precision (PxAP)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_interp.localize.boxes import Normalization, normalize
from lightning_interp.localize.ground_truth import check_masks
from lightning_interp.localize.thresholds import threshold_grid

__all__ = ["pixel_average_precision", "pixel_average_precision_compute", "pixel_average_precision_update"]


def pixel_average_precision_update(
    maps: Tensor, masks: Tensor, ignore: Tensor | None, n_thresholds: int, normalization: Normalization
) -> Tensor:
    """Count background and object pixels in each bin of the normalised maps.

    Args:
        maps: As for ``pixel_average_precision``.
        masks: As for ``pixel_average_precision``.
        ignore: As for ``pixel_average_precision``.
        n_thresholds: As for ``pixel_average_precision``.
        normalization: As for ``pixel_average_precision``.

    Returns:
        (2, n_thresholds + 1) int64 on the maps' device: background, objects. Bin k is [k / n, (k + 1) / n); the last
        holds 1 alone.

    Example:
        >>> masks = torch.tensor([[[True, False, True, False]]])
        >>> pixel_average_precision_update(torch.tensor([[[0.9, 0.2, 1.0, 0.1]]]), masks, None, 2, "relu_max")
        tensor([[2, 0, 0],
                [0, 1, 1]])
    """
    values = normalize(maps, normalization)
    is_object = check_masks(masks, maps)
    upper = threshold_grid(n_thresholds).to(maps.device)[1:]
    edges = torch.cat([upper, upper.new_ones(1)])
    bins = torch.bucketize(values, edges, right=True) + is_object * (n_thresholds + 1)
    if ignore is not None:
        bins = bins[~check_masks(ignore, maps, "ignore")]
    return torch.bincount(bins.flatten(), minlength=2 * (n_thresholds + 1)).reshape(2, -1)


def pixel_average_precision_compute(counts: Tensor) -> Tensor:
    """Sum precision times the step in recall, from the highest values down.

    Args:
        counts: (2, T) integers, as ``pixel_average_precision_update`` returns them.

    Returns:
        () float32; NaN without object pixels.

    Example:
        >>> pixel_average_precision_compute(torch.tensor([[2, 1, 0], [0, 1, 1]]))
        tensor(0.8333)
    """
    # In double precision because there are many pixels, which not every device has.
    background, objects = counts.cpu().double().flip(1)
    true_positives = objects.cumsum(0)
    precision = true_positives / (true_positives + background.cumsum(0)).clamp(min=1)
    area: Tensor = (precision * objects).sum() / true_positives[-1]
    return area.float().to(counts.device)


def pixel_average_precision(
    maps: Tensor,
    masks: Tensor,
    ignore: Tensor | None = None,
    *,
    n_thresholds: int = 1000,
    normalization: Normalization = "relu_max",
) -> Tensor:
    """Compute the area under the precision-recall curve of all images' pixels together (PxAP).

    Args:
        maps: (N, H, W), floating.
        masks: (N, H, W) bool, the objects' pixels. Images of background alone are allowed.
        ignore: (N, H, W) bool, pixels that are left out, whether object or background.
        n_thresholds: Number of bins into which the normalised maps are divided.
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
    counts = pixel_average_precision_update(maps, masks, ignore, n_thresholds, normalization)
    return pixel_average_precision_compute(counts)
