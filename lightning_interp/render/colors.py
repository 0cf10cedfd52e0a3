"""Numbers as colours: colour maps, normalised maps, heatmaps over photographs."""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_interp.errors import ConfigurationError
from lightning_interp.render.canvas import check_images

__all__ = ["check_colormap", "color_table", "colorize", "overlay"]


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
