"""Slow and obvious: each method as its paper tells it, image by image, with hooks by hand and ``backward()``.

Every function takes ``(model, images, targets, layer, **options)`` and gives (N, h, w) of the layer or (N, H, W); one
stands here for each name in ``lightning_interp.explain``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    linear = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    weight = linear[-1] if linear else torch.eye(int(targets.max()) + 1)
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, _ = _layer(model, image, target, layer)
        row, sign = (weight[0], 1 if target else -1) if len(weight) == 1 else (weight[target], 1)
        maps.append(sign * sum(w * channel for w, channel in zip(row, activations, strict=True)))
    return torch.stack(maps)


def gradcam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        activations, gradients = _layer(model, image, target, layer)
        maps.append(sum(g.mean() * a for g, a in zip(gradients, activations, strict=True)))
    return torch.stack(maps)


def saliency(
    model: nn.Module, images: Tensor, targets: Tensor, layer: None = None, *, channels: str | None = "max_abs"
) -> Tensor:
    gradients = [_pixels(model, image, target) for image, target in zip(images, targets.tolist(), strict=True)]
    return _reduced(torch.stack(gradients), channels)


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
        maps.append(sum(_pixels(model, each, target) for each in noisy) / n_samples)
    return _reduced(torch.stack(maps), channels)


def _pixels(model: nn.Module, image: Tensor, target: int) -> Tensor:
    model = copy.deepcopy(model).eval()
    leaf = image.detach().clone()[None].requires_grad_()
    _score(model(leaf * 1), target).backward()
    assert leaf.grad is not None
    return leaf.grad[0]


def _layer(model: nn.Module, image: Tensor, target: int, layer: str) -> tuple[Tensor, Tensor]:
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
