"""Gradients of the class score towards the pixels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain._explainer import explainer
from lightning_interp.trace import Trace

__all__ = ["saliency", "smoothgrad"]

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
    return reduce_channels(trace.input_gradients(), channels)


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

    with :math:`\sigma` a share of each image's own range. The target is chosen on the clean image.

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
    if not isinstance(n_samples, int) or n_samples < 1:
        raise ConfigurationError(f"n_samples takes a positive integer, got {n_samples!r}")
    if not noise_level >= 0:
        raise ConfigurationError(f"noise_level takes a share of the image's range, at least 0, got {noise_level!r}")
    images = trace.images
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    sigma = noise_level * (high - low)
    # A stream for each image, so that neither chunks nor the ranks that share the images change the noise.
    if generator is None:
        seeds = torch.arange(trace.offset, trace.offset + len(images))
    else:
        seeds = torch.randint(2**62, (len(images),), generator=generator)
    streams = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    total = torch.zeros_like(images, dtype=torch.float32)
    for _ in range(n_samples):
        noise = torch.stack([torch.randn(images.shape[1:], generator=stream) for stream in streams])
        with trace.again(images + sigma * noise.to(images)) as noisy:
            total += noisy.input_gradients()
    return reduce_channels(total / n_samples, channels)


def reduce_channels(gradients: Tensor, channels: Channels) -> Tensor:
    """(N, C, H, W) gradients to (N, H, W) maps."""
    if channels == "max_abs":
        return gradients.abs().amax(1)
    if channels == "sum":
        return gradients.sum(1)
    if channels is None:
        return gradients
    raise ConfigurationError(f"channels takes 'max_abs', 'sum' or None, got {channels!r}")
