"""What turns a definition over a Trace into a public explainer: passes, chunks, targets and resizing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.forward import ContextFactory
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.locate import locate
from lightning_interp.model.outputs import Predict, checked_images
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.targets import Targets, as_targets
from lightning_interp.model.trace import Trace

__all__ = ["Explainer", "explainer"]


class Explainer:
    """A way to ask where a model looks: ``explainer(model, images, targets, *, layer, ...) -> maps``.

    Args of a call:
        model: Any module; it is left exactly as it was found.
        images: (N, C, H, W) floating, as the model takes them.
        targets: None (each image's predicted class), an int, int64 (N,), or a callable from the model's output to
            scores (N,), each from its own row of the output. The score of a class is its logit.
        layer: A module, its dotted name, or None: the tensor that enters the final pooling or flattening; in a
            transformer with a class token, the tokens that enter the last attention. A list stands for several layers
            at once: the map of each is rectified, divided by its maximum and resized, and their mean is returned.
            Methods that look at pixels only refuse it.
        call_index: Which call of the layer is meant where the model uses it more than once; the last by default.
        reshape: From what the layer gives to (N, C, h, w), where its places are in no order that is known: known are
            (N, C, h, w), (N, h, w, C), and tokens (N, T, C) row by row behind class and register tokens.
        batch_size: How many images are explained at once; None: all.
        upsample: Whether the maps of a layer are resized bilinearly to the images.
        predict: How to run the model, ``predict(model, images)``; None calls it.
        **options: What the method itself takes.

    Returns of a call:
        Maps (N, H, W), float32, on the images' device: raw values, signed where the method is; with
        ``upsample=False`` (N, h, w) of the layer. Some methods give more on request, as a tuple.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        layer: Literal["activations", "gradients"] | None,
        inputs: bool,
        upsampled: bool,
        context: ContextFactory | None,
        has_zero: bool,
    ) -> None:
        functools.update_wrapper(self, function)
        self.name: str = function.__name__
        self.function = function
        self.layer = layer
        self.inputs = inputs
        self.upsampled = upsampled
        self.context = context
        self.has_zero = has_zero
        own = list(inspect.signature(function).parameters.values())[1 if layer is None else 2 :]
        self.options = tuple(each.name for each in own)
        common = inspect.signature(self._call).parameters
        hidden = set() if layer is not None else {"layer", "call_index", "reshape"}
        hidden |= {"options"} if upsampled else {"options", "upsample"}
        shown = [each for name, each in common.items() if name not in hidden]
        last = [each for each in shown if each.kind is each.VAR_KEYWORD]
        self.__signature__ = inspect.Signature(
            [each for each in shown if each not in last] + own, return_annotation=Tensor
        )

    def __reduce__(self) -> str:
        return self.name  # found again by its name in its module, so that monitors can be sent to other processes

    def __repr__(self) -> str:
        return f"<explainer {self.name}>"

    def __call__(self, model: nn.Module, images: Tensor, targets: Targets = None, **options: Any) -> Tensor:
        return self._call(model, images, targets, **options)

    def _call(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Targets = None,
        *,
        layer: str | nn.Module | Sequence[str | nn.Module] | None = None,
        call_index: int = -1,
        reshape: Callable[[Tensor], Tensor] | None = None,
        batch_size: int | None = None,
        upsample: bool = True,
        predict: Predict | None = None,
        **options: Any,
    ) -> Tensor:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model is a torch.nn.Module, got a {type(model).__name__}")
        checked_images(images)
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigurationError(f"batch_size takes a positive integer or None, got {batch_size!r}")
        self.check(layer, options, call_index, reshape)
        size = batch_size or len(images)
        targets = as_targets(targets)
        per_image = isinstance(targets, Tensor) and targets.ndim > 0
        if per_image and len(targets) != len(images):  # type: ignore[arg-type]
            raise ConfigurationError(
                f"targets has {len(targets)} entries, expected one class for each of the "  # type: ignore[arg-type]
                f"{len(images)} images"
            )
        layers, several = _listed(layer)
        if not layers or (several and not upsample):
            raise ConfigurationError(
                "several layers have maps of several sizes, which are averaged at the images' size; pass at least one "
                f"layer, and upsample=True, got layer={layer!r} and upsample={upsample}"
            )
        with preserve_state(model):
            sites = []
            if self.layer is not None:
                found = [locate(model, each, images, call_index=call_index, predict=predict) for each in layers]
                sites = [replace(site, reshape=reshape) for site in found]
            maps = []
            for start in range(0, len(images), size):
                chunk = slice(start, start + size)
                aim = targets[chunk] if per_image else targets  # type: ignore[index]
                with Trace.record(
                    model,
                    images[chunk],
                    aim,
                    layers=self.needs(*sites),
                    input_gradients=self.inputs,
                    predict=predict,
                    first_index=start,
                    context=self.context,
                ) as trace:
                    if aim is not None:
                        trace.resolve_targets(aim)  # checked, though some methods are the same for all targets
                    if several:
                        looks = [self.attribute(trace, site, upsample=False, **options) for site in sites]
                        maps.append(_combined(looks, images.shape[-2:]))
                    else:
                        maps.append(self.attribute(trace, *sites, upsample=upsample, **options))
        joined: Tensor = _joined(maps)
        return joined

    def check(self, layer: object, options: Mapping[str, object], call_index: int = -1, reshape: object = None) -> None:
        """Raise where a layer, what is said of one, or an option is given that this method does not take."""
        of_layers = {"layer": layer, "call_index": None if call_index == -1 else call_index, "reshape": reshape}
        for name, given in of_layers.items():
            if self.layer is None and given is not None:
                raise ConfigurationError(f"{self.name} explains pixels and takes no {name}; leave {name}={given!r} out")
        if call_index != -1 and layer is None:
            raise ConfigurationError(f"call_index={call_index} is a call of the layer that is named; pass layer=, too")
        unknown = [name for name in options if name not in self.options]
        if unknown:
            known = ", ".join(self.options) or "none of its own"
            raise ConfigurationError(f"{self.name} has no option {unknown[0]!r}; it takes {known}")

    def needs(self, *sites: HookPoint | None) -> dict[HookPoint, bool]:
        """The sites that a Trace must tap for this method, each with whether its gradient is wanted."""
        return {site: self.layer == "gradients" for site in sites if site is not None}

    def attribute(
        self, trace: Trace, site: HookPoint | None = None, *, upsample: bool = True, **options: Any
    ) -> Tensor:
        """The maps of one open Trace, which was made for what this method needs.

        Args:
            trace: The look at the model; a method that looks under a context of its own takes a look more where this
                one is not.
            site: The layer, where the method needs one.
            upsample: Whether maps of a layer are resized to the images.
            **options: What the method takes.

        Returns:
            (N, H, W) float32 on the images' device.
        """
        if self.context is not None and trace.context is not self.context:
            with trace.rerun_in(self.context, input_gradients=self.inputs) as look:
                return self.attribute(look, upsample=upsample, **options)
        if site is None:
            maps = self.function(trace, **options)
        else:
            shape = trace.activations(site).shape
            if len(shape) != 4:
                raise ConfigurationError(
                    f"the layer {site.name!r} gives activations {tuple(shape)}, which have no places in the image; "
                    "choose a layer that gives (N, C, h, w), or say how to make that of them with reshape="
                )
            if shape[0] != len(trace.images):
                raise ConfigurationError(
                    f"the layer {site.name!r} gives {shape[0]} maps for {len(trace.images)} images, expected one for "
                    "each; pass batch_size=1 where it sees them one by one, or make one of several with reshape="
                )
            maps = self.function(trace, site, **options)
        if self.upsampled and upsample:
            maps = _resized(maps, trace.images.shape[-2:])
        finished: Tensor = _finished(maps, trace.images.device)
        return finished


