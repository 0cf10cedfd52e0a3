"""What stands for the absence of everything in an image, and the random streams of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_interp.checks import is_number
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.model.trace import Trace

__all__ = ["Baseline", "Baselines", "baseline_images", "draw", "streams"]

Baseline = str | float | Tensor | NDArray[Any] | None
Baselines = Baseline | Sequence[Baseline]

_NAMES = "'zeros', 'mean', 'blur', 'uniform' or 'noise'"


def streams(trace: Trace, generator: torch.Generator | None = None) -> list[torch.Generator]:
    """A random stream for each image, so that neither chunks nor the ranks that share the images change a draw.

    Args:
        trace: The look at the images.
        generator: Where their seeds come from, on the CPU; None: from the images' numbers, the same at every call.

    Returns:
        One generator an image, on the CPU.
    """
    if generator is None:
        seeds = list(range(trace.first_index, trace.first_index + len(trace.images)))
    else:
        seeds = torch.randint(2**62, (len(trace.images),), generator=generator, device="cpu").tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(function: Callable[..., Tensor], size: Sequence[int], own: list[torch.Generator]) -> Tensor:
    """What ``torch.rand`` or ``torch.randn`` draws for each image from its own stream, (N, *size) on the CPU."""
    # Said, as another device may be the default.
    return torch.stack([function(size, generator=stream, device="cpu") for stream in own])


def baseline_images(trace: Trace, asked: Baselines, generator: torch.Generator | None = None) -> list[Tensor]:
    """The baselines of a look's images.

    Args:
        trace: The look.
        asked: One baseline, or several: None, a name, a number, or a tensor or array that expands to the images.
        generator: Where random ones come from.

    Returns:
        (N, C, H, W) each, like the images.

    Raises:
        ConfigurationError: If there is no such baseline.
    """
    several = list(asked) if isinstance(asked, (list, tuple)) else [asked]
    if not several:
        raise ConfigurationError("baselines takes at least one baseline, got an empty list")
    own = streams(trace, generator)
    return [_baseline(trace, each, own) for each in several]


def _baseline(trace: Trace, asked: object, own: list[torch.Generator]) -> Tensor:
    images = trace.images
    if isinstance(asked, (Tensor, np.ndarray)):
        return _given(trace, torch.as_tensor(asked))
    if is_number(asked):
        return torch.full_like(images, float(asked))
    if asked is None or asked == "zeros":
        return torch.zeros_like(images)
    if asked == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    if asked == "blur":
        return _blurred(images)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    if asked == "uniform":
        return low + (high - low) * draw(torch.rand, images.shape[1:], own).to(images)
    if asked == "noise":
        return images + (high - low) * draw(torch.randn, images.shape[1:], own).to(images)
    came = repr(asked) if isinstance(asked, str) else describe(asked)
    raise ConfigurationError(f"baselines takes None, {_NAMES}, a number, a tensor, or a list of these, got {came}")


def _given(trace: Trace, baseline: Tensor) -> Tensor:
    """A tensor that was given for one image, or for all that the look's were cut from."""
    images, own = trace.images, baseline
    if baseline.ndim == 4 and len(baseline) > 1:
        own = baseline[trace.first_index : trace.first_index + len(images)]
        if len(own) != len(images):
            raise ConfigurationError(
                f"a baseline for each image, or one for all, is expected; got {len(baseline)} for at least "
                f"{trace.first_index + len(images)} images"
            )
    try:
        return own.detach().to(images).expand_as(images)
    except RuntimeError:
        raise ConfigurationError(
            f"a baseline is a tensor that expands to the images {tuple(images.shape)}, got {describe(baseline)}"
        ) from None


def _blurred(images: Tensor) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    height, width = images.shape[-2:]
    kernel = [2 * (side // 5) + 1 for side in (width, height)]
    return gaussian_blur(images, kernel, [max(side / 10, 0.1) for side in (width, height)])
