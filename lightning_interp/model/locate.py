"""Names and modules of layers; the last spatial layer, the first convolution, the classifier's head."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.model._watchers import ATTENTIONS, ConvolutionWatcher, PoolingWatcher
from lightning_interp.model.hooks import HookPoint, tap
from lightning_interp.model.outputs import Predict, checked_images, output_logits, run_model
from lightning_interp.model.preserve import preserve_state

__all__ = [
    "ATTENTIONS",
    "find_layer",
    "first_convolution",
    "layer_name",
    "linear_heads",
    "locate",
    "locate_features",
    "locate_last_convolution",
    "plain_name",
    "structure_key",
    "unwrap_compiled",
]

_ADVICE = "name a layer that gives (N, C, h, w) activations, or tokens, with layer=..."


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or the module itself."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def plain_name(name: str) -> str:
    """Return a dotted name without the parts that ``torch.compile`` inserts."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def find_layer(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    """Return a submodule, given by itself or by its dotted name.

    Args:
        model: The model.
        layer: A submodule of ``model`` or its dotted name; for a compiled submodule the wrapped one is returned.

    Returns:
        The submodule.

    Raises:
        ConfigurationError: If there is none; the message suggests similar names.

    Example:
        >>> from torch import nn
        >>> find_layer(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "1")
        ReLU()
    """
    if isinstance(layer, nn.Module):
        layer = unwrap_compiled(layer)
        if not any(layer is module for module in model.modules()):
            raise ConfigurationError(
                f"the layer {type(layer).__name__} is not part of {type(model).__name__}; pass a submodule of the "
                "model that is explained, or its dotted name"
            )
        return layer
    if not isinstance(layer, str):
        raise ConfigurationError(f"a layer is a module or its dotted name, got {layer!r}")
    modules = {plain_name(name): unwrap_compiled(module) for name, module in model.named_modules() if name}
    if plain_name(layer) in modules:
        return modules[plain_name(layer)]
    near = _near_names(layer, list(modules))
    hint = f"did you mean {_join(near)}?" if near else f"it has {_join(list(modules)[:8])}"
    raise ConfigurationError(f"there is no layer {layer!r} in {type(model).__name__}; {hint}")


def layer_name(model: nn.Module, layer: nn.Module) -> str:
    """Return the dotted name of a submodule, without the parts that ``torch.compile`` inserts.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> layer_name(model, model[1])
        '1'
    """
    for name, module in model.named_modules():
        if unwrap_compiled(module) is unwrap_compiled(layer):
            return plain_name(name)
    raise ConfigurationError(f"the layer {type(layer).__name__} is not part of {type(model).__name__}")


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return the first two-dimensional convolution in the order of definition, which may be a patch embedding.

    Returns:
        Its dotted name and the module.

    Raises:
        ConfigurationError: If the model has none.

    Example:
        >>> from torch import nn
        >>> first_convolution(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))[0]
        '0'
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return plain_name(name), module
    raise ConfigurationError(
        f"{type(model).__name__} has no two-dimensional convolution whose filters could be shown; name layers "
        "that have filters with layers=[...], or leave FilterMonitor out"
    )


def linear_heads(model: nn.Module) -> Iterator[nn.Linear]:
    """Iterate over all linear layers in reverse order of definition: usually the classifier comes first."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return reversed(linears)


def _near_names(name: str, names: list[str]) -> list[str]:
    """Return up to three names that end in, or are similar to, ``name``."""
    ending = [candidate for candidate in names if candidate.endswith(f".{name}")]
    similar = difflib.get_close_matches(name, names, n=3)
    return (ending + [candidate for candidate in similar if candidate not in ending])[:3]


def _join(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names) if names else "no submodules"


def locate(
    model: nn.Module,
    layer: str | nn.Module | None = None,
    images: Tensor | None = None,
    *,
    call_index: int = -1,
    predict: Predict | None = None,
) -> HookPoint:
    """Return the point whose tensor ``layer`` means.

    Args:
        model: The model.
        layer: A submodule or its dotted name, or None for the tensor that enters the final pooling or flattening; in
            a transformer with a class token, for the tokens that enter the last attention.
        images: (N, C, H, W): needed for None, where the first image is run through the model once.
        call_index: Which call of the module is meant where it runs more than once.
        predict: How to run the model, ``predict(model, images)``; None calls it.

    Returns:
        The point to open a :class:`~lightning_interp.model.trace.Trace` with.

    Raises:
        ConfigurationError: If the model has no such layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> locate(model, None, torch.rand(1, 3, 8, 8)).name
        '0'
    """
    if layer is not None:
        module = find_layer(model, layer)
        return HookPoint(layer_name(model, module), module, call_index=call_index)
    if images is None:
        raise ConfigurationError("to find the last spatial layer, locate needs images")
    structure = (checked_images(images).shape[1:], structure_key(model))
    if predict is None and (cached := _cached_point(model, structure)) is not None:
        return cached
    watcher = _watch_pooling(model, images[:1], predict)
    point = watcher.attention_input or watcher.features
    if point is None:
        raise _no_spatial_layer(model)
    if predict is None:
        reference = None if point.module is None else weakref.ref(point.module)
        _last_spatial[model] = (structure, replace(point, module=None), reference)
    return point


