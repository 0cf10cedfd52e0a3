"""Turn functions over a Trace into explainers: argument checks, chunks of images, targets, resizing."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_interp.checks import check_choice, is_integer
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain.maps import resize_maps
from lightning_interp.model.forward import ContextFactory
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.locate import locate
from lightning_interp.model.outputs import Predict, checked_images
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.targets import Targets, as_targets
from lightning_interp.model.trace import Trace

__all__ = ["FAMILIES", "Explainer", "Family", "explainer"]

Family = Literal["class_activation", "gradients", "perturbation", "attention"]
FAMILIES: tuple[Family, ...] = get_args(Family)

_indices = itertools.count()


class Explainer:
    """An attribution method: ``explainer(model, images, targets, *, layer, ...) -> maps``.

    Args of a call:
        model: Any module; its state is the same before and after the call.
        images: (N, C, H, W) floating, as the model takes them.
        targets: None (each image's predicted class), an int, int64 (N,), or a callable from the model's output to
            scores (N,), in which each score depends on its own row of the output only. The score of a class is its
            logit.
        layer: A module, its dotted name, or None: the tensor that enters the final pooling or flattening; in a
            transformer with a class token, the tokens that enter the last attention. For a list of layers, the map
            of each layer is rectified, divided by its maximum and resized, and the mean of these maps is returned.
            Refused by methods that use no layer.
        call_index: Which call of the layer is meant where the model calls it more than once; the last by default.
        reshape: From the layer's output to (N, C, h, w), for layouts other than (N, C, h, w), (N, h, w, C), and tokens
            (N, T, C) in row-major order behind class and register tokens.
        batch_size: Number of images explained at once; None: all.
        upsample: Whether the maps of a layer are resized bilinearly to the images.
        predict: How to run the model, ``predict(model, images)``; None calls it.
        **options: The method's own options.

    Returns of a call:
        Maps (N, H, W), float32, on the images' device: raw values, signed where the method is; with
        ``upsample=False`` (N, h, w) of the layer. Some methods return more on request, as a tuple.

    Attributes:
        name: The function's name.
        family: ``"class_activation"``, ``"gradients"``, ``"perturbation"`` or ``"attention"``.
        layer: What it needs of a layer: ``"activations"``, ``"gradients"`` (activations, too), or None.
        inputs: Whether it needs the gradient with respect to the images of the pass that it is given.
        perturbed: Whether it runs further passes, with perturbed images or activations.
        upsampled: Whether its maps are resized to the images.
        context: Makes the context in which its pass runs, or None.
        signed: Whether its maps have negative values, with default options and activations that are not negative.
        has_zero: Whether zero has a meaning in its maps.
        options: The names of its own options.
        definition_index: Its position in the order of definition.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        family: Family,
        layer: Literal["activations", "gradients"] | None,
        inputs: bool,
        perturbed: bool,
        upsampled: bool,
        context: ContextFactory | None,
        signed: bool,
        has_zero: bool,
    ) -> None:
        functools.update_wrapper(self, function)
        self.name: str = function.__name__
        self.function = function
        self.family = check_choice("family", family, FAMILIES)
        self.layer = layer
        self.inputs = inputs
        self.perturbed = perturbed
        self.upsampled = upsampled
        self.context = context
        self.signed = signed
        self.has_zero = has_zero
        self.definition_index = next(_indices)
        options = list(inspect.signature(function).parameters.values())[1 if layer is None else 2 :]
        self.options = tuple(option.name for option in options)
        hidden = set() if layer is not None else {"layer", "call_index", "reshape"}
        hidden |= {"options"} if upsampled else {"options", "upsample"}
        common = inspect.signature(self._call).parameters.values()
        shown = [parameter for parameter in common if parameter.name not in hidden]
        self.__signature__ = inspect.Signature([*shown, *options], return_annotation=Tensor)

    def __reduce__(self) -> str:
        return self.name  # pickled by reference, as functions are, so that monitors can be sent to other processes

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
        if batch_size is not None and (not is_integer(batch_size) or batch_size < 1):
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
        layers, is_list = _as_list(layer)
        if not layers or (is_list and not upsample):
            raise ConfigurationError(
                "several layers have maps of several sizes, which are averaged at the images' size; pass at least one "
                f"layer, and upsample=True, got layer={layer!r} and upsample={upsample}"
            )
        with preserve_state(model):
            points: list[HookPoint] = []
            if self.layer is not None:
                located = [locate(model, spec, images, call_index=call_index, predict=predict) for spec in layers]
                points = [replace(point, reshape=reshape) for point in located]
            maps = []
            for start in range(0, len(images), size):
                chunk = slice(start, start + size)
                chunk_targets = targets[chunk] if per_image else targets  # type: ignore[index]
                with Trace.record(
                    model,
                    images[chunk],
                    chunk_targets,
                    layers=self.needs(*points),
                    input_gradients=self.inputs,
                    predict=predict,
                    first_index=start,
                    context=self.context,
                ) as trace:
                    if chunk_targets is not None:
                        trace.resolve_targets(chunk_targets)  # checked even by methods whose maps ignore the targets
                    if is_list:
                        layer_maps = [self.attribute(trace, point, upsample=False, **options) for point in points]
                        maps.append(_average_layers(layer_maps, images.shape[-2:]))
                    else:
                        maps.append(self.attribute(trace, *points, upsample=upsample, **options))
        concatenated: Tensor = _concatenate(maps)
        return concatenated

    def check(self, layer: object, options: Mapping[str, object], call_index: int = -1, reshape: object = None) -> None:
        """Raise a :class:`ConfigurationError` for arguments that this method does not take."""
        layer_arguments = {
            "layer": layer,
            "call_index": None if call_index == -1 else call_index,
            "reshape": reshape,
        }
        for name, value in layer_arguments.items():
            if self.layer is None and value is not None:
                raise ConfigurationError(f"{self.name} explains pixels and takes no {name}; leave {name}={value!r} out")
        if call_index != -1 and layer is None:
            raise ConfigurationError(f"call_index={call_index} is a call of the layer that is named; pass layer=, too")
        unknown = [name for name in options if name not in self.options]
        if unknown:
            known = ", ".join(self.options) or "none of its own"
            raise ConfigurationError(f"{self.name} has no option {unknown[0]!r}; it takes {known}")

    def needs(self, *points: HookPoint | None) -> dict[HookPoint, bool]:
        """Return the points that a Trace must tap for this method, and whether it must compute their gradients."""
        return {point: self.layer == "gradients" for point in points if point is not None}

    def attribute(
        self, trace: Trace, point: HookPoint | None = None, *, upsample: bool = True, **options: Any
    ) -> Tensor:
        """Return the maps of an open Trace, which was made for what this method needs.

        Args:
            trace: The open Trace; a method with a context runs one more pass where the Trace was made in another one.
            point: The layer, where the method needs one.
            upsample: Whether maps of a layer are resized to the images.
            **options: The method's own options.

        Returns:
            (N, H, W) float32 on the images' device.

        Raises:
            ConfigurationError: If the layer's activations are not (N, C, h, w), with one row for each image.
        """
        if self.context is not None and trace.context is not self.context:
            with trace.rerun_in(self.context, input_gradients=self.inputs) as rerun:
                return self.attribute(rerun, upsample=upsample, **options)
        if point is None:
            maps = self.function(trace, **options)
        else:
            shape = trace.activations(point).shape
            if len(shape) != 4:
                raise ConfigurationError(
                    f"the layer {point.name!r} gives activations {tuple(shape)}, which have no spatial positions; "
                    "choose a layer that gives (N, C, h, w), or convert them with reshape="
                )
            if shape[0] != len(trace.images):
                raise ConfigurationError(
                    f"the layer {point.name!r} gives {shape[0]} maps for {len(trace.images)} images, expected one for "
                    "each; pass batch_size=1 where it runs image by image, or merge several maps with reshape="
                )
            maps = self.function(trace, point, **options)
        if self.upsampled and upsample:
            maps = resize_maps(maps, trace.images.shape[-2:])
        finished: Tensor = _finish(maps, trace.images.device)
        return finished


