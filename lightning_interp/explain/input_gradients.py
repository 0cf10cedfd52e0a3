"""Gradients of the class score towards the pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_interp.checks import check_integer, check_number
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain._explainer import explainer
from lightning_interp.explain.baselines import Baselines, baseline_images, draw, streams
from lightning_interp.model.trace import Trace

__all__ = ["input_x_gradient", "integrated_gradients", "saliency", "smoothgrad", "vargrad"]

Channels = Literal["max_abs", "sum"] | None


@explainer(inputs=True)
def saliency(trace: Trace, *, channels: Channels = "max_abs") -> Tensor:
    r"""Saliency: how much each pixel would change the pre-softmax class score.

    .. math:: M(y, x) = \max_c \left| \frac{\partial s}{\partial I_c(y, x)} \right|

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None, which keeps (N, C, H, W).

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If ``channels`` is none of these.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
        >>> maps = saliency(model, torch.rand(5, 3, 4, 4), targets=1)
        >>> torch.equal(maps[0], model[1].weight[1].view(3, 4, 4).abs().amax(0))
        True

    Reference:
        Simonyan et al., Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency Maps,
        ICLR Workshop 2014.
    """
    check_channels(channels)
    return reduce_channels(trace.input_gradients(), channels)


@explainer(inputs=True)
def input_x_gradient(trace: Trace, *, channels: Channels = "sum") -> Tensor:
    r"""Input times gradient: how much each pixel's value adds to the class score, to first order.

    .. math:: M(y, x) = \sum_c I_c(y, x) \frac{\partial s}{\partial I_c(y, x)}

    For a model of rectifiers and linear layers without biases the maps sum to the score.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        channels: ``"sum"`` (signed), ``"max_abs"``, or None, which keeps (N, C, H, W).

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If ``channels`` is none of these.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2, bias=False)), torch.rand(5, 3, 4, 4)
        >>> maps = input_x_gradient(model, images, targets=1)
        >>> torch.allclose(maps.sum((1, 2)), model(images)[:, 1], atol=1e-6)
        True

    Reference:
        Shrikumar et al., Not Just a Black Box: Learning Important Features Through Propagating Activation Differences,
        2016.
    """
    check_channels(channels)
    return reduce_channels(trace.images * trace.input_gradients(), channels)


@explainer(inputs=False)
def smoothgrad(
    trace: Trace,
    *,
    n_samples: int = 50,
    noise_level: float = 0.15,
    channels: Channels = "max_abs",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""SmoothGrad: the saliency's gradient, averaged over noisy copies of each image.

    .. math:: M(y, x) = \max_c \left| \frac{1}{n} \sum_{i=1}^n \frac{\partial s(I + \epsilon_i)}{\partial I_c(y, x)}
        \right|, \qquad \epsilon_i \sim \mathcal{N}(0, \sigma^2)

    with :math:`\sigma` a share of each image's own range. The target is chosen on the clean image. On a CPU two copies
    of each image go through the model at once (one where there are more than four images), elsewhere up to 16.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        n_samples: How many noisy copies.
        noise_level: Standard deviation of the noise as a share of ``image.max() - image.min()``.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None, which keeps (N, C, H, W); gradients are averaged signed.
        generator: Where the noise comes from, on the CPU. None: the same noise at every call, so that pictures of
            successive epochs differ by the model alone. No global stream is drawn from.

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If an option is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> smoothgrad(model, torch.rand(2, 3, 8, 8), n_samples=4).shape
        torch.Size([2, 8, 8])

    Reference:
        Smilkov et al., SmoothGrad: removing noise by adding noise, 2017.
    """
    check_channels(channels)
    n_samples = check_integer("n_samples", n_samples)
    total = torch.zeros_like(trace.images, dtype=torch.float32)
    for gradients in _gradients(trace, _noisy(trace, n_samples, noise_level, generator)):
        total += gradients
    return reduce_channels(total / n_samples, channels)


