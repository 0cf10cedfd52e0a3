"""Slow and obvious: each method as in its paper, image by image, with hooks and ``backward()``.

Every function takes ``(model, images, targets, layer, **options)`` and returns (N, h, w) of the layer or (N, H, W);
there is one for each explainer, with the properties of the method that the contract tests need.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn

from tests.helpers.zoo import Animal

Reference = TypeVar("Reference", bound=Callable[..., Tensor])


def _no_refusal(kind: Animal) -> str | None:
    return None


def _without_gap_head(kind: Animal) -> str | None:
    return None if kind.gap else "no head of global average pooling and one linear layer.*use gradcam"


def _without_attention(kind: Animal) -> str | None:
    if kind.attends:
        return None
    return "(shows no attention between tokens|is not between the same tokens in all layers).*use gradcam"


def _without_relus(kind: Animal) -> str | None:
    if kind.activations == "other":
        return "the model's activation '(gelu|hardswish)' is not a ReLU .*; use saliency, smoothgrad or integrated"
    if kind.activations == "none":
        return "calls no ReLU or variant of it whose gradient could be modified; use saliency or smoothgrad"
    return None


@dataclass(frozen=True)
class Properties:
    """What is true of a method.

    Args:
        linear: It is linear in the score: the map of minus the score is minus the map.
        class_agnostic: The map is the same for every target.
        classes_of_gap_head: It explains classes only, and only at the layer that is pooled.
        modifies_relu: It modifies the gradient of ReLUs.
        needs_double: Rounding errors of float32 exceed the tolerance of the tests.
        zero_if_linear: The map of a linear model is zero.
        refusal: The error for a model that the method cannot explain, as a regular expression, or None.
    """

    linear: bool = False
    class_agnostic: bool = False
    classes_of_gap_head: bool = False
    modifies_relu: bool = False
    needs_double: bool = False
    zero_if_linear: bool = False
    refusal: Callable[[Animal], str | None] = _no_refusal


_PROPERTIES: dict[str, Properties] = {}


def has(**properties: Any) -> Callable[[Reference], Reference]:
    """Declare the properties of a method beside its reference."""

    def declare(reference: Reference) -> Reference:
        _PROPERTIES[reference.__name__] = Properties(**properties)
        return reference

    return declare


def properties_of(name: str) -> Properties:
    """Return the properties of a method."""
    return _PROPERTIES.get(name, Properties())


@has(linear=True, classes_of_gap_head=True, refusal=_without_gap_head)
def cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    linear = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    weight = linear[-1] if linear else torch.eye(int(targets.max()) + 1)
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, _ = _layer(model, image, target, layer)
        row, sign = (weight[0], 1 if target else -1) if len(weight) == 1 else (weight[target], 1)
        maps.append(sign * sum(w * channel for w, channel in zip(row, activations, strict=True)))
    return torch.stack(maps)


@has(linear=True)
def gradcam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, gradients = _layer(model, image, target, layer)
        maps.append(sum(g.mean() * a for g, a in zip(gradients, activations, strict=True)))
    return torch.stack(maps)


def gradcam_plus_plus(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, gradients = (tensor.double() for tensor in _layer(model, image, target, layer))
        total = torch.zeros(activations.shape[1:], dtype=torch.float64)
        for a, g in zip(activations, gradients, strict=True):
            denominator = 2 * g**2 + a.sum() * g**3
            alpha = torch.where(g == 0, 0, g**2 / denominator)
            total += (alpha * g.clamp(min=0)).sum() * a
        maps.append(total.float())
    return torch.stack(maps)


@has(linear=True)
def hirescam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, gradients = _layer(model, image, target, layer)
        maps.append(sum(g * a for g, a in zip(gradients, activations, strict=True)))
    return torch.stack(maps)


@has(linear=True)
def xgradcam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, gradients = _layer(model, image, target, layer)
        parts = [(g * a / a.sum()).sum() * a if a.sum() else 0 * a for g, a in zip(gradients, activations, strict=True)]
        maps.append(sum(parts))
    return torch.stack(maps)


def layercam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, gradients = _layer(model, image, target, layer)
        maps.append(sum(g.clamp(min=0) * a for g, a in zip(gradients, activations, strict=True)))
    return torch.stack(maps)


@has(class_agnostic=True)
def eigencam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, _ = _layer(model, image, target, layer)
        positions = activations.flatten(1).T.double()  # a row for each position
        centred = positions - positions.mean(0)
        component = torch.linalg.svd(centred).Vh[0]
        projected = centred @ component
        strength = component.mean() * len(component) ** 0.5  # the cosine between it and all ones
        if (strength if strength.abs() > 1e-3 else (projected**3).sum()) < 0:
            projected = -projected
        maps.append(projected.float().view(activations.shape[1:]))
    return torch.stack(maps)


def scorecam(model: nn.Module, images: Tensor, targets: Tensor, layer: str, *, n_channels: int | None = None) -> Tensor:
    model, maps = copy.deepcopy(model).eval(), []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, _ = _layer(model, image, target, layer)
        chosen = sorted(activations, key=lambda a: a.var(correction=0).item(), reverse=True)[:n_channels]
        scores = []
        for a in chosen:
            mask = nn.functional.interpolate(a[None, None], image.shape[1:], mode="bilinear")[0, 0]
            mask = torch.zeros_like(mask) if a.max() == a.min() else (mask - mask.min()) / (mask.max() - mask.min())
            scores.append(_score_of(model, image * mask, target))
        weights = torch.tensor(scores).softmax(0)
        maps.append(sum(w * a for w, a in zip(weights, chosen, strict=True)).clamp(min=0))
    return torch.stack(maps)


@has(needs_double=True)
def ablationcam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    model, maps = copy.deepcopy(model).eval(), []
    for image, target in zip(images, targets.tolist(), strict=True):
        raw, _ = _raw_layer(model, image, target, layer)
        activations = _grid(raw)
        score = _score_of(model, image, target)
        weights = []
        for channel in range(len(activations)):
            without = _score_of(model, image, target, layer, _ablated(raw, channel))
            weights.append((score - without) / score)
        maps.append(sum(w * a for w, a in zip(weights, activations, strict=True)))
    return torch.stack(maps)


@has(class_agnostic=True, refusal=_without_attention)
def attention_rollout(model: nn.Module, images: Tensor, targets: Tensor, layer: None = None) -> Tensor:
    """Of torchvision's and timm's VisionTransformer, by their projections."""
    maps = []
    for image in images:
        copied = copy.deepcopy(model).eval()
        inputs: list[Tensor] = []
        if hasattr(copied, "encoder"):
            packed = [
                (block.ln_1, block.self_attention.in_proj_weight, block.self_attention.in_proj_bias)
                for block in copied.encoder.layers
            ]
            heads = copied.encoder.layers[0].self_attention.num_heads
        else:
            packed = [(block.norm1, block.attn.qkv.weight, block.attn.qkv.bias) for block in copied.blocks]
            heads = copied.blocks[0].attn.num_heads
        for norm, _, _ in packed:
            norm.register_forward_hook(lambda module, args, output, inputs=inputs: inputs.append(output.detach()[0]))
        copied(image[None])
        rollout = torch.eye(len(inputs[0]))
        for tokens, (_, weight, bias) in zip(inputs, packed, strict=True):
            query, key, _ = (tokens @ weight.T + bias).detach().chunk(3, dim=1)
            total = torch.zeros(len(tokens), len(tokens))
            for q, k in zip(query.chunk(heads, 1), key.chunk(heads, 1), strict=True):
                total += (q @ k.T / q.shape[1] ** 0.5).softmax(1) / heads
            mixed = 0.5 * total + 0.5 * torch.eye(len(tokens))
            rollout = mixed @ rollout
        side = round((len(rollout) - 1) ** 0.5)
        maps.append(rollout[0, 1:].view(side, side))
    small = torch.stack(maps)
    return nn.functional.interpolate(small[:, None], images.shape[2:], mode="bilinear")[:, 0]


@has(linear=True)
def saliency(
    model: nn.Module, images: Tensor, targets: Tensor, layer: None = None, *, channels: str | None = "max_abs"
) -> Tensor:
    gradients = [_pixels(model, image, target) for image, target in zip(images, targets.tolist(), strict=True)]
    return _reduced(torch.stack(gradients), channels)


@has(linear=True)
def smoothgrad(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layer: None = None,
    *,
    n_samples: int = 50,
    noise_level: float = 0.15,
    channels: str | None = "max_abs",
) -> Tensor:
    maps = []
    for number, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
        stream = torch.Generator().manual_seed(number)
        spread = noise_level * (image.max() - image.min())
        noisy = [image + spread * torch.randn(image.shape, generator=stream) for _ in range(n_samples)]
        maps.append(sum(_pixels(model, noisy_image, target) for noisy_image in noisy) / n_samples)
    return _reduced(torch.stack(maps), channels)


@has(linear=True)
def input_x_gradient(
    model: nn.Module, images: Tensor, targets: Tensor, layer: None = None, *, channels: str | None = "sum"
) -> Tensor:
    maps = [image * _pixels(model, image, target) for image, target in zip(images, targets.tolist(), strict=True)]
    return _reduced(torch.stack(maps), channels)


@has(zero_if_linear=True)
def vargrad(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layer: None = None,
    *,
    n_samples: int = 50,
    noise_level: float = 0.15,
    channels: str | None = "max_abs",
) -> Tensor:
    maps = []
    for number, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
        stream = torch.Generator().manual_seed(number)
        spread = noise_level * (image.max() - image.min())
        noisy = [image + spread * torch.randn(image.shape, generator=stream) for _ in range(n_samples)]
        maps.append(torch.stack([_pixels(model, noisy_image, target) for noisy_image in noisy]).var(0, correction=0))
    return _reduced(torch.stack(maps), channels)


@has(linear=True)
def integrated_gradients(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layer: None = None,
    *,
    n_steps: int = 50,
    baseline: float = 0.0,
    channels: str | None = "sum",
) -> Tensor:
    """By Gauss and Legendre, whose points are eigenvalues (Golub and Welsch)."""
    beside = torch.tensor([n / (4 * n**2 - 1) ** 0.5 for n in range(1, n_steps)], dtype=torch.float64)
    points, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        total = torch.zeros_like(image)
        for point, vector in zip(points.tolist(), vectors.T, strict=True):
            interpolated = baseline + (point + 1) / 2 * (image - baseline)
            total += float(vector[0]) ** 2 * _pixels(model, interpolated, target)
        maps.append((image - baseline) * total)
    return _reduced(torch.stack(maps), channels)


@has(modifies_relu=True, refusal=_without_relus)
def guided_backprop(
    model: nn.Module, images: Tensor, targets: Tensor, layer: None = None, *, channels: str | None = "max_abs"
) -> Tensor:
    with _relu_is(_GuidedReLU):
        return saliency(model, images, targets, channels=channels)


@has(modifies_relu=True, refusal=_without_relus)
def deconvnet(
    model: nn.Module, images: Tensor, targets: Tensor, layer: None = None, *, channels: str | None = "max_abs"
) -> Tensor:
    with _relu_is(_DeconvolvedReLU):
        return saliency(model, images, targets, channels=channels)


@has(modifies_relu=True, refusal=_without_relus)
def guided_gradcam(
    model: nn.Module, images: Tensor, targets: Tensor, layer: str, *, channels: str | None = "max_abs"
) -> Tensor:
    coarse = gradcam(model, images, targets, layer).clamp(min=0)[:, None]
    fine = guided_backprop(model, images, targets, channels=None)
    return _reduced(fine * nn.functional.interpolate(coarse, images.shape[2:], mode="bilinear"), channels)


@has(linear=True)
def occlusion(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layer: None = None,
    *,
    patch: float = 0.2,
    stride: float = 0.1,
    fill: float | None = None,
) -> Tensor:
    model, maps = copy.deepcopy(model).eval(), []
    for image, target in zip(images, targets.tolist(), strict=True):
        starts = []
        for side in image.shape[1:]:
            length, step = max(1, round(patch * side)), max(1, round(stride * side))
            starts.append([(start, length) for start in sorted({*range(0, side - length, step), side - length})])
        total, covering = torch.zeros(image.shape[1:]), torch.zeros(image.shape[1:])
        for top, height in starts[0]:
            for left, width in starts[1]:
                hidden = image.clone()
                for channel in hidden:
                    channel[top : top + height, left : left + width] = channel.mean() if fill is None else fill
                drop = _score_of(model, image, target) - _score_of(model, hidden, target)
                total[top : top + height, left : left + width] += drop
                covering[top : top + height, left : left + width] += 1
        maps.append(total / covering)
    return torch.stack(maps)


@has(linear=True)
def rise(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layer: None = None,
    *,
    n_masks: int = 1000,
    grid: int = 7,
    p: float = 0.5,
) -> Tensor:
    model, maps = copy.deepcopy(model).eval(), []
    for number, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
        stream = torch.Generator().manual_seed(number)
        height, width = image.shape[1:]
        cell_height, cell_width = math.ceil(height / grid), math.ceil(width / grid)
        total, shown = torch.zeros(height, width), torch.zeros(height, width)
        drawn = torch.rand(n_masks, grid, grid, generator=stream)
        tops = torch.randint(cell_height, (n_masks,), generator=stream).tolist()
        lefts = torch.randint(cell_width, (n_masks,), generator=stream).tolist()
        for values, top, left in zip(drawn, tops, lefts, strict=True):
            cells = (values < p).float()
            size = ((grid + 1) * cell_height, (grid + 1) * cell_width)  # the paper's (h + 1) C_H x (w + 1) C_W
            mask = nn.functional.interpolate(cells[None, None], size, mode="bilinear")[0, 0]
            mask = mask[top : top + height, left : left + width]
            total += _score_of(model, image * mask, target) * mask
            shown += mask
        maps.append(torch.where(shown > 0, total / shown, 0))
    return torch.stack(maps)


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * (x > 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (gradients[0] > 0) * (x > 0)


class _DeconvolvedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * (x > 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (gradients[0] > 0)


@contextmanager
def _relu_is(function: Any) -> Iterator[None]:
    """Replace every function by which models of the zoo call a ReLU; none of them relies on its in-place changes."""

    def relu(x: Tensor, inplace: bool = False) -> Tensor:
        return function.apply(x)

    with ExitStack() as stack:
        for namespace, name in itertools.product((nn.functional, torch, Tensor), ("relu", "relu_")):
            stack.enter_context(mock.patch.object(namespace, name, relu))
        yield


def _pixels(model: nn.Module, image: Tensor, target: int) -> Tensor:
    model = copy.deepcopy(model).eval()
    leaf = image.detach().clone()[None].requires_grad_()
    _score(model(leaf * 1), target).backward()
    assert leaf.grad is not None
    return leaf.grad[0]


def _layer(model: nn.Module, image: Tensor, target: int, layer: str) -> tuple[Tensor, Tensor]:
    activations, gradients = _raw_layer(model, image, target, layer)
    return _grid(activations), _grid(gradients)


def _grid(tensor: Tensor) -> Tensor:
    """Tokens (T, C) behind one class token as (C, h, w)."""
    if tensor.ndim == 3:
        return tensor
    side = round((len(tensor) - 1) ** 0.5)
    return tensor[1:].T.reshape(-1, side, side)


def _raw_layer(model: nn.Module, image: Tensor, target: int, layer: str) -> tuple[Tensor, Tensor]:
    model = copy.deepcopy(model).eval()
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Tensor:
        tensor = output.detach().clone().requires_grad_() if not output.requires_grad else output
        tensor.retain_grad()
        kept.append(tensor)
        return tensor.clone()

    model.get_submodule(layer).register_forward_hook(keep)
    _score(model(image[None].clone()), target).backward()
    gradient = kept[-1].grad
    assert gradient is not None
    return kept[-1].detach()[0], gradient[0]


def _ablated(raw: Tensor, channel: int) -> Tensor:
    without = raw.clone()
    if raw.ndim == 3:
        without[channel] = 0
    else:
        without[:, channel] = 0
    return without


@torch.no_grad()
def _score_of(model: nn.Module, image: Tensor, target: int, layer: str = "", instead: Tensor | None = None) -> float:
    """Return the score of one image, by a model in eval mode; with ``instead`` as the layer's last output."""
    calls: list[Tensor] = []
    if instead is not None:
        module = model.get_submodule(layer)
        handle = module.register_forward_hook(lambda module, args, output: calls.append(output))
        model(image[None].clone())
        handle.remove()
        last, calls = len(calls), []

        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            calls.append(output)
            return instead[None].clone() if len(calls) == last else output

        handle = module.register_forward_hook(change)
    score = float(_score(model(image[None].clone()), target))
    if instead is not None:
        handle.remove()
    return score


def _score(output: Any, target: int) -> Tensor:
    if isinstance(output, dict):
        output = output["logits"]
    elif isinstance(output, tuple):
        output = output[0]
    elif not isinstance(output, Tensor):
        output = output.logits
    logits = output.reshape(-1)
    if len(logits) == 1:
        return logits[0] if target else -logits[0]
    return logits[target]


def _reduced(gradients: Tensor, channels: str | None) -> Tensor:
    if channels == "max_abs":
        return gradients.abs().max(1).values
    return gradients.sum(1) if channels == "sum" else gradients
