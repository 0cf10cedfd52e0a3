"""Class activation maps without gradients: by principal component, by masking the image, by ablating channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_interp.checks import check_integer
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain._explainer import explainer
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.trace import Trace

__all__ = ["ablationcam", "eigencam", "scorecam"]

_LEAST_STRENGTH = 1e-3  # below it, rounding decides
_ROWS = {"cpu": 8}  # masked images in one pass of the model
_MORE_ROWS = 64
_MOST_ELEMENTS = 2**24  # of activations that are ablated in one pass: 64 MiB


@explainer(layer="activations")
def eigencam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""EigenCAM: the first principal component of the activations; the same for every target.

    .. math:: M(y, x) = \sum_c v_c \left(A_c(y, x) - \bar{A}_c\right)

    with :math:`v` the first right singular vector of the places-by-channels matrix of centred activations, as in
    pytorch-grad-cam (the paper does not centre). A component has no sign of its own: the one is taken under which
    strong activations are positive, :math:`\sum_c v_c \ge 0`, or, where activations are equally strong everywhere, as
    those of a layer norm are, under which what stands out is, :math:`\sum_{y, x} M(y, x)^3 \ge 0`.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes. ``targets`` change nothing.
        layer: Any layer that gives (N, C, h, w) or tokens; None finds the last spatial one.

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
    # In double: the squares of the smaller side's matrix have half the digits. An "mps" device has none.
    values = (activations.cpu() if activations.device.type == "mps" else activations).flatten(2).double()
    finite = values.isfinite().all((1, 2))
    centred = values.where(finite[:, None, None], 0)  # one image must not fail all the others
    centred = centred - centred.mean(2, keepdim=True)
    if centred.shape[1] < centred.shape[2]:
        component = torch.linalg.eigh(centred @ centred.mT).eigenvectors[..., -1]
        maps = torch.einsum("nc,ncp->np", component, centred)
    else:
        variances, components = torch.linalg.eigh(centred.mT @ centred)
        maps = components[..., -1] * variances[:, -1:].clamp(min=0).sqrt()
    strength = torch.einsum("np,ncp->n", maps, centred) / maps.square().sum(1)  # the component's entries, summed
    is_clear = strength.abs() > _LEAST_STRENGTH * centred.shape[1] ** 0.5  # of the most it can be
    sign = torch.where(torch.where(is_clear, strength, maps.pow(3).sum(1)) < 0, -1, 1)
    maps = (maps * sign[:, None]).where(finite[:, None], torch.nan)
    return maps.view(len(maps), *activations.shape[2:])


@explainer(layer="activations")
def scorecam(trace: Trace, layer: HookPoint, *, n_channels: int | None = None, chunk_size: int | None = None) -> Tensor:
    r"""Score-CAM: activations weighted by the score that the image keeps where they mask it.

    .. math:: M(y, x) = \max\!\left(\sum_c w_c A_c(y, x), 0\right), \qquad w = \operatorname{softmax}_c\, s(I \odot H_c)

    with :math:`H_c` the channel's activations resized bilinearly to the image and scaled to [0, 1]. The paper's
    baseline score cancels in the softmax, which pytorch-grad-cam takes, too. A constant channel masks the whole image;
    all of these share one pass. The rectifier belongs to the definition.

    Takes a forward pass for each channel; ``n_channels`` bounds them.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes. A callable given as ``targets`` scores
            each row of an output by itself.
        layer: Any layer that gives (N, C, h, w) or tokens; None finds the last spatial one.
        n_channels: Only so many channels of each image are used, those that vary most (Faster Score-CAM); None: all.
        chunk_size: How many masked images are run at once; None: 8 on a CPU, 64 elsewhere.

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
    rows = _ROWS.get(trace.images.device.type, _MORE_ROWS)
    chunk_size = rows if chunk_size is None else check_integer("chunk_size", chunk_size)
    if n_channels is not None:
        n_channels = check_integer("n_channels", n_channels)
    activations = trace.activations(layer).float()
    scores = [_masked_scores(trace, maps, row, n_channels, chunk_size) for row, maps in enumerate(activations)]
    return torch.einsum("nc,nchw->nhw", torch.stack(scores).softmax(1), activations).relu()


