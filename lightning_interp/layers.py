"""Names to modules and back, with errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from torch import nn

from lightning_interp.errors import ConfigurationError

__all__ = ["find_layer", "first_convolution", "layer_name", "linear_heads", "original"]


def original(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def plain_name(name: str) -> str:
    """A dotted name without the parts that ``torch.compile`` puts in."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def find_layer(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    """The submodule that a user means.

    Args:
        model: Where to look.
        layer: A submodule of ``model`` or its dotted name; a compiled submodule stands for what it wraps.

    Returns:
        The submodule.

    Raises:
        ConfigurationError: If there is none; names that come near are suggested.

    Example:
        >>> from torch import nn
        >>> find_layer(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "1")
        ReLU()
    """
    if isinstance(layer, nn.Module):
        layer = original(layer)
        if not any(layer is module for module in model.modules()):
            raise ConfigurationError(
                f"the layer {type(layer).__name__} is not part of {type(model).__name__}; pass a submodule of the "
                "model that is explained, or its dotted name"
            )
        return layer
    if not isinstance(layer, str):
        raise ConfigurationError(f"a layer is a module or its dotted name, got {layer!r}")
    modules = {plain_name(name): original(module) for name, module in model.named_modules() if name}
    if plain_name(layer) in modules:
        return modules[plain_name(layer)]
    near = _near_names(layer, list(modules))
    hint = f"did you mean {_join(near)}?" if near else f"it has {_join(list(modules)[:8])}"
    raise ConfigurationError(f"there is no layer {layer!r} in {type(model).__name__}; {hint}")


def layer_name(model: nn.Module, layer: nn.Module) -> str:
    """The dotted name of a submodule, without the parts that ``torch.compile`` puts in.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> layer_name(model, model[1])
        '1'
    """
    for name, module in model.named_modules():
        if original(module) is original(layer):
            return plain_name(name)
    raise ConfigurationError(f"the layer {type(layer).__name__} is not part of {type(model).__name__}")


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """The first two-dimensional convolution in the order of definition: a ViT's patch embedding too.

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
    """All linear layers, the last one defined first: the classifier usually comes first."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return reversed(linears)


def _near_names(name: str, names: list[str]) -> list[str]:
    """Names that end in, or look like, ``name``."""
    ending = [candidate for candidate in names if candidate.endswith(f".{name}")]
    return (ending + [near for near in difflib.get_close_matches(name, names, n=3) if near not in ending])[:3]


def _join(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names) if names else "no submodules"
