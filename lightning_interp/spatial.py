"""Where the last places are: the tensor that enters the final pooling or flattening, found by running the model.

Transformers whose class token feeds the classifier have two such: the tokens from which it is taken, where the others
have said all they had to, and those that enter the last attention, which are the last that each have a say.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.guard import undisturbed
from lightning_interp.layers import find_layer, layer_name, original, plain_name
from lightning_interp.outputs import Predict, checked_images, output_logits, run_model
from lightning_interp.trace import Site, listening

__all__ = ["ATTENTIONS", "locate", "locate_features", "locate_last_convolution", "structure_of"]


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
        layer: A submodule or its dotted name, or None for the tensor that enters the final pooling or flattening; in
            a transformer with a class token, for the tokens that enter the last attention.
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
    structure = (checked_images(images).shape[1:], structure_of(model))
    if predict is None and (known := _remembered(model, structure)) is not None:
        return known
    watcher = _watched(model, images[:1], predict)
    site = watcher.attended or watcher.found
    if site is None:
        raise _nowhere(model)
    if predict is None:
        found = None if site.module is None else weakref.ref(site.module)
        _last_spatial[model] = (structure, replace(site, module=None), found)
    return site


def structure_of(model: nn.Module) -> tuple[Any, ...]:
    """What decides the way through a model, as far as is seen: its modules, and the flags and names they show."""
    seen: list[Any] = []
    for module in model.modules():
        seen.append(id(module))
        for name, value in module.__dict__.items():
            # Private ones are the books that Lightning and metrics keep; the mode is always eval here.
            if type(value) in (bool, str) and name != "training" and not name.startswith("_"):
                seen += [name, value]
    return tuple(seen)


def locate_features(model: nn.Module, images: Tensor) -> Site:
    """Find the tensor that enters the final pooling, flattening, or choice of the class token.

    Args:
        model: The model.
        images: (N, C, H, W); the first is run through the model once.

    Returns:
        The site.

    Raises:
        ConfigurationError: If there is none.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> locate_features(model, torch.rand(1, 3, 8, 8)).name
        '1'
    """
    found = _watched(model, images[:1], None).found
    if found is None:
        raise _nowhere(model)
    return found


# Searching costs a forward pass of one image; the answer stays right while the model keeps its structure. With a
# ``predict`` it is searched anew: most are made for one call, and may hold the model, which then would never be freed.
# For the same reason the module of the site, which may know the model, is held weakly.
_Known = tuple[Any, Site, "weakref.ref[nn.Module] | None"]
_last_spatial: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _remembered(model: nn.Module, structure: Any) -> Site | None:
    known, site, module = _last_spatial.get(model, (None, None, None))
    if site is None or known != structure:
        return None
    if module is None:
        return site
    alive = module()
    return None if alive is None else replace(site, module=alive)


def locate_last_convolution(model: nn.Module, images: Tensor) -> Site:
    """Find what enters the last convolution: the features of a fully convolutional classifier.

    Args:
        model: The model, which has a convolution.
        images: (N, C, H, W); the first is run through the model once.

    Returns:
        The site.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1))
        >>> locate_last_convolution(model, torch.rand(1, 3, 8, 8)).name
        'input of 2'
    """
    watcher = _ConvolutionWatcher()
    convolutions = {plain_name(name): each for name, each in model.named_modules() if isinstance(each, nn.Conv2d)}
    with undisturbed(model), torch.no_grad(), listening(convolutions, watcher.heard), watcher:
        run_model(model, images[:1].detach().clone(), None)
    return Site(f"input of {watcher.name}", function=watcher.function, use=watcher.calls - 1)


class _ConvolutionWatcher(TorchFunctionMode):
    """Counts convolutions and remembers the name of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "a convolution"
        self.function: Any = None
        self.calls = 0

    def heard(self, name: str, module: nn.Module, output: Any) -> None:
        self.name = name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "conv2d":
            self.function = func
            self.calls += 1
        return func(*args, **(kwargs or {}))


def _nowhere(model: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"{type(model).__name__} has no spatial layer: no convolution's output enters a final pooling or "
        f"flattening; {_ADVICE}"
    )


# The functions by which tokens look at each other.
ATTENTIONS = frozenset(
    {"scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention", "softmax"}
)
_ADVICE = "name a layer that gives (N, C, h, w) activations, or tokens, with layer=..."