@explainer(inputs=False)
def vargrad(
    trace: Trace,
    *,
    n_samples: int = 50,
    noise_level: float = 0.15,
    channels: Channels = "max_abs",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""VarGrad: how much the gradient varies over noisy copies of each image.

    .. math:: M(y, x) = \max_c \frac{1}{n} \sum_{i=1}^n \left( g_{ic}(y, x) - \bar g_c(y, x) \right)^2, \qquad
        g_i = \frac{\partial s(I + \epsilon_i)}{\partial I}, \quad \epsilon_i \sim \mathcal{N}(0, \sigma^2)

    with :math:`\sigma` a share of each image's own range. The target is chosen on the clean image. On a CPU two copies
    of each image go through the model at once (one where there are more than four images), elsewhere up to 16.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        n_samples: How many noisy copies.
        noise_level: Standard deviation of the noise as a share of ``image.max() - image.min()``.
        channels: ``"max_abs"``, ``"sum"``, or None, which keeps (N, C, H, W); nothing is below zero.
        generator: Where the noise comes from, on the CPU; None: the same noise at every call.

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If an option is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))  # its gradient is the same everywhere
        >>> vargrad(linear, torch.rand(2, 3, 4, 4), n_samples=4).abs().max()
        tensor(0.)

    Reference:
        Adebayo et al., Local Explanation Methods for Deep Neural Networks Lack Sensitivity to Parameter Values, ICLR
        Workshop 2018.
    """
    check_channels(channels)
    n_samples = check_integer("n_samples", n_samples)
    mean = torch.zeros_like(trace.images, dtype=torch.float32)
    squares = torch.zeros_like(mean)
    for count, gradients in enumerate(_gradients(trace, _noisy(trace, n_samples, noise_level, generator)), start=1):
        away = gradients - mean
        mean += away / count
        squares += away * (gradients - mean)
    return reduce_channels(squares / n_samples, channels)


@explainer(inputs=False)
def integrated_gradients(
    trace: Trace,
    *,
    n_steps: int = 50,
    method: Literal["gausslegendre", "midpoint", "trapezoid"] = "gausslegendre",
    baselines: Baselines = None,
    channels: Channels = "sum",
    return_error: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Integrated gradients: the share of each pixel in what raises the score from a baseline's to the image's.

    .. math:: M(y, x) = \sum_c (I_c - B_c)(y, x) \int_0^1 \frac{\partial s(B + \alpha (I - B))}{\partial I_c(y, x)}
        \, d\alpha, \qquad \sum_{y, x} M(y, x) = s(I) - s(B)

    The steps are taken two at a time on a CPU (one where there are more than four images), elsewhere up to 16, so that
    the memory does not grow with them.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        n_steps: How many points the integral is taken at.
        method: How: ``"gausslegendre"``, ``"midpoint"``, or ``"trapezoid"`` (at least 2 steps).
        baselines: What stands for the absence of everything: None or ``"zeros"``; a number; a tensor that expands to
            (N, C, H, W); ``"mean"``, each image's own channel means; ``"blur"``, the image blurred by a tenth of its
            side; ``"uniform"``, uniform noise within the image's range; ``"noise"``, the image and normal noise, as
            strong as its range is wide; or a list of these, over which the maps are averaged.
        channels: ``"sum"`` (signed), ``"max_abs"``, or None, which keeps (N, C, H, W).
        return_error: Also return by how much the maps miss completeness.
        generator: Where random baselines come from, on the CPU; None: the same at every call.

    Returns:
        (N, H, W) float32; with ``return_error=True`` also (N,), what all attributions sum to less the difference of
        the scores.

    Raises:
        ConfigurationError: If an option is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> maps, error = integrated_gradients(model, torch.rand(2, 3, 8, 8), baselines="blur", return_error=True)
        >>> (maps.shape, error.shape, bool((error.abs() < 0.01).all()))
        (torch.Size([2, 8, 8]), torch.Size([2]), True)

    Reference:
        Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017; baselines: Sturmfels et al.,
        Visualizing the Impact of Feature Attribution Baselines, Distill 2020.
    """
    check_channels(channels)
    points, weights = _quadrature(method, n_steps)
    images = trace.images
    attributions = torch.zeros_like(images, dtype=torch.float32)
    error = torch.zeros(len(images), device=images.device)
    chosen = baseline_images(trace, baselines, generator)
    for baseline in chosen:
        way = images - baseline
        total = torch.zeros_like(attributions)
        path = (baseline + point * way for point in points)
        for weight, gradients in zip(weights, _gradients(trace, path), strict=True):
            total.add_(gradients, alpha=weight)
        attributions += total * way / len(chosen)
        if return_error:
            with trace.on_images(baseline, input_gradients=False) as before:
                error -= (trace.scores - before.scores).detach().to(error) / len(chosen)
    maps = reduce_channels(attributions, channels)
    return (maps, error + attributions.sum((1, 2, 3))) if return_error else maps