def _finished(found: Any, device: torch.device) -> Any:
    """What a definition gave: detached, in float32 where it is no whole number, on the device."""
    if isinstance(found, tuple):
        return tuple(_finished(each, device) for each in found)
    return found.detach().to(device, torch.float32 if found.is_floating_point() else found.dtype)


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return interpolate(maps[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def _listed(layer: object) -> tuple[list[Any], bool]:
    """The layers, and whether several were asked for."""
    return (list(layer), True) if isinstance(layer, (list, tuple)) else ([layer], False)


def _combined(maps: list[Tensor], size: torch.Size) -> Tensor:
    """The mean of several layers' maps, each rectified, divided by its own maximum, and resized."""
    rectified = [each.relu() for each in maps]
    peaks = [each.amax(tuple(range(1, each.ndim)), keepdim=True) for each in rectified]
    parts = [_resized(each / peak.where(peak > 0, 1), size) for each, peak in zip(rectified, peaks, strict=True)]
    return torch.stack(parts).mean(0)


def _joined(parts: list[Any]) -> Any:
    """The chunks as one; some methods give a tuple on request."""
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))
    return torch.cat(parts)


def explainer(
    *,
    layer: Literal["activations", "gradients"] | None = None,
    inputs: bool = False,
    upsampled: bool | None = None,
    context: ContextFactory | None = None,
    has_zero: bool = True,
) -> Callable[[Callable[..., Any]], Explainer]:
    """Make an explainer of a definition, ``function(trace, [layer,] **options) -> maps``.

    Args:
        layer: Whether it needs a layer's activations, or its gradients, too.
        inputs: Whether it needs the gradient towards the images.
        upsampled: Whether its maps are resized to the images unless ``upsample=False``; None: those of layers are.
        context: Makes the context that its pass runs in, for a method without a layer; the Trace's ``mode`` is what it
            gives.
        has_zero: Whether zero means anything in its maps; otherwise only differences between positions do.

    Returns:
        The decorator.
    """
    resized = layer is not None if upsampled is None else upsampled
    return lambda function: Explainer(function, layer, inputs, resized, context, has_zero)
