"""One recorded forward pass, and the only place that registers hooks."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_interp.errors import ConfigurationError
from lightning_interp.guard import undisturbed
from lightning_interp.layers import find_layer, layer_name, original, plain_name

__all__ = ["Predict", "Site", "Targets", "Trace", "locate", "output_logits"]

Predict = Callable[[nn.Module, Tensor], Any]
Targets = int | Tensor | Callable[[Any], Tensor] | None
LayerLike = str | nn.Module | None


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a forward pass whose tensor can be tapped.

    Args:
        name: What a person calls it.
        module: The module whose output it is, or None.
        function: Without a module: the function whose input it is.
        use: Which call of the module (negative: counted from the last) or of the function.
    """

    name: str
    module: nn.Module | None = None
    function: Callable[..., Any] | None = None
    use: int = -1


class Trace:
    """One look at a model: a forward pass, and what it left behind.

    The pass runs when the ``with`` block is entered, under :func:`~lightning_interp.guard.undisturbed`; gradients
    are computed when first asked for, all together, and kept until the block is left. No parameter takes part in
    the graph, which starts at the lowest tapped layer whose gradient is wanted, or at the images.

    Args:
        model: The module to look at.
        images: (N, C, H, W) floating, as the model takes them.
        targets: What is explained: a class for all images, int64 (N,) classes, a callable from the model's output to
            scores (N,), or None for each image's predicted class.
        layers: The sites to tap (see :func:`locate`), each with whether its gradient is wanted.
        input_gradients: Whether the gradient towards the images is wanted.
        predict: How to run the model, ``predict(model, images)``; None calls it.
        offset: Where ``images`` start in the batch they were cut from.

    Raises:
        ConfigurationError: If images or targets do not fit the contract, a layer did not run, or the model ran
            without gradients.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(2))
        >>> _ = model(torch.zeros(1, 3, 8, 8))
        >>> convolution = locate(model, "0")
        >>> with Trace(model, torch.rand(5, 3, 8, 8), targets=1, layers={convolution: True}) as trace:
        ...     (trace.logits.shape, trace.activations(convolution).shape, trace.gradients(convolution).shape)
        (torch.Size([5, 2]), torch.Size([5, 4, 6, 6]), torch.Size([5, 4, 6, 6]))
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Targets = None,
        *,
        layers: Mapping[Site, bool] | None = None,
        input_gradients: bool = False,
        predict: Predict | None = None,
        offset: int = 0,
    ) -> None:
        self.model = model
        self.images = checked_images(images)
        self.predict = predict
        self.offset = offset
        self._asked = targets
        self._sites = dict(layers or {})
        self._wants_inputs = input_gradients
        self._stack = ExitStack()
        self._kept: dict[Site, list[Tensor]] = {}
        self._leaf: Tensor | None = None
        self._outputs: list[Any] = []
        self._recording = False
        self._gradients: dict[object, dict[Site | None, Tensor | None]] = {}

    def __enter__(self) -> Trace:
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model))
            self._run(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kept.clear()
        self._gradients.clear()
        self._leaf = None
        self._outputs.clear()
        self._stack.__exit__(kind, error, traceback)

    @property
    def output(self) -> Any:
        """What the model returned."""
        return self._outputs[0]

    @property
    def logits(self) -> Tensor:
        """(N, K) the class scores in the output."""
        logits: Tensor = self._outputs[1]
        return logits

    @property
    def targets(self) -> Tensor | Callable[[Any], Tensor]:
        """What is explained: int64 (N,) classes on the logits' device, or the callable that was given."""
        return self.aim(self._asked)

    @property
    def scores(self) -> Tensor:
        """(N,) what is explained of each image: its target's logit, in float32."""
        return self._scores(self.targets)

    def aim(self, targets: Targets) -> Tensor | Callable[[Any], Tensor]:
        """The given targets as int64 (N,), checked against the logits; a callable stays what it is."""
        if callable(targets):
            return targets
        classes = self.logits.shape[1] if self.logits.ndim == 2 else 0
        if classes == 0:
            raise ConfigurationError(
                f"the model's output {tuple(self.logits.shape)} holds no class scores (N, K); pass targets as a "
                "callable from the output to scores (N,)"
            )
        if targets is None:
            return (self.logits[:, 0] > 0).long() if classes == 1 else self.logits.argmax(1)
        chosen = torch.as_tensor(targets, device=self.logits.device)
        if chosen.is_inference():
            chosen = chosen.clone()  # the gradient's graph takes no tensor that was made in inference mode
        if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
            raise ConfigurationError(f"targets are class numbers (int64), got {chosen.dtype}")
        chosen = chosen.long().expand(len(self.images)) if chosen.ndim == 0 else chosen.long()
        if chosen.shape != (len(self.images),):
            raise ConfigurationError(
                f"targets has shape {tuple(chosen.shape)}, expected one class for each of the {len(self.images)} images"
            )
        # One logit is the evidence for class 1 against class 0.
        last = max(classes, 2) - 1
        if bool(((chosen < 0) | (chosen > last)).any()):
            raise ConfigurationError(
                f"target {int(chosen[(chosen < 0) | (chosen > last)][0])} is out of range; the model has the classes "
                f"0 to {last}"
            )
        return chosen

    def aimed(self, targets: Targets) -> Trace:
        """The same look with other targets: shares the forward pass, and lives no longer than this one."""
        other = object.__new__(Trace)
        other.__dict__.update(self.__dict__)
        other._asked = targets
        return other

    def again(self, images: Tensor) -> Trace:
        """Another look, at changed images of the same targets, with the gradient towards them."""
        return Trace(self.model, images, self.targets, input_gradients=True, predict=self.predict, offset=self.offset)

    def activations(self, layer: Site) -> Tensor:
        """What the layer gave, detached, in its own dtype."""
        return self._tensor(layer).detach()

    def gradients(self, layer: Site) -> Tensor:
        """The gradient of each image's score towards the layer's output."""
        return self._gradient(layer)

    def input_gradients(self) -> Tensor:
        """The gradient of each image's score towards the image, (N, C, H, W)."""
        return self._gradient(None)

    def _run(self, stack: ExitStack) -> None:
        images = self.images.detach().clone()  # the model may change its input in place
        if self._wants_inputs:
            self._leaf = images.requires_grad_()
            images = images.clone()
        by_module: dict[nn.Module, list[Site]] = {}
        by_function: list[Site] = []
        for site in self._sites:
            self._kept[site] = []
            if site.module is None:
                by_function.append(site)
            else:
                by_module.setdefault(site.module, []).append(site)
        for module, sites in by_module.items():
            stack.callback(module.register_forward_hook(self._hook(sites)).remove)
        if by_function:
            stack.enter_context(_FunctionTap(by_function, self._keep))
        self._recording = True
        wants_graph = self._wants_inputs or any(self._sites.values())
        with torch.set_grad_enabled(wants_graph):
            output = run_model(self.model, images, self.predict)
        # Checkpointed blocks run again in the backward pass: the taps must act there, too, but keep nothing.
        self._recording = False
        self._outputs += [output, output_logits(output)]
        if len(self.logits) != len(images):
            raise ConfigurationError(
                f"the model gave {len(self.logits)} outputs for {len(images)} images; expected one for each"
            )
        for site, kept in self._kept.items():
            if not kept:
                raise ConfigurationError(
                    f"the layer {site.name!r} did not run in the model's forward pass; choose a layer that does"
                )

    def _hook(self, sites: list[Site]) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tensor = first_tensor(output)
            if tensor is None:
                raise ConfigurationError(
                    f"the layer {sites[0].name!r} gives {type(output).__name__}, not a tensor; choose another layer"
                )
            handed_on = self._keep(sites, tensor)
            return output if handed_on is tensor else _replaced(output, tensor, handed_on)

        return hook

    def _keep(self, sites: list[Site], tensor: Tensor) -> Tensor:
        """Keep a tensor that passes; what is handed on may be overwritten by what follows."""
        if not any(self._sites[site] for site in sites):
            if self._recording:
                copy = tensor.detach().clone()
                for site in sites:
                    self._kept[site].append(copy)
            return tensor
        if not torch.is_grad_enabled():
            raise ConfigurationError(
                f"the layer {sites[0].name!r} runs without gradients inside the model's forward pass (torch.no_grad, "
                "or checkpointing with use_reentrant=True); checkpoint with use_reentrant=False, or name another layer"
            )
        kept = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        if self._recording:
            for site in sites:
                self._kept[site].append(kept)
        return kept.clone()

    def _tensor(self, site: Site) -> Tensor:
        kept = self._kept[site]
        try:
            return kept[site.use]
        except IndexError:
            raise ConfigurationError(
                f"the layer {site.name!r} ran {len(kept)} times; there is no use {site.use}"
            ) from None

    def _scores(self, targets: Tensor | Callable[[Any], Tensor]) -> Tensor:
        if callable(targets):
            scores = targets(self.output)
            if not isinstance(scores, Tensor) or scores.shape != (len(self.images),):
                raise ConfigurationError(
                    f"the callable given as targets gave {_described(scores)}, expected scores ({len(self.images)},)"
                )
            return scores.float()
        if self.logits.shape[1] == 1:
            return self.logits[:, 0].float() * (2 * targets - 1)
        return self.logits.float().gather(1, targets[:, None])[:, 0]

    def _gradient(self, site: Site | None) -> Tensor:
        targets = self.targets
        key: object = targets if callable(targets) else tuple(targets.tolist())
        if key not in self._gradients:
            self._gradients[key] = self._backward(self._scores(targets))
        gradients = self._gradients[key]
        if site not in gradients:
            name = "the images" if site is None else f"the layer {site.name!r}"
            raise ConfigurationError(f"this Trace was not opened for the gradient towards {name}")
        gradient = gradients[site]
        if gradient is None:
            name = "the images" if site is None else f"the layer {site.name!r}"
            raise ConfigurationError(f"the explained score does not depend on {name}; choose another layer")
        return gradient

    def _backward(self, scores: Tensor) -> dict[Site | None, Tensor | None]:
        wanted: dict[Site | None, Tensor] = {site: self._tensor(site) for site, want in self._sites.items() if want}
        if self._leaf is not None:
            wanted[None] = self._leaf
        if not scores.requires_grad:
            raise ConfigurationError(
                "the explained score carries no gradient: the model computes it under torch.no_grad or detaches it"
            )
        with torch.enable_grad():
            try:
                # The graph is kept: another monitor may aim at other classes.
                found = torch.autograd.grad(scores.sum(), list(wanted.values()), retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant=True" in str(error) or "Checkpointing is not compatible" in str(error):
                    raise ConfigurationError(
                        "the model checkpoints with use_reentrant=True, through which no gradient can be asked for; "
                        "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                    ) from error
                raise
        return dict(zip(wanted, found, strict=True))


class _FunctionTap(TorchFunctionMode):
    """Taps the input of chosen function calls."""

    def __init__(self, sites: list[Site], keep: Callable[[list[Site], Tensor], Tensor]) -> None:
        super().__init__()
        self._sites = sites
        self._keep = keep
        self._calls: Counter[Any] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        here = [site for site in self._sites if site.function is func and site.use == self._calls[func]]
        self._calls[func] += 1
        if here:
            args = (self._keep(here, args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def locate(
    model: nn.Module,
    layer: LayerLike = None,
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
        The site to open a :class:`Trace` with.

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
    watcher = _PoolingWatcher()
    hooks = [
        module.register_forward_hook(watcher.module_hook(name, module))
        for name, module in model.named_modules()
        if name and original(module) is module
    ]
    try:
        with watcher:
            output = run_model(model, images.detach().clone(), predict)
    finally:
        for hook in hooks:
            hook.remove()
    advice = "name a layer that gives (N, C, h, w) activations with layer=..."
    if watcher.found is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no spatial layer: no convolution's output enters a final pooling or "
            f"flattening; {advice}"
        )
    if output_logits(output).ndim > 2:
        raise ConfigurationError(
            f"the output of {type(model).__name__} is itself spatial, {_described(output_logits(output))}, so there is "
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

    def __init__(self) -> None:
        super().__init__()
        self.found: Site | None = None
        self._convolved = False
        self._calls: Counter[Any] = Counter()
        self._uses: Counter[nn.Module] = Counter()
        # All results are held until the end: an id is only unique among the living.
        self._outputs: list[tuple[str, nn.Module, int, Tensor, int]] = []
        self._entered: dict[int, tuple[Tensor, Tensor, Site]] = {}

    def module_hook(self, name: str, module: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs.append((plain_name(name), module, self._uses[module], output, output._version))
            self._uses[module] += 1

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self._calls[func]
        self._calls[func] += 1
        name = getattr(func, "__name__", "")
        entering = args[0] if args and isinstance(args[0], Tensor) else None
        site = None
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


def run_model(model: nn.Module, images: Tensor, predict: Predict | None) -> Any:
    """The model's output, with a helpful error where it has no ``forward``."""
    if predict is not None:
        return predict(model, images)
    try:
        return model(images)
    except NotImplementedError as error:
        # torch's own placeholder raises it; so does Lightning's, which calls torch's.
        if _has_forward(model):
            raise
        raise ConfigurationError(
            f"{type(model).__name__} has no forward(images); pass predict=lambda model, images: ... that returns the "
            "logits"
        ) from error


def _has_forward(model: nn.Module) -> bool:
    forward = inspect.unwrap(type(model).forward)
    return forward.__module__.split(".")[0] not in {"torch", "lightning", "pytorch_lightning"}


def output_logits(output: Any) -> Tensor:
    """The class scores (N, K) in whatever a model returned.

    Args:
        output: A tensor, a mapping or an object with ``logits``, or a tuple whose first tensor they are; one
            logit an image may come as (N,).

    Returns:
        The tensor.

    Raises:
        ConfigurationError: If nothing like that is there.

    Example:
        >>> import torch
        >>> output_logits({"logits": torch.zeros(2, 5), "features": torch.zeros(2, 8)}).shape
        torch.Size([2, 5])
    """
    found: Any = output
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        named = [output[name] for name in ("logits", "out", "output", "scores") if name in output]
        found = named[0] if named else tensors[0] if len(tensors) == 1 else None
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)):
        found = first_tensor(output)
    if not isinstance(found, Tensor) or found.ndim == 0:
        raise ConfigurationError(
            f"no logits found in the model's output, {_described(output)}; expected a tensor (N, K), a mapping or "
            "object with 'logits', or a tuple that starts with them; otherwise pass predict=lambda model, images: ..."
        )
    return found[:, None] if found.ndim == 1 else found


def first_tensor(output: Any) -> Tensor | None:
    """The tensor, or the first one in a tuple or list."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return next((each for each in output if isinstance(each, Tensor)), None)
    return None


def _replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    items: Iterable[Any] = (new if each is old else each for each in output)
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def checked_images(images: Any) -> Tensor:
    """The images, where they fit the contract; otherwise a :class:`ConfigurationError`."""
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        raise ConfigurationError(
            f"images are a floating tensor (N, C, H, W) with at least one image, got {_described(images)}"
        )
    return images


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(repr, list(value)[:8]))}"
    return f"a {type(value).__name__}"
