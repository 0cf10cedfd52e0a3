"""The interface of explainers to a model: a forward pass and the targets of its explanation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace as with_fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.forward import ContextFactory, ForwardPass
from lightning_interp.model.hooks import HookPoint, replace
from lightning_interp.model.layout import to_grid
from lightning_interp.model.outputs import Predict, output_logits, run_model
from lightning_interp.model.targets import Targets, resolve_classes, target_scores

__all__ = ["LayerSpec", "Trace"]

LayerSpec = str | nn.Module | None  # a dotted name, a module, or the last spatial layer

_MAX_COPIES = 16  # of an image in one pass, where it must be repeated for each of many tensors
# RuntimeErrors by which a model refuses more tensors than images.
_SHAPE_ERROR = re.compile("size|shape|batch|dimension", re.IGNORECASE)


class Trace:
    """A view of a forward pass for given targets, valid as long as the pass is open.

    Gradients are computed when one is first requested, for all tapped layers together, and cached in the pass.

    Args:
        forward_pass: The open pass.
        targets: A class for all images, int64 (N,) classes, a callable from the model's output to
            scores (N,), or None for each image's predicted class.
        layers: The hook points of layers given by name or module.

    Raises:
        ConfigurationError: On first use of the targets, if they do not fit the output.

    Example:
        >>> import torch
        >>> from lightning_interp.model.locate import locate
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
        >>> convolution = locate(model, "0")
        >>> with Trace.record(model, torch.rand(5, 3, 8, 8), targets=1, layers={convolution: True}) as trace:
        ...     (trace.logits.shape, trace.activations(convolution).shape, trace.gradients(convolution).shape)
        (torch.Size([5, 2]), torch.Size([5, 4, 6, 6]), torch.Size([5, 4, 6, 6]))
    """

    def __init__(
        self, forward_pass: ForwardPass, targets: Targets = None, layers: Mapping[Any, HookPoint] | None = None
    ) -> None:
        self._pass = forward_pass
        self._layers = layers or {}
        self.requested_targets = targets

    @classmethod
    @contextmanager
    def record(cls, model: nn.Module, images: Tensor, targets: Targets = None, **options: Any) -> Iterator[Trace]:
        """Run a forward pass, and yield its Trace.

        Args:
            model: The module to run.
            images: (N, C, H, W) floating, as the model takes them.
            targets: As for :class:`Trace`.
            **options: As for :class:`~lightning_interp.model.forward.ForwardPass`.
        """
        with ForwardPass(model, images, **options) as forward_pass:
            yield cls(forward_pass, targets)

    # ---- The pass.

    @property
    def model(self) -> nn.Module:
        """The module that ran."""
        return self._pass.model

    @property
    def images(self) -> Tensor:
        """(N, C, H, W) the images."""
        return self._pass.images

    @property
    def predict(self) -> Predict | None:
        """How the model is run; None: it is called."""
        return self._pass.predict

    @property
    def first_index(self) -> int:
        """The index of the first image in the batch that the images were cut from."""
        return self._pass.first_index

    @property
    def context(self) -> ContextFactory | None:
        """The factory of the context in which the pass ran."""
        return self._pass.context

    @property
    def mode(self) -> Any:
        """The value that entering the context returned."""
        return self._pass.mode

    @property
    def output(self) -> Any:
        """The model's output."""
        return self._pass.output

    @property
    def logits(self) -> Tensor:
        """(N, K) the class scores in the output."""
        return self._pass.logits

    # ---- Targets.

    @property
    def targets(self) -> Tensor | Callable[[Any], Tensor]:
        """The targets: int64 (N,) classes on the logits' device, or the callable."""
        return self.resolve_targets(self.requested_targets)

    @property
    def scores(self) -> Tensor:
        """(N,) the explained score of each image, in float32: its target's logit, or the callable's score."""
        return target_scores(self.output, self.targets, len(self.images))

    def resolve_targets(self, targets: Targets) -> Tensor | Callable[[Any], Tensor]:
        """Return targets as int64 (N,), checked against the logits; a callable as it is."""
        return targets if callable(targets) else resolve_classes(targets, self.logits)

    def with_targets(self, targets: Targets) -> Trace:
        """Return a view of the same pass for other targets."""
        return Trace(self._pass, targets, self._layers)

    # ---- Other passes.

    @contextmanager
    def on_images(self, images: Tensor, rows: Tensor | None = None, *, input_gradients: bool = True) -> Iterator[Trace]:
        """Run another pass on perturbed images with the same targets.

        Args:
            images: (M, C, H, W) the perturbed images.
            rows: int64 (M,) the index of the image whose target each of them has; None: all, in order.
            input_gradients: Whether the gradient with respect to them is computed.
        """
        targets = self.targets
        if rows is not None and not callable(targets):
            targets = targets[rows.to(targets.device)]
        options = {"input_gradients": input_gradients, "predict": self.predict, "first_index": self.first_index}
        with Trace.record(self.model, images, targets, **options) as trace:
            yield trace

    @contextmanager
    def rerun_in(self, context: ContextFactory, *, input_gradients: bool = False) -> Iterator[Trace]:
        """Run the same pass once more in another context, which must not change the model's output."""
        options = {"input_gradients": input_gradients, "predict": self.predict, "first_index": self.first_index}
        with Trace.record(self.model, self.images, self.requested_targets, context=context, **options) as trace:
            yield trace

    # ---- Layers.

    def layer(self, spec: LayerSpec = None) -> HookPoint:
        """Return the hook point of a layer that this Trace was made for.

        Args:
            spec: A dotted name, a module, or None for the last spatial layer.

        Raises:
            ConfigurationError: If the Trace was not made for it.
        """
        if spec not in self._layers:
            raise ConfigurationError(f"this Trace was not made for the layer {spec!r}; name it in needs()")
        return self._layers[spec]

    def activations(self, layer: HookPoint | LayerSpec) -> Tensor:
        """Return the layer's output, detached, in its dtype: (N, C, h, w) where it is spatial, also for tokens."""
        point = self._point(layer)
        return self._as_grid(point, self.raw_activations(point))

    def gradients(self, layer: HookPoint | LayerSpec) -> Tensor:
        """Return the gradient of each image's score with respect to :meth:`activations`, in their layout."""
        point = self._point(layer)
        return self._as_grid(point, self._gradient(point))

    def input_gradients(self) -> Tensor:
        """Return the gradient of each image's score with respect to the image, (N, C, H, W)."""
        return self._gradient(None)

    def raw_activations(self, layer: HookPoint) -> Tensor:
        """Return the layer's output, detached, in the model's layout, such as tokens (N, T, C)."""
        return self._pass.tensor(layer).detach()

    def scores_with_patched(self, layer: HookPoint, tensors: Tensor, row: int) -> Tensor:
        """Return the scores of one image with other tensors as a layer's output, without a graph.

        The preceding layers run once, on the one image; where the model does not accept more tensors than images, on
        as many copies of it.

        Args:
            layer: The layer.
            tensors: (K, ...) in the layout of :meth:`raw_activations`; not modified.
            row: The index of the image.

        Returns:
            (K,) float32.
        """
        point = with_fields(layer, call_index=self._pass.call_number(layer))
        image, count = self.images[row : row + 1].detach(), len(tensors)
        targets = self.targets

        def scores(images: Tensor, patches: Tensor) -> Tensor:
            # The model may modify activations and images in place.
            with torch.no_grad(), replace(point, lambda tensor: patches.clone()):
                output = run_model(self.model, images.clone(), self.predict)
            if not callable(targets) and len(output_logits(output)) != len(patches):
                raise ConfigurationError(
                    f"the model gave {len(output_logits(output))} outputs for {len(patches)} tensors at {layer.name!r}"
                )
            rows = targets if callable(targets) else targets[row].expand(len(patches))
            return target_scores(output, rows, len(patches))

        if count > 1:
            try:
                return scores(image, tensors)
            except torch.OutOfMemoryError:
                raise
            except ConfigurationError:
                pass  # one output, as there is one image
            except RuntimeError as error:
                if not _SHAPE_ERROR.search(str(error)):
                    raise
        parts = torch.split(tensors, _MAX_COPIES)
        return torch.cat([scores(image.expand(len(part), -1, -1, -1), part) for part in parts])

    def _point(self, layer: HookPoint | LayerSpec) -> HookPoint:
        return layer if isinstance(layer, HookPoint) else self.layer(layer)

    def _as_grid(self, layer: HookPoint, tensor: Tensor) -> Tensor:
        if layer.reshape is not None:
            return layer.reshape(tensor)
        height, width = self.images.shape[-2:]
        return to_grid(tensor, (height, width))

    def _gradient(self, layer: HookPoint | None) -> Tensor:
        targets = self.targets
        key: object = targets if callable(targets) else tuple(targets.tolist())
        return self._pass.gradient(lambda: target_scores(self.output, targets, len(self.images)), key, layer)
