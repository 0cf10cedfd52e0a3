"""Gradients of the class score with respect to the images."""

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
from lightning_interp.explain.baselines import Baselines, baseline_images, draw, image_generators
from lightning_interp.model.chunks import rows_per_pass
from lightning_interp.model.trace import Trace

__all__ = ["input_x_gradient", "integrated_gradients", "saliency", "smoothgrad", "vargrad"]

Channels = Literal["max_abs", "sum"] | None


@explainer(family="gradients", inputs=True)
def saliency(trace: Trace, *, channels: Channels = "max_abs") -> Tensor:
    r"""Saliency: the absolute gradient of the pre-softmax class score with respect to each pixel.

    .. math:: M(y, x) = \max_c \left| \frac{\partial s}{\partial I_c(y, x)} \right|

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None for (N, C, H, W).

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If ``channels`` is unknown.

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


@explainer(family="gradients", inputs=True, signed=True)
def input_x_gradient(trace: Trace, *, channels: Channels = "sum") -> Tensor:
    r"""Input times gradient: the contribution of each pixel to the class score, to first order.

    .. math:: M(y, x) = \sum_c I_c(y, x) \frac{\partial s}{\partial I_c(y, x)}

    For a model of ReLUs and linear layers without biases the maps sum to the score.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        channels: ``"sum"`` (signed), ``"max_abs"``, or None for (N, C, H, W).

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If ``channels`` is unknown.

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


