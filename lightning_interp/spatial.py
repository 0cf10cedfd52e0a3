"""Where the last places are: the tensor that enters the final pooling or flattening, found by running the model."""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.guard import undisturbed
from lightning_interp.layers import find_layer, layer_name, original, plain_name
from lightning_interp.outputs import Predict, checked_images, output_logits, run_model
from lightning_interp.trace import Site, listening

__all__ = ["locate"]


def locate(
    model: nn.Module,
    layer: str | nn.Module | None = None,
    images: Tensor | None = None,
    *,
    use: int = -1,
    predict: Predict | None = None,
) -> Site:
    """Find the tensor that a user means by ``layer``.

    Args:
        model: The model.
        layer: A submodule or its dotted name, or None for the tensor that enters the final pooling or flattening.
        images: (N, C, H, W): needed for None, where the first image is run through the model once.
        use: Which call of the module is meant where it is used more than once.
        predict: How to run the model, ``predict(model, images)``; None calls it.

    Returns:
        The site to open a :class:`~lightning_interp.trace.Trace` with.

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
        return Site(layer_name(model, module), module, use=use)
    if images is None:
        raise ConfigurationError("to find the last spatial layer, locate needs images")
    structure = (checked_images(images).shape[1:], *map(id, model.modules()))
    known = _last_spatial.get(model)
    if predict is None and known is not None and known[0] == structure:
        return known[1]
    with undisturbed(model), torch.no_grad():
        site = _find_last_spatial(model, images[:1], predict)
    if predict is None:
        _last_spatial[model] = (structure, site)
    return site


# Searching costs a forward pass of one image; the answer stays right while the model keeps its modules. With a
# ``predict`` it is searched anew: most are made for one call, and may hold the model, which then would never be freed.
_last_spatial: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Site]] = WeakKeyDictionary()


def _find_last_spatial(model: nn.Module, images: Tensor, predict: Predict | None) -> Site:
    images = images.detach().clone()
    watcher = _PoolingWatcher(images)
    modules = {plain_name(name): each for name, each in model.named_modules() if name and original(each) is each}
    with listening(modules, watcher.heard), watcher:
        output = run_model(model, images, predict)
    advice = "name a layer that gives (N, C, h, w) activations with layer=..."
    if watcher.found is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no spatial layer: no convolution's output enters a final pooling or "
            f"flattening; {advice}"
        )
    if output_logits(output).ndim > 2:
        raise ConfigurationError(
            f"the output of {type(model).__name__} is itself spatial, {describe(output_logits(output))}, so there is "
            f"no final pooling to start from; {advice}"
        )
    return watcher.found


class _PoolingWatcher(TorchFunctionMode):
    """Watches a forward pass for the last call that takes location away, and names the tensor that enters it."""

    _WEIGHTED = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "einsum"})
    # A flattening that follows an average pooling (VGG, AlexNet) or dropout is preceded by what entered those.
    _TRANSPARENT = frozenset({"adaptive_avg_pool2d", "avg_pool2d", "dropout", "dropout2d", "feature_dropout"})
    _REDUCTIONS = frozenset({"mean", "sum", "amax"})
    # A norm over channels turns (N, 1, 1, C) back to (N, C, 1, 1): that is no pooling.
    _REORDERINGS = frozenset({"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"})

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._images = images  # flattened themselves, they are no layer
        self.found: Site | None = None
        self._convolved = False
        self._calls: Counter[Any] = Counter()
        self._uses: Counter[nn.Module] = Counter()
        # All results are held until the end: an id is only unique among the living.
        self._outputs: list[tuple[str, nn.Module, int, Tensor, int]] = []
        self._entered: dict[int, tuple[Tensor, Tensor, Site]] = {}

    def heard(self, name: str, module: nn.Module, output: Any) -> None:
        """Remember which module gave which tensor, and in which state."""
        if isinstance(output, Tensor):
            self._outputs.append((name, module, self._uses[module], output, output._version))
        self._uses[module] += 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self._calls[func]
        self._calls[func] += 1
        name = getattr(func, "__name__", "")
        entering = args[0] if args and isinstance(args[0], Tensor) else None
        site = None
        if entering is self._images:
            entering = None
        if entering is not None and self._convolved and entering.ndim == 4 and self._has_places(name, entering):
            site = self._site_of(entering, func, name, call)
        result = func(*args, **(kwargs or {}))
        self._convolved |= name in self._WEIGHTED
        # x.flatten(2).mean(-1) pools; flattened alone, places may become a transformer's tokens.
        if entering is not None and entering.ndim == 3 and id(entering) in self._entered and name in self._REDUCTIONS:
            self.found = self._entered[id(entering)][2]
        if site is not None and isinstance(result, Tensor) and entering is not None:
            if id(entering) in self._entered:
                site = self._entered[id(entering)][2]
            if name in self._TRANSPARENT or result.shape == (*entering.shape[:2], entering.shape[2:].numel()):
                self._entered[id(result)] = (result, entering, site)
            if entering.shape[2:].numel() > 1 and self._takes_location(name, entering, result):
                self.found = site
        return result

    def _has_places(self, name: str, entering: Tensor) -> bool:
        # VGG's adaptive pooling makes many places of one, where images are small.
        return entering.shape[2:].numel() > 1 or name in self._TRANSPARENT

    def _takes_location(self, name: str, entering: Tensor, result: Tensor) -> bool:
        n, c, h, w = entering.shape
        if result.ndim == 4:
            return tuple(result.shape[2:]) == (1, 1) and name not in self._REORDERINGS
        if result.ndim == 3:
            return name in self._REDUCTIONS and tuple(result.shape) in {(n, c, h), (n, c, w)}
        return result.ndim == 2 and len(result) == n

    def _site_of(self, tensor: Tensor, function: Any, name: str, call: int) -> Site:
        """The outermost module whose output the tensor is, unless it was changed in place since; else the call."""
        for module_name, module, use, output, version in reversed(self._outputs):
            if output is tensor and version == tensor._version:
                return Site(module_name, module, use=use if self._uses[module] > 1 else -1)
        return Site(f"input of {name}", function=function, use=call)