def _watched(model: nn.Module, images: Tensor, predict: Predict | None) -> _PoolingWatcher:
    images = images.detach().clone()
    watcher = _PoolingWatcher(images)
    modules = {
        plain_name(name): each
        for name, each in model.named_modules()
        if name and original(each) is each and not isinstance(each, torch.jit.ScriptModule)  # which takes no hook
    }
    with undisturbed(model), torch.no_grad(), listening(modules, watcher.heard), watcher:
        output = run_model(model, images, predict)
    if watcher.found is not None and (logits := _logits_in(output)) is not None and logits.ndim > 2:
        raise ConfigurationError(
            f"the output of {type(model).__name__} is itself spatial, {describe(logits)}, so there is no final pooling "
            f"to start from; {_ADVICE}"
        )
    return watcher


def _logits_in(output: Any) -> Tensor | None:
    try:
        return output_logits(output)
    except ConfigurationError:
        return None  # a callable may score what else it holds


class _PoolingWatcher(TorchFunctionMode):
    """Watches a forward pass for the last call that takes location away, and names the tensor that enters it."""

    _WEIGHTED = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "einsum"})
    # A flattening that follows an average pooling (VGG, AlexNet) or dropout is preceded by what entered those.
    _TRANSPARENT = frozenset({"adaptive_avg_pool2d", "avg_pool2d", "dropout", "dropout2d", "feature_dropout"})
    _REDUCTIONS = frozenset({"mean", "sum", "amax"})
    # A norm over channels turns (N, 1, 1, C) back to (N, C, 1, 1): that is no pooling.
    _REORDERINGS = frozenset({"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"})
    _SELECTIONS = frozenset({"__getitem__", "select"})

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._images = images  # flattened themselves, they are no layer
        self.found: Site | None = None
        self.attended: Site | None = None  # where ``found`` gives a class token: the tokens of the last attention
        self._attending: tuple[Site, torch.Size] | None = None
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
        if name in ATTENTIONS:
            self._attending = self._last_tokens() or self._attending
        result = func(*args, **(kwargs or {}))
        self._convolved |= name in self._WEIGHTED
        # x.flatten(2).mean(-1) pools; flattened alone, places may become a transformer's tokens.
        if entering is not None and entering.ndim == 3 and id(entering) in self._entered and name in self._REDUCTIONS:
            self.found = self._entered[id(entering)][2]
        if entering is not None and self._convolved and isinstance(result, Tensor):
            self._watch_tokens(entering, result, func, name, call)
        if site is not None and isinstance(result, Tensor) and entering is not None:
            if id(entering) in self._entered:
                site = self._entered[id(entering)][2]
            if name in self._TRANSPARENT or result.shape == (*entering.shape[:2], entering.shape[2:].numel()):
                self._entered[id(result)] = (result, entering, site)
            if entering.shape[2:].numel() > 1 and self._takes_location(name, entering, result):
                self.found, self.attended = site, None
        return result

    def _watch_tokens(self, entering: Tensor, result: Tensor, function: Any, name: str, call: int) -> None:
        """Tokens (N, T, C) of which one is chosen, or which are averaged, leave (N, C)."""
        if (
            entering.ndim != 3
            or result.shape != (entering.shape[0], entering.shape[2])
            or id(entering) in self._entered
        ):
            return
        if entering.shape[1] > 1 and name in self._SELECTIONS | self._REDUCTIONS:
            self.found = self._site_of(entering, function, name, call)
            attending = self._attending
            shared = name in self._SELECTIONS and attending is not None and attending[1] == entering.shape
            self.attended = attending[0] if shared and attending is not None else None

    def _last_tokens(self) -> tuple[Site, torch.Size] | None:
        """The last module that gave tokens: a norm, where there are norms, rather than what makes keys and values."""
        tokens = [each for each in self._outputs if each[3].ndim == 3 and each[3].shape[1] > 1]
        norms = [each for each in tokens if "norm" in type(each[1]).__name__.lower()]
        for name, module, use, output, _ in reversed(norms or tokens):
            return Site(name, module, use=use), output.shape
        return None

    def _has_places(self, name: str, entering: Tensor) -> bool:
        # VGG's adaptive pooling makes many places of one, where images are small.
        return entering.shape[2:].numel() > 1 or name in self._TRANSPARENT

    def _takes_location(self, name: str, entering: Tensor, result: Tensor) -> bool:
        n, c, h, w = entering.shape
        if result.ndim == 2 and name in self._REDUCTIONS and result.shape == (n, w):
            return True  # (N, h, w, C)
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