def _finish(maps: Any, device: torch.device) -> Any:
    """Detach a method's result and move it to the device, floating tensors as float32."""
    if isinstance(maps, tuple):
        return tuple(_finish(part, device) for part in maps)
    return maps.detach().to(device, torch.float32 if maps.is_floating_point() else maps.dtype)


def _as_list(layer: object) -> tuple[list[Any], bool]:
    """Return the layers, and whether they were given as a list."""
    return (list(layer), True) if isinstance(layer, (list, tuple)) else ([layer], False)


def _average_layers(maps: list[Tensor], size: Sequence[int]) -> Tensor:
    """Return the mean of several layers' maps, each rectified, divided by its maximum, and resized."""
    scaled = []
    for layer_map in maps:
        rectified = layer_map.relu()
        highest = rectified.amax(tuple(range(1, rectified.ndim)), keepdim=True)
        scaled.append(resize_maps(rectified / highest.where(highest > 0, 1), size))
    return torch.stack(scaled).mean(0)


def _concatenate(chunks: list[Any]) -> Any:
    """Concatenate the results of all chunks, which are tensors or tuples of tensors."""
    if isinstance(chunks[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))
    return torch.cat(chunks)


def explainer(
    *,
    family: Family,
    layer: Literal["activations", "gradients"] | None = None,
    inputs: bool = False,
    perturbed: bool = False,
    upsampled: bool | None = None,
    context: ContextFactory | None = None,
    signed: bool = False,
    has_zero: bool = True,
) -> Callable[[Callable[..., Any]], Explainer]:
    """Make an explainer of a function ``function(trace, [layer,] **options) -> maps``.

    All lists of explainers (monitors, documentation, contract tests, benchmarks) derive from these declarations.

    Args:
        family: Which kind of method it is; see :class:`Explainer`.
        layer: Whether it needs a layer's activations, or its activations and gradients.
        inputs: Whether it needs the gradient with respect to the images.
        perturbed: Whether it runs further passes, with perturbed images or activations.
        upsampled: Whether its maps are resized to the images unless ``upsample=False``; None: those of layers are.
        context: Makes the context in which its pass runs, for a method without a layer; entering it returns the
            Trace's ``mode``.
        signed: Whether its maps have negative values, with default options and activations that are not negative.
        has_zero: Whether zero has a meaning in its maps; otherwise only differences between positions have one.

    Returns:
        The decorator.

    Raises:
        ConfigurationError: If the family is unknown.
    """
    return functools.partial(
        Explainer,
        family=family,
        layer=layer,
        inputs=inputs,
        perturbed=perturbed,
        upsampled=layer is not None if upsampled is None else upsampled,
        context=context,
        signed=signed,
        has_zero=has_zero,
    )
