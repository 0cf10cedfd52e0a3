"""Baseline images, which stand for the absence of all features, and a random stream for each image."""

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

__all__ = ["Baseline", "Baselines", "baseline_images", "draw", "image_generators"]

Baseline = str | float | Tensor | NDArray[Any] | None
Baselines = Baseline | Sequence[Baseline]

_NAMES = "'zeros', 'mean', 'blur', 'uniform' or 'noise'"


def image_generators(trace: Trace, generator: torch.Generator | None = None) -> list[torch.Generator]:
    """Return a generator for each image, so that draws depend neither on chunks nor on how ranks share the images.

    Args:
        trace: The open Trace of the images.
        generator: On the CPU, draws the seeds; None: the seeds are the images' indices, the same in every call.

    Returns:
        One generator an image, on the CPU.
    """
    if generator is None:
        seeds = list(range(trace.first_index, trace.first_index + len(trace.images)))
    else:
        seeds = torch.randint(2**62, (len(trace.images),), generator=generator, device="cpu").tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(function: Callable[..., Tensor], size: Sequence[int], generators: list[torch.Generator]) -> Tensor:
    """Return the draws of ``torch.rand`` or ``torch.randn`` with each image's generator, (N, *size) on the CPU."""
    # The device is passed, as another one may be the default.
    return torch.stack([function(size, generator=generator, device="cpu") for generator in generators])


def baseline_images(trace: Trace, baselines: Baselines, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return the baselines of a Trace's images.

    Args:
        trace: The open Trace.
        baselines: One baseline, or several: None, a name, a number, or a tensor or array that expands to the images.
        generator: Draws random baselines, on the CPU.

    Returns:
        For each baseline (N, C, H, W), like the images.

    Raises:
        ConfigurationError: If there is no such baseline.
    """
    specs = list(baselines) if isinstance(baselines, (list, tuple)) else [baselines]
    if not specs:
        raise ConfigurationError("baselines takes at least one baseline, got an empty list")
    generators = image_generators(trace, generator)
    return [_baseline(trace, spec, generators) for spec in specs]


def _baseline(trace: Trace, spec: object, generators: list[torch.Generator]) -> Tensor:
    images = trace.images
    if isinstance(spec, (Tensor, np.ndarray)):
        return _expanded(trace, torch.as_tensor(spec))
    if is_number(spec):
        return torch.full_like(images, float(spec))
    if spec is None or spec == "zeros":
        return torch.zeros_like(images)
    if spec == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    if spec == "blur":
        return _blurred(images)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    if spec == "uniform":
        return low + (high - low) * draw(torch.rand, images.shape[1:], generators).to(images)
    if spec == "noise":
        return images + (high - low) * draw(torch.randn, images.shape[1:], generators).to(images)
    got = repr(spec) if isinstance(spec, str) else describe(spec)
    raise ConfigurationError(f"baselines takes None, {_NAMES}, a number, a tensor, or a list of these, got {got}")


def _expanded(trace: Trace, baseline: Tensor) -> Tensor:
    """Expand a tensor for one image, or take the Trace's part of a tensor for all images of the call."""
    images, first = trace.images, trace.first_index
    part = baseline
    if baseline.ndim == 4 and len(baseline) > 1:
        part = baseline[first : first + len(images)]
        if len(part) != len(images):
            raise ConfigurationError(
                f"a baseline for each image, or one for all, is expected; got {len(baseline)} for at least "
                f"{first + len(images)} images"
            )
    if not _expands(part.shape, images.shape):
        raise ConfigurationError(
            f"a baseline is a tensor that expands to the images {tuple(images.shape)}, got {describe(baseline)}"
        )
    return part.detach().to(images).expand_as(images)


def _expands(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of one shape expands to another."""
    return len(shape) <= len(target) and all(
        side in (1, target_side) for side, target_side in zip(reversed(shape), reversed(target), strict=False)
    )


def _blurred(images: Tensor) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    height, width = images.shape[-2:]
    kernel = [2 * (side // 5) + 1 for side in (width, height)]
    return gaussian_blur(images, kernel, [max(side / 10, 0.1) for side in (width, height)])
