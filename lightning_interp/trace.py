"""One recorded forward pass, and the only place that registers hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from lightning_interp.errors import ConfigurationError
from lightning_interp.guard import undisturbed
from lightning_interp.outputs import Predict, checked_images, first_tensor, output_logits, run_model
from lightning_interp.targets import Targets, chosen_classes, target_scores
from lightning_interp.tokens import to_grid

__all__ = ["Site", "Trace", "Under", "listening", "replacing", "run_until"]

Under = Callable[[], AbstractContextManager[Any]]

_IMAGES_AT_ONCE = 16  # where an image must be run again for each of many tensors


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a forward pass whose tensor can be tapped.

    Args:
        name: What a person calls it.
        module: The module whose output it is, or None.
        function: Without a module: the function whose input it is.
        use: Which call of the module (negative: counted from the last) or of the function.
        reshape: From what passes to (N, C, h, w); None: :func:`~lightning_interp.tokens.to_grid`.
    """

    name: str
    module: nn.Module | None = None
    function: Callable[..., Any] | None = None
    use: int = -1
    reshape: Callable[[Tensor], Tensor] | None = None


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
        layers: The sites to tap (see :func:`~lightning_interp.spatial.locate`), each with whether its gradient is
            wanted.
        input_gradients: Whether the gradient towards the images is wanted.
        predict: How to run the model, ``predict(model, images)``; None calls it.
        offset: Where ``images`` start in the batch they were cut from.
        under: Makes a context that the pass, and all that is asked of the look, happens in; what it gives is
            ``mode``.

    Raises:
        ConfigurationError: If images or targets do not fit the contract, a layer did not run, or the model ran
            without gradients.

    Example:
        >>> import torch
        >>> from lightning_interp.spatial import locate
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
        under: Under | None = None,
    ) -> None:
        self.model = model
        self.images = checked_images(images)
        self.predict = predict
        self.offset = offset
        self.under = under
        self.mode: Any = None
        self._asked = targets
        self._sites = dict(layers or {})
        self._wants_inputs = input_gradients
        self._stack = ExitStack()
        self._kept: dict[Site, list[Tensor]] = {}
        self._leaf: Tensor | None = None
        self._outputs: list[Any] = []  # what the model returned and, once asked for, its logits; for all that are aimed
        self._recording = False
        self._asking: list[Tensor] = []
        self._gradients: dict[object, dict[Site | None, Tensor | None]] = {}

    def __enter__(self) -> Trace:
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model))
            if self.under is not None:
                self.mode = stack.enter_context(self.under())
            stack.callback(self._end_graph)
            self._run(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kept.clear()
        self._gradients.clear()
        self._leaf = self.mode = None
        self._outputs.clear()
        self._stack.__exit__(kind, error, traceback)

    @property
    def output(self) -> Any:
        """What the model returned."""
        return self._outputs[0]

    @property
    def logits(self) -> Tensor:
        """(N, K) the class scores in the output, where it holds any: a callable may read other things."""
        if len(self._outputs) == 1:
            logits = output_logits(self.output)
            if len(logits) != len(self.images):
                raise ConfigurationError(
                    f"the model gave {len(logits)} outputs for {len(self.images)} images; expected one for each"
                )
            self._outputs.append(logits)
        found: Tensor = self._outputs[1]
        return found

    @property
    def asked(self) -> Targets:
        """The targets as they were given."""
        return self._asked

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
        return targets if callable(targets) else chosen_classes(targets, self.logits)

    def aimed(self, targets: Targets) -> Trace:
        """The same look with other targets: shares the forward pass, and lives no longer than this one."""
        other = object.__new__(Trace)
        other.__dict__.update(self.__dict__)
        other._asked = targets
        return other

    def again(self, images: Tensor, rows: Tensor | None = None, *, input_gradients: bool = True) -> Trace:
        """Another look, at changed images of the same targets.

        Args:
            images: (M, C, H, W) the changed images.
            rows: int64 (M,) which image of this look each was made of, whose target it keeps; None: all, in order.
            input_gradients: Whether the gradient towards them is wanted.

        Returns:
            The look, not yet open.
        """
        targets = self.targets
        if rows is not None and not callable(targets):
            targets = targets[rows.to(targets.device)]
        return Trace(
            self.model, images, targets, input_gradients=input_gradients, predict=self.predict, offset=self.offset
        )

    def within(self, under: Under, *, input_gradients: bool = False) -> Trace:
        """The same look once more, in another context, which must leave the model's output as it is."""
        return Trace(
            self.model,
            self.images,
            self._asked,
            input_gradients=input_gradients,
            predict=self.predict,
            offset=self.offset,
            under=under,
        )

    def activations(self, layer: Site) -> Tensor:
        """What the layer gave, detached, in its own dtype: (N, C, h, w) where it has places, tokens included."""
        return self._as_grid(layer, self._tensor(layer).detach())

    def gradients(self, layer: Site) -> Tensor:
        """The gradient of each image's score towards the layer's output, as :meth:`activations` gives it."""
        return self._as_grid(layer, self._gradient(layer))

    def input_gradients(self) -> Tensor:
        """The gradient of each image's score towards the image, (N, C, H, W)."""
        return self._gradient(None)

    def passing(self, layer: Site) -> Tensor:
        """What passes the layer, detached, as the model has it: tokens as (N, T, C), channels where they are."""
        return self._tensor(layer).detach()

    def replayed(self, layer: Site, tensors: Tensor, row: int) -> Tensor:
        """The scores of one image where other tensors pass a layer in place of its own, without a graph.

        What comes before the layer runs once, for the one image; where the model does not take many for one, as often
        as there are tensors.

        Args:
            layer: Where.
            tensors: (K, ...) laid out as :meth:`passing` gives them; not changed.
            row: The number of the image.

        Returns:
            (K,) float32.
        """
        site = replace(layer, use=range(len(self._kept[layer]))[layer.use] if layer.module else layer.use)
        image, count = self.images[row : row + 1].detach(), len(tensors)
        targets = self.targets

        def scores(images: Tensor, given: Tensor) -> Tensor:
            # The model may change in place what passes, and its images.
            with torch.no_grad(), replacing(site, lambda passing: given.clone()):
                output = run_model(self.model, images.clone(), self.predict)
            if not callable(targets) and len(output_logits(output)) != len(given):
                raise ConfigurationError(
                    f"the model gave {len(output_logits(output))} outputs for {len(given)} tensors at {layer.name!r}"
                )
            return target_scores(output, targets if callable(targets) else targets[row].expand(len(given)), len(given))

        if count > 1:
            try:
                return scores(image, tensors)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                pass  # a model that counted its images objects in many ways; a fault of its own comes again
        parts = torch.split(tensors, _IMAGES_AT_ONCE)
        return torch.cat([scores(image.expand(len(part), -1, -1, -1), part) for part in parts])

    def _as_grid(self, layer: Site, tensor: Tensor) -> Tensor:
        if layer.reshape is not None:
            return layer.reshape(tensor)
        height, width = self.images.shape[-2:]
        return to_grid(tensor, (height, width))

    def _run(self, stack: ExitStack) -> None:
        images = self.images.detach().clone()  # the model may change its input in place
        if self._wants_inputs:
            self._leaf = images.requires_grad_()
            images = images.clone()
            self._begin_graph()
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
        self._outputs.append(output)
        for site, kept in self._kept.items():
            if not kept:
                raise _never_ran(site)

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
            if not self._recording:
                return tensor  # another pass, which asks for no gradient, while this look is open
            raise ConfigurationError(
                f"the layer {sites[0].name!r} runs without gradients inside the model's forward pass (torch.no_grad, "
                "or checkpointing with use_reentrant=True); checkpoint with use_reentrant=False, or name another layer"
            )
        kept = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        if kept is not tensor:
            self._begin_graph()
        if self._recording:
            for site in sites:
                self._kept[site].append(kept)
        return kept.clone()

    def _begin_graph(self) -> None:
        """Make attention quick from here on.

        torch multiplies tokens that are laid out as (T, N, C) by a weight that asks for no gradient one position after
        another, which takes three times as long. Nobody computes the gradient that is asked for here.
        """
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return  # it would keep a copy of the weight that asks for a gradient, too
        for module in self.model.modules():
            weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else None
            if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_inference():
                continue
            if not weight.requires_grad:
                self._asking.append(weight.requires_grad_())

    def _end_graph(self) -> None:
        for weight in self._asking:
            weight.requires_grad_(False)
        self._asking.clear()

    def _tensor(self, site: Site) -> Tensor:
        kept = self._kept[site]
        if site.module is None:
            return kept[0]  # only the call that is meant was tapped
        try:
            return kept[site.use]
        except IndexError:
            raise ConfigurationError(
                f"the layer {site.name!r} ran {len(kept)} times; there is no use {site.use}"
            ) from None

    def _scores(self, targets: Tensor | Callable[[Any], Tensor]) -> Tensor:
        return target_scores(self.output, targets, len(self.images))

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
                functions = [site.name for site in self._sites if site.module is None]
                if functions and isinstance(error, CheckpointError):
                    raise ConfigurationError(
                        f"the layer {functions[0]!r} is a function inside a checkpointed block, which cannot be found "
                        "again when the block runs once more for the gradient; name a module with layer=..."
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


@contextmanager
def listening(modules: Mapping[str, nn.Module], heard: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Listen to forward passes that run anyway; what passes is left as it is.

    Args:
        modules: Named modules.
        heard: Called with a module's name, the module and its output, each time it ran.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with listening(dict(model.named_children()), lambda name, module, output: print(name, output.shape)):
        ...     _ = model(torch.zeros(1, 2))
        0 torch.Size([1, 3])
        1 torch.Size([1, 3])
    """

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> None:
        heard(name, module, output)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(hook, name)).remove)
        yield


@contextmanager
def replacing(site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what passes a site, in forward passes that run inside.

    Args:
        site: Where.
        change: From the tensor that passes to the one that is handed on.

    Example:
        >>> import torch
        >>> from lightning_interp.spatial import locate
        >>> model = nn.Sequential(nn.Identity(), nn.Identity())
        >>> with replacing(locate(model, "0"), lambda tensor: tensor + 1):
        ...     model(torch.zeros(2))
        tensor([1., 1.])
    """
    calls = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        tensor = first_tensor(output)
        if tensor is None or site.use not in (-1, calls - 1):
            return output
        return _replaced(output, tensor, change(tensor))

    with ExitStack() as stack:
        if site.module is None:
            stack.enter_context(_FunctionTap([site], lambda sites, tensor: change(tensor)))
        else:
            stack.callback(site.module.register_forward_hook(hook).remove)
        yield


class _Reached(Exception):  # noqa: N818 (no error: it ends a pass where it need not go on)
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def run_until(model: nn.Module, images: Tensor, site: Site) -> Tensor:
    """What passes a site, with its graph; nothing after it runs.

    Args:
        model: The model.
        images: (N, C, H, W) as the model takes them.
        site: Where to stop.

    Returns:
        The tensor.

    Raises:
        ConfigurationError: If the pass never comes there.

    Example:
        >>> import torch
        >>> from lightning_interp.spatial import locate
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
        >>> run_until(model, torch.zeros(1, 3, 8, 8), locate(model, "0")).shape  # the lazy layer stays lazy
        torch.Size([1, 4, 6, 6])
    """

    def stop(tensor: Tensor) -> Tensor:
        raise _Reached(tensor)

    try:
        with replacing(site, stop):
            run_model(model, images, None)
    except _Reached as reached:
        return reached.tensor
    raise _never_ran(site)


def _never_ran(site: Site) -> ConfigurationError:
    return ConfigurationError(
        f"the layer {site.name!r} did not run in the model's forward pass; choose a layer that does"
    )


def _replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    items: Iterable[Any] = (new if each is old else each for each in output)
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
