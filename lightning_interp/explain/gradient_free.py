"""Class activation maps without gradients: principal components, masked images, ablated channels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_interp.checks import check_integer
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain._explainer import explainer
from lightning_interp.explain.maps import resize_maps
from lightning_interp.model.chunks import rows_per_pass
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.trace import Trace

__all__ = ["ablationcam", "eigencam", "scorecam"]

_MIN_COSINE = 1e-3  # below it, the sign of a component is decided by rounding errors
_MAX_ELEMENTS = 2**24  # of the ablated activations in one pass: 64 MiB


@explainer(family="class_activation", layer="activations", signed=True)
def eigencam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""EigenCAM: the first principal component of the activations; the same for every target.

    .. math:: M(y, x) = \sum_c v_c \left(A_c(y, x) - \bar{A}_c\right)

    with :math:`v` the first right singular vector of the positions-by-channels matrix of centred activations, as in
    pytorch-grad-cam (the paper does not centre). The sign of a component is arbitrary: it is chosen so that large
    activations are positive, :math:`\sum_c v_c \ge 0`, or, where the channels' sum is constant, as after a layer norm,
    so that outliers are, :math:`\sum_{y, x} M(y, x)^3 \ge 0`.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call. ``targets`` have no effect.
        layer: Any layer that gives (N, C, h, w) or tokens; None locates the last spatial one.

    Returns:
        (N, H, W) float32, signed, resized to the images; (N, h, w) with ``upsample=False``. NaN for an image whose
        activations are not finite.

    Raises:
        ConfigurationError: If the model has no spatial layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> maps = eigencam(model, torch.rand(4, 3, 8, 8), upsample=False)
        >>> maps.shape, torch.allclose(maps.mean((1, 2)), torch.zeros(4), atol=1e-5)
        (torch.Size([4, 6, 6]), True)

    Reference:
        Muhammad and Yeasin, Eigen-CAM: Class Activation Map using Principal Components, IJCNN 2020.
    """
    activations = trace.activations(layer)
    # In double precision, as squaring the matrix halves the number of digits; an "mps" device has no doubles.
    values = (activations.cpu() if activations.device.type == "mps" else activations).flatten(2).double()
    is_finite = values.isfinite().all((1, 2))
    centred = values.where(is_finite[:, None, None], 0)  # eigh fails for the whole batch on one non-finite matrix
    centred = centred - centred.mean(2, keepdim=True)
    if centred.shape[1] < centred.shape[2]:
        component = torch.linalg.eigh(centred @ centred.mT).eigenvectors[..., -1]
        maps = torch.einsum("nc,ncp->np", component, centred)
    else:
        variances, components = torch.linalg.eigh(centred.mT @ centred)
        maps = components[..., -1] * variances[:, -1:].clamp(min=0).sqrt()
    component_sum = torch.einsum("np,ncp->n", maps, centred) / maps.square().sum(1)
    is_clear = component_sum.abs() > _MIN_COSINE * centred.shape[1] ** 0.5  # relative to the largest possible sum
    sign = torch.where(torch.where(is_clear, component_sum, maps.pow(3).sum(1)) < 0, -1, 1)
    maps = (maps * sign[:, None]).where(is_finite[:, None], torch.nan)
    return maps.view(len(maps), *activations.shape[2:])


@explainer(family="class_activation", layer="activations", perturbed=True)
def scorecam(trace: Trace, layer: HookPoint, *, n_channels: int | None = None, chunk_size: int | None = None) -> Tensor:
    r"""Score-CAM: activations weighted by the class score of the image masked with them.

    .. math:: M(y, x) = \max\!\left(\sum_c w_c A_c(y, x), 0\right), \qquad w = \operatorname{softmax}_c\, s(I \odot H_c)

    with :math:`H_c` the channel's activations resized bilinearly to the image and scaled to [0, 1]. The paper's
    baseline score cancels in the softmax, which pytorch-grad-cam uses, too. A constant channel masks the whole image;
    all constant channels share one pass. The ReLU is part of the definition.

    Runs one forward pass for each channel; ``n_channels`` limits their number.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call. A callable given as ``targets`` must
            score each row of an output independently.
        layer: Any layer that gives (N, C, h, w) or tokens; None locates the last spatial one.
        n_channels: Number of channels of each image that are used, those of the largest variance (Faster Score-CAM);
            None: all.
        chunk_size: Number of masked images in one pass; None: 8 on a CPU, 64 on other devices.

    Returns:
        (N, H, W) float32, not negative, resized to the images; (N, h, w) with ``upsample=False``.

    Raises:
        ConfigurationError: If the model has no spatial layer, or an option is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> maps = scorecam(model, torch.rand(2, 3, 8, 8), targets=1, n_channels=4)
        >>> maps.shape, bool((maps >= 0).all())
        (torch.Size([2, 8, 8]), True)

    Reference:
        Wang et al., Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks, CVPR Workshops
        2020.
    """
    default = rows_per_pass(trace.images.device, cpu=8, other=64)
    chunk_size = default if chunk_size is None else check_integer("chunk_size", chunk_size)
    if n_channels is not None:
        n_channels = check_integer("n_channels", n_channels)
    activations = trace.activations(layer).float()
    scores = [_masked_scores(trace, channels, row, n_channels, chunk_size) for row, channels in enumerate(activations)]
    return torch.einsum("nc,nchw->nhw", torch.stack(scores).softmax(1), activations).relu()


