"""Numbers as colours: colour maps, normalised maps, heatmaps over photographs."""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache
from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_interp.errors import ConfigurationError
from lightning_interp.render.canvas import check_images

__all__ = ["NormalizeMode", "check_colormap", "color_table", "colorize", "normalize_maps", "overlay"]

NormalizeMode = Literal["relu", "min_max", "max_abs"]


def check_colormap(name: str) -> None:
    """Refuse a name that matplotlib has no colour map for.

    Args:
        name: As in ``matplotlib.colormaps``, such as ``"jet"`` or ``"viridis"``.

    Raises:
        ConfigurationError: If there is none of that name; near matches are named.

    Example:
        >>> check_colormap("virdis")
        Traceback (most recent call last):
        ...
        lightning_interp.errors.ConfigurationError: there is no colour map 'virdis'; did you mean 'viridis'...
    """
    from matplotlib import colormaps

    if isinstance(name, str) and name in colormaps:
        return
    near = get_close_matches(str(name), list(colormaps), n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ConfigurationError(
        f"there is no colour map {name!r}; {hint}A name in matplotlib.colormaps is expected, such as 'jet', "
        "'viridis' or 'gray'"
    )


@lru_cache(maxsize=32)
def color_table(cmap: str) -> Tensor:
    """Return the 256 colours of a colour map from low to high: (256, 3) uint8, shared, not to be changed."""
    import numpy as np
    from matplotlib import colormaps

    check_colormap(cmap)
    return torch.from_numpy(np.array(colormaps[cmap](np.linspace(0.0, 1.0, 256), bytes=True))[:, :3].copy())


def colorize(values: Tensor, cmap: str = "jet") -> Tensor:
    """Colour every value as matplotlib does.

    Args:
        values: (..., H, W) in [0, 1], any real dtype and device. Values outside are clamped; those that are not
            finite count as 0.
        cmap: A name in ``matplotlib.colormaps``.

    Returns:
        (..., H, W, 3) uint8 on the CPU.

    Raises:
        ValueError: If ``values`` has fewer than two dimensions.
        ConfigurationError: If the colour map is unknown.

    Example:
        >>> import torch
        >>> colorize(torch.tensor([[0.0, 1.0]]), "gray").tolist()
        [[[0, 0, 0], [255, 255, 255]]]
    """
    if values.ndim < 2:
        raise ValueError(f"values must be (..., H, W), got {tuple(values.shape)}; add a dimension with values[None]")
    return color_table(cmap).index_select(0, _color_indices(values).flatten()).view(*values.shape, 3)


def overlay(images: Tensor, heat: Tensor, cmap: str = "jet", alpha: float = 0.5) -> Tensor:
    """Blend coloured maps into images: ``(1 - alpha) * image + alpha * colour``.

    Args:
        images: (N, H, W, 3) uint8.
        heat: (N, h, w) in [0, 1]; resized bilinearly to the images.
        cmap: A name in ``matplotlib.colormaps``.
        alpha: The weight of the colour, in [0, 1].

    Returns:
        (N, H, W, 3) uint8 on the CPU.

    Raises:
        ValueError: If the shapes of images and heat do not match, or ``alpha`` is outside [0, 1].
        ConfigurationError: If the colour map is unknown.

    Example:
        >>> import torch
        >>> overlay(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.ones(1, 1, 1), "gray", 0.2).tolist()
        [[[[51, 51, 51]]]]
    """
    check_images(images, "images")
    if heat.ndim != 3 or len(heat) != len(images) or heat.numel() == 0:
        raise ValueError(
            f"heat must be (N, h, w), one map for each of the {len(images)} images, got {tuple(heat.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    values = _finite(heat.detach().cpu().float()).clamp(0, 1)
    height, width = images.shape[1:3]
    if values.shape[1:] != (height, width):
        values = interpolate(values[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]
    weighted = color_table(cmap).float() * float(alpha)
    blended = torch.empty(images.shape, dtype=torch.uint8)
    for image, indices, target in zip(images.detach().cpu(), _color_indices(values), blended, strict=True):
        colors = weighted.index_select(0, indices.flatten()).view(image.shape)  # of one image: that stays in the cache
        target.copy_(colors.add_(image, alpha=1 - float(alpha)).round_().clamp_(0, 255))
    return blended


def _color_indices(values: Tensor) -> Tensor:
    """Return the positions of values in a table of 256 colours."""
    return _finite(values.detach().cpu().float()).mul_(256).clamp_(0, 255).int()


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def normalize_maps(maps: Tensor, mode: NormalizeMode = "relu", *, percentile: float | None = None) -> Tensor:
    """Scale each image's map to [0, 1] by itself.

    Args:
        maps: (N, H, W), any real dtype; non-finite values become 0.
        mode: ``"relu"`` drops what is negative and divides by the maximum, ``"min_max"`` takes the minimum
            to 0 and the maximum to 1, ``"max_abs"`` divides the absolute value by its maximum.
        percentile: In (0, 100]: divide by this percentile instead of the maximum and cut at 1, so that one
            hot pixel doesn't blacken the rest of a saliency map. The maximum is taken where it is 0.

    Returns:
        (N, H, W) float32 in [0, 1] on the maps' device. A map without any contrast is all zero, never NaN.

    Raises:
        ValueError: If the shape, the mode or the percentile is none of these.

    Example:
        >>> import torch
        >>> normalize_maps(torch.tensor([[[-1.0, 1.0, 4.0]]])).tolist()
        [[[0.0, 0.25, 1.0]]]
    """
    if maps.ndim != 3 or maps.shape[1:].numel() == 0 or maps.is_complex():
        raise ValueError(f"maps must be real (N, H, W) with H, W > 0, got {maps.dtype} {tuple(maps.shape)}")
    if mode not in get_args(NormalizeMode):
        raise ValueError(f"mode must be 'relu', 'min_max' or 'max_abs', got {mode!r}")
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100] or None, got {percentile}; 99 is usual")
    flat = maps.detach().flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    is_finite = flat.isfinite()
    flat = _finite(flat)
    flat = _divide(flat, flat.abs().amax(1, keepdim=True))  # so that no difference below overflows
    if mode == "relu":
        flat = flat.clamp(min=0)
    elif mode == "max_abs":
        flat = flat.abs()
    else:
        lowest = flat.masked_fill(~is_finite, torch.inf).amin(1, keepdim=True)
        flat = (flat - lowest).masked_fill(~is_finite, 0)
    highest = flat.amax(1, keepdim=True)
    if percentile is not None:
        # Sorted, as torch.quantile takes no more than 16 million values.
        rank = ceil(percentile / 100 * flat.shape[1])
        cut = flat.sort(1).values[:, rank - 1 : rank]
        highest = torch.where(cut > 0, cut, highest)
    return _divide(flat, highest).clamp(0, 1).float().view(maps.shape)


def _divide(values: Tensor, by: Tensor) -> Tensor:
    return values / torch.where(by > 0, by, torch.ones_like(by))
