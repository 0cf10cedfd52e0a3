"""Operations on maps: scaling to [0, 1] and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_interp.checks import check_choice, check_number
from lightning_interp.errors import ConfigurationError, describe

__all__ = ["NormalizeMode", "normalize_maps", "resize_maps"]

NormalizeMode = Literal["relu", "min_max", "max_abs"]


def normalize_maps(maps: Tensor, mode: NormalizeMode = "relu", *, percentile: float | None = None) -> Tensor:
    """Scale each map to [0, 1], independently of the others.

    Args:
        maps: (N, H, W), any real dtype; non-finite values become 0.
        mode: ``"relu"`` sets negative values to zero and divides by the maximum, ``"min_max"`` maps the minimum to 0
            and the maximum to 1, ``"max_abs"`` divides the absolute values by their maximum.
        percentile: In (0, 100]: divide by this percentile instead of the maximum and clip at 1, so that a single
            outlier does not darken the rest of a saliency map. The maximum is used where the percentile is 0.

    Returns:
        (N, H, W) float32 in [0, 1] on the maps' device; all zero, never NaN, for a map whose maximum would be zero.

    Raises:
        ConfigurationError: If the shape, the mode or the percentile is out of range.

    Example:
        >>> import torch
        >>> normalize_maps(torch.tensor([[[-1.0, 1.0, 4.0]]])).tolist()
        [[[0.0, 0.25, 1.0]]]
        >>> normalize_maps(torch.tensor([[[-1.0, 1.0, 4.0]]]), "min_max").tolist()
        [[[0.0, 0.4000000059604645, 1.0]]]
    """
    if maps.ndim != 3 or maps.shape[1:].numel() == 0 or maps.is_complex():
        raise ConfigurationError(f"maps takes a real tensor (N, H, W) with H, W > 0, got {describe(maps)}")
    check_choice("mode", mode, get_args(NormalizeMode))
    if percentile is not None:
        takes = "a number above 0, at most 100, or None"
        percentile = check_number("percentile", percentile, takes, lambda percent: 0 < percent <= 100)
    values = maps.detach().flatten(1)
    values = values if values.dtype == torch.float64 else values.float()
    is_finite = values.isfinite()
    values = values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    values = _divide(values, values.abs().amax(1, keepdim=True))  # differences of finite values may overflow
    if mode == "relu":
        values = values.clamp(min=0)
    elif mode == "max_abs":
        values = values.abs()
    else:
        lowest = values.masked_fill(~is_finite, torch.inf).amin(1, keepdim=True)
        values = (values - lowest).masked_fill(~is_finite, 0)
    highest = values.amax(1, keepdim=True)
    if percentile is not None:
        # Sorted, as torch.quantile accepts at most 16 million values.
        rank = ceil(percentile / 100 * values.shape[1])
        bound = values.sort(1).values[:, rank - 1 : rank]
        highest = torch.where(bound > 0, bound, highest)
    return _divide(values, highest).clamp(0, 1).float().view(maps.shape)


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps bilinearly, with pixels as areas (``align_corners=False``).

    Args:
        maps: (..., h, w), floating.
        size: (H, W).

    Returns:
        (..., H, W) float32; the maps themselves where they are float32 and of that size.

    Example:
        >>> import torch
        >>> resize_maps(torch.tensor([[[0.0, 1.0]]]), (1, 4)).tolist()
        [[[0.0, 0.25, 0.75, 1.0]]]
    """
    height, width = size
    if maps.shape[-2:] == (height, width):
        return maps.float()
    batched = maps.float().reshape(-1, 1, *maps.shape[-2:])
    resized = interpolate(batched, (height, width), mode="bilinear", align_corners=False)
    return resized.reshape(*maps.shape[:-2], height, width)


def _divide(values: Tensor, divisors: Tensor) -> Tensor:
    """Divide, where the divisor is not zero."""
    return values / torch.where(divisors > 0, divisors, 1)