def _masked_scores(trace: Trace, maps: Tensor, row: int, n_channels: int | None, chunk_size: int) -> Tensor:
    """(C,) the score of one image under each channel's mask; minus infinity for the channels that are left out."""
    image = trace.images[row].detach()
    places = maps.flatten(1)
    order = places.var(1, correction=0).argsort(descending=True, stable=True)[:n_channels]
    varying = places.amax(1)[order] > places.amin(1)[order]
    scores = torch.full((len(maps),), -torch.inf, device=maps.device)
    if not varying.all():
        scores[order[~varying]] = _scores(trace, torch.zeros_like(image)[None], row)
    for channels in _parts(order[varying], chunk_size):
        masks = interpolate(maps[channels][:, None], image.shape[1:], mode="bilinear", align_corners=False)
        masks = masks - masks.amin((2, 3), keepdim=True)
        masks = masks / masks.amax((2, 3), keepdim=True).clamp(min=torch.finfo(masks.dtype).tiny)
        scores[channels] = _scores(trace, image * masks.to(image), row)
    return scores


def _scores(trace: Trace, images: Tensor, row: int) -> Tensor:
    if images.device.type == "cpu" and len(images) > 1:
        try:
            # A CPU convolves these faster, by a fifth.
            return _look(trace, images.contiguous(memory_format=torch.channels_last), row)
        except RuntimeError:  # a model may want to view what is laid out otherwise; its own faults return
            pass
    return _look(trace, images, row)


def _look(trace: Trace, images: Tensor, row: int) -> Tensor:
    rows = torch.full((len(images),), row, device=images.device)
    with trace.on_images(images, rows, input_gradients=False) as look:
        return look.scores.detach()


@explainer(layer="activations")
def ablationcam(trace: Trace, layer: HookPoint, *, chunk_size: int | None = None) -> Tensor:
    r"""Ablation-CAM: activations weighted by how much of the score is lost without their channel.

    .. math:: M(y, x) = \sum_c w_c A_c(y, x), \qquad w_c = \frac{s - s_{A_c = 0}}{s}

    As the score divides, weights mean little where it is near zero, and a negative score turns their sign; where it is
    zero they are zero. In a layer of tokens the channel is ablated in all of them, class token included. The layers
    before run once for each chunk, not for each channel.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes. A callable given as ``targets`` scores
            each row of an output by itself.
        layer: Any layer that gives (N, C, h, w) or tokens; None finds the last spatial one.
        chunk_size: How many channels are ablated in one pass; None: as many as keep the layer's copies under 64 MiB.

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
    most = max(1, _MOST_ELEMENTS // activations[0].numel())
    chunk_size = most if chunk_size is None else check_integer("chunk_size", chunk_size)
    scores = trace.scores.detach()
    drops = [_drops(trace, layer, row, activations.shape[1], scores[row], chunk_size) for row in range(len(scores))]
    weights = torch.where(scores[:, None] == 0, 0, torch.stack(drops) / scores[:, None])
    return torch.einsum("nc,nchw->nhw", weights.to(activations), activations)


def _drops(trace: Trace, layer: HookPoint, row: int, count: int, score: Tensor, chunk_size: int) -> Tensor:
    """(C,) what the score of one image loses without each channel."""
    passing = trace.raw_activations(layer)
    grid = trace.activations(layer)
    # The same values, though the memory may be laid out otherwise; a view of itself is known without looking.
    same_memory = (passing.data_ptr(), passing.stride()) == (grid.data_ptr(), grid.stride())
    channels_first = passing.shape == grid.shape and (same_memory or torch.equal(passing, grid))
    own = passing[row] if channels_first else passing[row].movedim(-1, 0)  # (C, ...)
    if len(own) != count:
        raise ConfigurationError(
            f"ablationcam finds no channels to ablate in what passes {layer.name!r}, {tuple(passing.shape)}: expected "
            f"{count} of them in its second or last dimension; choose another layer or reshape="
        )
    drops = torch.zeros(count, device=score.device)
    active = own.flatten(1).any(1).nonzero()[:, 0]  # the others are zero as it is
    for channels in _parts(active, chunk_size):
        ablated = own.expand(len(channels), *own.shape).clone()
        ablated[torch.arange(len(channels), device=channels.device), channels] = 0
        given = ablated if channels_first else ablated.movedim(1, -1)
        drops[channels] = score - trace.scores_with_patched(layer, given, row)
    return drops


def _parts(channels: Tensor, size: int) -> tuple[Tensor, ...]:
    return torch.split(channels, size) if len(channels) else ()  # nothing is split into one part that is empty