def _quadrature(method: str, n_steps: int) -> tuple[list[float], list[float]]:
    """Where in [0, 1] an integrand is looked at, and the weight of each look."""
    n_steps = check_integer("n_steps", n_steps, minimum=2 if method == "trapezoid" else 1)
    if method == "gausslegendre":
        points, weights = np.polynomial.legendre.leggauss(n_steps)
        return ((points + 1) / 2).tolist(), (weights / 2).tolist()
    if method == "midpoint":
        return [(step + 0.5) / n_steps for step in range(n_steps)], [1 / n_steps] * n_steps
    if method == "trapezoid":
        inner = 1 / (n_steps - 1)
        return [step * inner for step in range(n_steps)], [inner / 2, *[inner] * (n_steps - 2), inner / 2]
    raise ConfigurationError(f"method takes 'gausslegendre', 'midpoint' or 'trapezoid', got {method!r}")


def _noisy(trace: Trace, n_samples: int, noise_level: float, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Noisy copies of all images, (N, C, H, W) each."""
    takes = "a share of the image's range, at least 0"
    noise_level = check_number("noise_level", noise_level, takes, lambda share: share >= 0)
    images = trace.images
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    sigma = noise_level * (high - low)
    own = streams(trace, generator)
    for _ in range(n_samples):
        yield images + sigma * draw(torch.randn, images.shape[1:], own).to(images)


# Changed images in one pass of the model, and copies of each: a pass over one image does not fill a machine, but fifty
# at once take over ten times the memory of two, and on a CPU no less time.
_ROWS_AND_COPIES = {"cpu": (8, 2)}
_MORE_ROWS_AND_COPIES = (64, 16)


def _gradients(trace: Trace, changed: Iterable[Tensor]) -> Iterator[Tensor]:
    """The gradient at each of many copies of the images, (N, C, H, W) each, in memory for a few of them."""
    n = len(trace.images)
    rows, most = _ROWS_AND_COPIES.get(trace.images.device.type, _MORE_ROWS_AND_COPIES)
    # A callable may score images by their place in the batch.
    copies = 1 if callable(trace.targets) else max(1, min(most, rows // n))
    copies_left = iter(changed)
    while some := list(islice(copies_left, copies)):
        with trace.on_images(torch.cat(some), torch.arange(n, device=trace.images.device).repeat(len(some))) as look:
            found = look.input_gradients().float()
        yield from found.chunk(len(some))


def check_channels(channels: object) -> None:
    """Raise where :func:`reduce_channels` does not know a way: asked before the gradients are computed."""
    if channels not in ("max_abs", "sum", None):
        raise ConfigurationError(f"channels takes 'max_abs', 'sum' or None, got {channels!r}")


def reduce_channels(gradients: Tensor, channels: Channels) -> Tensor:
    """(N, C, H, W) gradients to (N, H, W) maps."""
    if channels == "max_abs":
        return gradients.abs().amax(1)
    return gradients.sum(1) if channels == "sum" else gradients