def _masked_scores(trace: Trace, activations: Tensor, row: int, n_channels: int | None, chunk_size: int) -> Tensor:
    """Return (C,) the score of one image under each channel's mask; minus infinity for channels that are not used."""
    image = trace.images[row].detach()
    flat = activations.flatten(1)
    order = flat.var(1, correction=0).argsort(descending=True, stable=True)[:n_channels]
    is_varying = flat.amax(1)[order] > flat.amin(1)[order]
    scores = torch.full((len(activations),), -torch.inf, device=activations.device)
    if not is_varying.all():
        scores[order[~is_varying]] = _scores(trace, torch.zeros_like(image)[None], row)
    for channels in _split(order[is_varying], chunk_size):
        masks = resize_maps(activations[channels], image.shape[1:])[:, None]
        masks = masks - masks.amin((2, 3), keepdim=True)
        masks = masks / masks.amax((2, 3), keepdim=True).clamp(min=torch.finfo(masks.dtype).tiny)
        scores[channels] = _scores(trace, image * masks.to(image), row)
    return scores


def _scores(trace: Trace, images: Tensor, row: int) -> Tensor:
    """Return (M,) the scores of masked copies of one image."""
    if images.device.type == "cpu" and len(images) > 1:
        try:
            # Convolutions on a CPU are faster in this memory format, by a fifth.
            return _scores_as_laid_out(trace, images.contiguous(memory_format=torch.channels_last), row)
        except RuntimeError as error:
            # Tensor.view and some operators require contiguous tensors; any other error is the model's own.
            if "contiguous" not in str(error):
                raise
    return _scores_as_laid_out(trace, images, row)


def _scores_as_laid_out(trace: Trace, images: Tensor, row: int) -> Tensor:
    rows = torch.full((len(images),), row, device=images.device)
    with trace.on_images(images, rows, input_gradients=False) as masked:
        return masked.scores.detach()


@explainer(family="class_activation", layer="activations", perturbed=True, signed=True)
def ablationcam(trace: Trace, layer: HookPoint, *, chunk_size: int | None = None) -> Tensor:
    r"""Ablation-CAM: activations weighted by the relative drop of the class score when their channel is zero.

    .. math:: M(y, x) = \sum_c w_c A_c(y, x), \qquad w_c = \frac{s - s_{A_c = 0}}{s}

    Because of the division, weights are unreliable for scores near zero, have the opposite sign for negative scores,
    and are set to zero for a score of zero. In a layer of tokens the channel is ablated in all of them, including the
    class token. The preceding layers run once for each chunk of channels.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call. A callable given as ``targets`` must
            score each row of an output independently.
        layer: Any layer that gives (N, C, h, w) or tokens; None locates the last spatial one.
        chunk_size: Number of channels ablated in one pass; None: as many as keep the layer's copies below 64 MiB.

    Returns:
        (N, H, W) float32, signed, resized to the images; (N, h, w) with ``upsample=False``.

    Raises:
        ConfigurationError: If the model has no spatial layer, or an option is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> ablationcam(model, torch.rand(2, 3, 8, 8), targets=1).shape
        torch.Size([2, 8, 8])

    Reference:
        Desai and Ramaswamy, Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free
        Localization, WACV 2020.
    """
    activations = trace.activations(layer).float()
    default = max(1, _MAX_ELEMENTS // activations[0].numel())
    chunk_size = default if chunk_size is None else check_integer("chunk_size", chunk_size)
    scores = trace.scores.detach()
    drops = [
        _score_drops(trace, layer, row, activations.shape[1], scores[row], chunk_size) for row in range(len(scores))
    ]
    weights = torch.where(scores[:, None] == 0, 0, torch.stack(drops) / scores[:, None])
    return torch.einsum("nc,nchw->nhw", weights.to(activations), activations)


def _score_drops(trace: Trace, layer: HookPoint, row: int, count: int, score: Tensor, chunk_size: int) -> Tensor:
    """Return (C,) the drop of one image's score when each channel is zero."""
    raw = trace.raw_activations(layer)
    grid = trace.activations(layer)
    # A reshape function may return the same values in another memory format; the values of a view are not compared.
    same_memory = (raw.data_ptr(), raw.stride()) == (grid.data_ptr(), grid.stride())
    channels_first = raw.shape == grid.shape and (same_memory or torch.equal(raw, grid))
    activations = raw[row] if channels_first else raw[row].movedim(-1, 0)  # (C, ...)
    if len(activations) != count:
        raise ConfigurationError(
            f"ablationcam finds no channels to ablate in the output of {layer.name!r}, {tuple(raw.shape)}: expected "
            f"{count} of them in its second or last dimension; choose another layer or reshape="
        )
    drops = torch.zeros(count, device=score.device)
    nonzero = activations.flatten(1).any(1).nonzero()[:, 0]  # ablating the other channels changes nothing
    for channels in _split(nonzero, chunk_size):
        ablated = activations.expand(len(channels), *activations.shape).clone()
        ablated[torch.arange(len(channels), device=channels.device), channels] = 0
        patches = ablated if channels_first else ablated.movedim(1, -1)
        drops[channels] = score - trace.scores_with_patched(layer, patches, row)
    return drops


def _split(channels: Tensor, size: int) -> tuple[Tensor, ...]:
    """Split channel indices into chunks; no channels give no chunk, where torch.split gives an empty one."""
    return torch.split(channels, size) if len(channels) else ()