@explainer(family="gradients", perturbed=True)
def smoothgrad(
    trace: Trace,
    *,
    n_samples: int = 50,
    noise_level: float = 0.15,
    channels: Channels = "max_abs",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""SmoothGrad: the gradient of :func:`saliency`, averaged over noisy copies of each image.

    .. math:: M(y, x) = \max_c \left| \frac{1}{n} \sum_{i=1}^n \frac{\partial s(I + \epsilon_i)}{\partial I_c(y, x)}
        \right|, \qquad \epsilon_i \sim \mathcal{N}(0, \sigma^2)

    with :math:`\sigma` a share of each image's range. The predicted class is that of the clean image. On a CPU two
    copies of each image run in one pass (one where there are more than four images), on other devices up to 16.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        n_samples: Number of noisy copies.
        noise_level: Standard deviation of the noise as a share of ``image.max() - image.min()``.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None for (N, C, H, W); gradients are averaged signed.
        generator: Draws the noise, on the CPU. None: the same noise in every call, so that maps of successive epochs
            differ by the model alone. No global random stream is used.

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


@explainer(family="gradients", perturbed=True)
def vargrad(
    trace: Trace,
    *,
    n_samples: int = 50,
    noise_level: float = 0.15,
    channels: Channels = "max_abs",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""VarGrad: the variance of the gradient over noisy copies of each image.

    .. math:: M(y, x) = \max_c \frac{1}{n} \sum_{i=1}^n \left( g_{ic}(y, x) - \bar g_c(y, x) \right)^2, \qquad
        g_i = \frac{\partial s(I + \epsilon_i)}{\partial I}, \quad \epsilon_i \sim \mathcal{N}(0, \sigma^2)

    with :math:`\sigma` a share of each image's range. The predicted class is that of the clean image. On a CPU two
    copies of each image run in one pass (one where there are more than four images), on other devices up to 16.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        n_samples: Number of noisy copies.
        noise_level: Standard deviation of the noise as a share of ``image.max() - image.min()``.
        channels: ``"max_abs"``, ``"sum"``, or None for (N, C, H, W); variances are not negative.
        generator: Draws the noise, on the CPU; None: the same noise in every call.

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
    squares = torch.zeros_like(mean)  # Welford's sums, as a difference of large squares would cancel
    for count, gradients in enumerate(_gradients(trace, _noisy(trace, n_samples, noise_level, generator)), start=1):
        deviation = gradients - mean
        mean += deviation / count
        squares += deviation * (gradients - mean)
    return reduce_channels(squares / n_samples, channels)


@explainer(family="gradients", perturbed=True, signed=True)
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
    r"""Integrated gradients: the contribution of each pixel to the difference of the image's and a baseline's score.

    .. math:: M(y, x) = \sum_c (I_c - B_c)(y, x) \int_0^1 \frac{\partial s(B + \alpha (I - B))}{\partial I_c(y, x)}
        \, d\alpha, \qquad \sum_{y, x} M(y, x) = s(I) - s(B)

    Steps run two at a time on a CPU (one where there are more than four images), up to 16 on other devices, so that the
    memory does not grow with their number.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        n_steps: Number of points at which the integrand is evaluated.
        method: The quadrature: ``"gausslegendre"``, ``"midpoint"``, or ``"trapezoid"`` (at least 2 steps).
        baselines: Images without features: None or ``"zeros"``; a number; a tensor that expands to (N, C, H, W);
            ``"mean"``, each image's channel means; ``"blur"``, the image after a Gaussian blur of a tenth of its side;
            ``"uniform"``, uniform noise within the image's range; ``"noise"``, the image plus normal noise whose
            standard deviation is the image's range; or a list of these, over which the maps are averaged.
        channels: ``"sum"`` (signed), ``"max_abs"``, or None for (N, C, H, W).
        return_error: Also return the error of the completeness axiom.
        generator: Draws random baselines, on the CPU; None: the same in every call.

    Returns:
        (N, H, W) float32; with ``return_error=True`` also (N,), the sum of all attributions minus the difference of
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
    all_baselines = baseline_images(trace, baselines, generator)
    for baseline in all_baselines:
        difference = images - baseline
        integral = torch.zeros_like(attributions)
        path = (baseline + point * difference for point in points)
        for weight, gradients in zip(weights, _gradients(trace, path), strict=True):
            integral.add_(gradients, alpha=weight)
        attributions += integral * difference / len(all_baselines)
        if return_error:
            with trace.on_images(baseline, input_gradients=False) as baseline_trace:
                error -= (trace.scores - baseline_trace.scores).detach().to(error) / len(all_baselines)
    maps = reduce_channels(attributions, channels)
    return (maps, error + attributions.sum((1, 2, 3))) if return_error else maps


def _quadrature(method: str, n_steps: int) -> tuple[list[float], list[float]]:
    """Return the points in [0, 1] at which an integrand is evaluated, and their weights."""
    n_steps = check_integer("n_steps", n_steps, minimum=2 if method == "trapezoid" else 1)
    if method == "gausslegendre":
        points, weights = np.polynomial.legendre.leggauss(n_steps)
        return ((points + 1) / 2).tolist(), (weights / 2).tolist()
    if method == "midpoint":
        return [(step + 0.5) / n_steps for step in range(n_steps)], [1 / n_steps] * n_steps
    if method == "trapezoid":
        width = 1 / (n_steps - 1)
        return [step * width for step in range(n_steps)], [width / 2, *[width] * (n_steps - 2), width / 2]
    raise ConfigurationError(f"method takes 'gausslegendre', 'midpoint' or 'trapezoid', got {method!r}")


def _noisy(trace: Trace, n_samples: int, noise_level: float, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Yield noisy copies of all images, (N, C, H, W)."""
    takes = "a share of the image's range, at least 0"
    noise_level = check_number("noise_level", noise_level, takes, lambda share: share >= 0)
    images = trace.images
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    sigma = noise_level * (high - low)
    generators = image_generators(trace, generator)
    for _ in range(n_samples):
        yield images + sigma * draw(torch.randn, images.shape[1:], generators).to(images)


def _gradients(trace: Trace, perturbed: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the gradient at each of many copies of the images, (N, C, H, W), a few of which are in memory at once."""
    device, n = trace.images.device, len(trace.images)
    # One image does not keep a device busy, but fifty copies at once take over ten times the memory of two, and on a
    # CPU as much time.
    rows, max_copies = rows_per_pass(device, cpu=8, other=64), rows_per_pass(device, cpu=2, other=16)
    # A callable may score images by their index in the batch.
    n_copies = 1 if callable(trace.targets) else max(1, min(max_copies, rows // n))
    remaining = iter(perturbed)
    while copies := list(islice(remaining, n_copies)):
        rows_of_copies = torch.arange(n, device=device).repeat(len(copies))
        with trace.on_images(torch.cat(copies), rows_of_copies) as copies_trace:
            gradients = copies_trace.input_gradients().float()
        yield from gradients.chunk(len(copies))


def check_channels(channels: object) -> None:
    """Raise where :func:`reduce_channels` has no such reduction; called before the gradients are computed."""
    if channels not in ("max_abs", "sum", None):
        raise ConfigurationError(f"channels takes 'max_abs', 'sum' or None, got {channels!r}")


def reduce_channels(gradients: Tensor, channels: Channels) -> Tensor:
    """Reduce (N, C, H, W) gradients to (N, H, W) maps."""
    if channels == "max_abs":
        return gradients.abs().amax(1)
    return gradients.sum(1) if channels == "sum" else gradients