def structure_key(model: nn.Module) -> tuple[Any, ...]:
    """Return a key that changes with a model's modules, and with their public flags and strings."""
    key: list[Any] = []
    for module in model.modules():
        key.append(id(module))
        for name, value in module.__dict__.items():
            # Private attributes are bookkeeping of Lightning and of metrics; the mode is always eval here.
            if type(value) in (bool, str) and name != "training" and not name.startswith("_"):
                key += [name, value]
    return tuple(key)


def locate_features(model: nn.Module, images: Tensor) -> HookPoint:
    """Return the point of the tensor that enters the final pooling, flattening, or selection of the class token.

    Args:
        model: The model.
        images: (N, C, H, W); the first is run through the model once.

    Returns:
        The point.

    Raises:
        ConfigurationError: If there is none.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> locate_features(model, torch.rand(1, 3, 8, 8)).name
        '1'
    """
    features = _watch_pooling(model, images[:1], None).features
    if features is None:
        raise _no_spatial_layer(model)
    return features


# A search runs one image through the model; the result is valid while the model keeps its structure. With a ``predict``
# it is not cached: most are made for a single call, and may reference the model, which then would never be freed. For
# the same reason the point's module, which may reference the model, is held weakly.
_Cached = tuple[Any, HookPoint, "weakref.ref[nn.Module] | None"]
_last_spatial: weakref.WeakKeyDictionary[nn.Module, _Cached] = weakref.WeakKeyDictionary()


def _cached_point(model: nn.Module, structure: Any) -> HookPoint | None:
    cached_structure, point, reference = _last_spatial.get(model, (None, None, None))
    if point is None or cached_structure != structure:
        return None
    if reference is None:
        return point
    module = reference()
    return None if module is None else replace(point, module=module)


def locate_last_convolution(model: nn.Module, images: Tensor) -> HookPoint:
    """Return the point of the tensor that enters the last convolution: a fully convolutional classifier's features.

    Args:
        model: The model, with at least one convolution.
        images: (N, C, H, W); the first is run through the model once.

    Returns:
        The point.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1))
        >>> locate_last_convolution(model, torch.rand(1, 3, 8, 8)).name
        'input of 2'
    """
    watcher = ConvolutionWatcher()
    convolutions = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    with preserve_state(model), torch.no_grad(), tap(convolutions, watcher.on_output), watcher:
        run_model(model, images[:1].detach().clone(), None)
    return HookPoint(f"input of {watcher.layer}", function=watcher.function, call_index=watcher.calls - 1)


def _no_spatial_layer(model: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"{type(model).__name__} has no spatial layer: no convolution's output enters a final pooling or "
        f"flattening; {_ADVICE}"
    )


def _watch_pooling(model: nn.Module, images: Tensor, predict: Predict | None) -> PoolingWatcher:
    images = images.detach().clone()
    watcher = PoolingWatcher(images)
    modules = {
        plain_name(name): module
        for name, module in model.named_modules()
        # Compiled wrappers return what the wrapped module does, and scripted modules take no hooks.
        if name and unwrap_compiled(module) is module and not isinstance(module, torch.jit.ScriptModule)
    }
    with preserve_state(model), torch.no_grad(), tap(modules, watcher.on_output), watcher:
        output = run_model(model, images, predict)
    if watcher.features is not None and (logits := _logits_in(output)) is not None and logits.ndim > 2:
        raise ConfigurationError(
            f"the output of {type(model).__name__} is itself spatial, {describe(logits)}, so there is no final pooling "
            f"to start from; {_ADVICE}"
        )
    return watcher


def _logits_in(output: Any) -> Tensor | None:
    try:
        return output_logits(output)
    except ConfigurationError:
        return None  # a callable given as targets may score another output
