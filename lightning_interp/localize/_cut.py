"""A model up to one of its tensors, as a module that trains, exports and compiles like any other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_interp.localize._graph import graph_until, is_close
from lightning_interp.model.hooks import HookPoint, run_until
from lightning_interp.model.layout import Layout, layout_of, on_grid
from lightning_interp.model.preserve import preserve_state

__all__ = ["cut"]


def cut(model: nn.Module, images: Tensor, point: HookPoint) -> nn.Module:
    """Truncate a model at a point of its forward pass.

    Three ways are tried, and the first is taken that gives the same tensor: the model's ``forward_features`` (timm),
    its graph, and running the model until the point is reached, which works for every model but not for compilers.

    Args:
        model: The model; its modules are used, not copied.
        images: (N, C, H, W) to run it with.
        point: The point.

    Returns:
        A module from images to (N, C, h, w) features, without the parameters that do not contribute to them.
    """
    image_size = (images.shape[2], images.shape[3])
    with preserve_state(model), torch.no_grad():
        expected = run_until(model, images.clone(), point).clone()
    body = (
        _forward_features(model, images, expected)
        or graph_until(model, images, expected)
        or _RunUntil(model, images, point)
    )
    layout = layout_of(expected, image_size)
    return body if layout == "channels_first" else _OnGrid(body, layout)


class _OnGrid(nn.Module):
    """Tokens, or channels-last features, as (N, C, h, w)."""

    def __init__(self, body: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.body, self.layout = body, layout
        self.training = body.training

    def forward(self, images: Tensor) -> Tensor:
        return on_grid(self.body(images), self.layout, (images.shape[2], images.shape[3]))


class _ForwardFeatures(nn.Module):
    """A model's ``forward_features``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return features


class _RunUntil(nn.Module):
    """A model that is run until a point is reached."""

    def __init__(self, model: nn.Module, images: Tensor, point: HookPoint) -> None:
        super().__init__()
        _drop_unused(model, lambda: run_until(model, images.clone(), point))
        self.model, self.point = model, point
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        return run_until(self.model, images, self.point)


def _forward_features(model: nn.Module, images: Tensor, expected: Tensor) -> nn.Module | None:
    forward = getattr(model, "forward_features", None)
    if not callable(forward):
        return None
    with preserve_state(model), torch.no_grad():
        features = forward(images.clone())
    if not is_close(features, expected):
        return None
    _drop_unused(model, lambda: forward(images.clone()))
    return _ForwardFeatures(model)


def _drop_unused(model: nn.Module, features: Callable[[], Tensor]) -> None:
    """Replace modules without a parameter that contributes to the features: DDP would wait for their gradients."""
    parameters = list(model.parameters())
    with preserve_state(model):
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
        gradients = torch.autograd.grad(features().float().sum(), parameters, allow_unused=True)
    used = {id(parameter) for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None}

    def is_unused(module: nn.Module) -> bool:
        module_parameters = list(module.parameters())
        return bool(module_parameters) and not any(id(parameter) in used for parameter in module_parameters)

    def drop(module: nn.Module) -> None:
        for name, child in module.named_children():
            if is_unused(child):
                module.set_submodule(name, nn.Identity())
            else:
                drop(child)

    drop(model)
