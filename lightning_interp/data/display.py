"""Conversion of model inputs to displayable pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["is_channelwise_affine", "to_pictures", "white_level"]


def white_level(images: Tensor) -> float | None:
    """Return the value displayed as white: 1 for values in [0, 1], 255 for integers in [0, 255], otherwise None."""
    displayed = images[:, :3]
    values = displayed[displayed.isfinite()]
    if values.numel() == 0:
        return 1.0
    low, high = values.aminmax()
    if low < 0 or high > 255:
        return None
    if high <= 1:
        return 1.0
    return 255.0 if bool((values == values.round()).all()) else None


def to_pictures(
    images: Tensor, white: float | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """Convert images (N, C, H, W) to pictures (N, H, W, 3) uint8, see ``Probe.to_display``."""
    values = images[:, :3].to(torch.float32)
    is_finite = values.isfinite()
    if mean is not None and std is not None:
        scale, shift = (torch.tensor(numbers[:3], device="cpu").reshape(-1, 1, 1) for numbers in (std, mean))
        values = (values * scale + shift) / (255 if max(mean) > 1 else 1)
    elif white is not None:
        values = values / white
    else:
        low = values.where(is_finite, math.inf).amin((1, 2, 3), keepdim=True)
        high = values.where(is_finite, -math.inf).amax((1, 2, 3), keepdim=True)
        values = (values - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    values = values.where(is_finite, 0).clamp(0, 1)
    if values.shape[1] < 3:
        values = values.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return (values * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def is_channelwise_affine(before: Tensor, after: Tensor) -> bool:
    """Whether each channel was only scaled and shifted, so that every pixel kept its position.

    A flip or a crop on the device keeps the size too, but maps would then be drawn over the wrong pixels.
    """
    if before.shape[1] not in (1, after.shape[1]):
        return False
    first, second = (images.to(torch.float64).flatten(2).nan_to_num(0, 0, 0) for images in (before, after))
    first, second = (values - values.mean(2, keepdim=True) for values in (first, second))
    covariance, variance_before, variance_after = (
        (a * b).sum(2) for a, b in ((first, second), (first, first), (second, second))
    )
    # In half precision correlations are a little below 1; a constant channel must have stayed constant.
    is_correlated = covariance.square() >= 0.99 * variance_before * variance_after - 1e-12
    return bool(is_correlated.all() & ((variance_before > 1e-12) | (variance_after <= 1e-12)).all())
