"""One monitor's state over one validation or test pass, and the batch that is being run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.contract import ProbeMonitor, StreamMonitor
from lightning_interp.callbacks.inputs import StreamBatch
from lightning_interp.callbacks.run.probe_pass import ProbePass
from lightning_interp.callbacks.run.runner import ModelRunner
from lightning_interp.callbacks.run.samples import SampleIndices
from lightning_interp.data.annotations import Annotations, dataset_annotations, unpack_annotated
from lightning_interp.data.batches import unpack_batch
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.model.forward import ForwardPass
from lightning_interp.model.hooks import HookPoint, tap
from lightning_interp.model.layout import to_grid
from lightning_interp.model.locate import unwrap_compiled
from lightning_interp.model.outputs import first_tensor, output_logits
from lightning_interp.model.preserve import isolate_rng, preserve_state
from lightning_interp.model.trace import LayerSpec

__all__ = ["Stream", "stream_layers"]


class Stream:
    """The state of a monitor over one pass: taps the steps, reads batches, and updates.

    Args:
        monitor: The monitor.
        module: The module.
        loader: The loader whose batches come.
        runner: How the module is run.
        probe_pass: Runs passes of the monitor's own.
    """

    def __init__(
        self,
        monitor: StreamMonitor,
        module: LightningModule,
        loader: Any,
        runner: ModelRunner,
        probe_pass: ProbePass,
    ) -> None:
        self._monitor = monitor
        self._runner = runner
        self._probe_pass = probe_pass
        self._indices: SampleIndices | None = None
        self._loader = loader
        # Not in trainer.validate's inference mode: none of its tensors can be added to.
        with torch.inference_mode(False), isolate_rng():
            self._state = monitor.begin(module, runner.device)
        if not isinstance(self._state, (Metric, MetricCollection)):
            raise TypeError(
                f"{monitor!r}: begin() must return a torchmetrics Metric or MetricCollection, which is synchronised "
                f"over the ranks, got {describe(self._state)}"
            )
        self._taps = ExitStack()
        self._batch: StreamBatch | None = None
        self._activations: dict[LayerSpec, Tensor] = {}

    def before_batch(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read the batch, and tap the layers of the step that comes."""
        unpack = self._monitor.unpack
        annotations = None
        if self._monitor.uses_annotations:
            images, labels, annotations = unpack_annotated(batch, unpack)
        else:
            images, labels = unpack_batch(batch, unpack)
        self._indices = self._indices or SampleIndices(self._loader)
        items = self._indices.batch(batch_idx, len(images))
        if self._monitor.uses_annotations and annotations is None and items is not None:
            annotations = dataset_annotations(self._indices.dataset, items[0], images.shape)
        if self._monitor.uses_annotations and annotations is None:
            return
        layers = stream_layers(self._monitor, module)
        is_tapped = bool(layers) and not self._runner.is_collective and not _is_compiled(module)
        images = images.clone()  # the step may change them in place
        indices, counts = (None, [True] * len(images)) if items is None else items
        self._batch = self._stream_batch(module, images, labels, annotations, indices, tuple(counts))
        if is_tapped:
            # A function cannot be tapped in a step: its activations are read by a pass of their own.
            points = {
                str(number): (layer, point.module)
                for number, (layer, point) in enumerate(self._points(module, layers, images).items())
                if point.module is not None
            }

            def keep(number: str, module: nn.Module, output: Any) -> None:
                self._keep(len(images), points[number][0], output)

            self._taps.enter_context(tap({number: module for number, (_, module) in points.items()}, keep))

    def after_batch(self, module: LightningModule, outputs: Any) -> None:
        """Update the state by the batch."""
        batch, self._batch = self._batch, None
        if batch is not None:
            self._update(replace(batch, logits=_logits_in(outputs, len(batch.images))))
        self._activations.clear()

    def update(
        self,
        module: LightningModule,
        images: Tensor,
        labels: Tensor | None,
        annotations: Annotations | None,
        indices: Sequence[int] | None,
        counts: tuple[bool, ...],
    ) -> None:
        """Update the state by images that no step runs."""
        self._activations.clear()
        self._update(self._stream_batch(module, images, labels, annotations, indices, counts))

    def compute(self) -> Any:
        """The result of all ranks, each of which must ask."""
        with torch.inference_mode(False), torch.no_grad(), isolate_rng():
            return self._monitor.compute(self._state)

    def stop(self) -> None:
        """Remove the taps."""
        self._taps.close()

    def _update(self, batch: StreamBatch) -> None:
        with torch.inference_mode(False), torch.no_grad(), isolate_rng():
            self._monitor.update(self._state, batch)

    def _stream_batch(
        self,
        module: LightningModule,
        images: Tensor,
        labels: Tensor | None,
        annotations: Annotations | None,
        indices: Sequence[int] | None,
        counts: tuple[bool, ...],
    ) -> StreamBatch:
        monitor, read_outputs = self._monitor, None
        if isinstance(monitor, ProbeMonitor):
            read_outputs = functools.partial(self._probe_pass.outputs, module, monitor, images, labels)
        return StreamBatch(
            module=module,
            images=images,
            labels=labels,
            indices=None if indices is None else tuple(indices),
            counts=counts,
            annotations=annotations,
            logits=None,
            read_activations=functools.partial(self._read_activations, module, images),
            read_outputs=read_outputs,
        )

    def _keep(self, count: int, layer: LayerSpec, output: Any) -> None:
        """Copy a layer's output of the first pass over the whole batch: what follows may change it in place."""
        tensor = first_tensor(output)
        if layer not in self._activations and tensor is not None and len(tensor) == count:
            self._activations[layer] = tensor.detach().clone()

    def _points(
        self, module: LightningModule, layers: Sequence[LayerSpec], images: Tensor
    ) -> dict[LayerSpec, HookPoint]:
        image = self._runner.images(images[:1], module)
        return self._runner.points(module, layers, image, self._monitor.predict)

    def _read_activations(self, module: LightningModule, images: Tensor, layer: LayerSpec) -> Tensor:
        point = self._points(module, [layer], images)[layer]
        if layer not in self._activations:
            self._activations[layer] = self._run_to(module, images, point)
        if point.reshape is not None:
            return point.reshape(self._activations[layer])
        height, width = images.shape[-2:]
        return to_grid(self._activations[layer], (height, width))

    def _run_to(self, module: LightningModule, images: Tensor, point: HookPoint) -> Tensor:
        """A layer's output by a pass of its own."""
        predict = self._runner.predict(self._monitor.predict)
        images = self._runner.images(images, module)
        parts = []
        with preserve_state(module):
            for rows in torch.split(images, self._runner.rows):
                with ForwardPass(module, rows, layers={point: False}, predict=predict) as forward_pass:
                    parts.append(forward_pass.tensor(point).detach())
        return torch.cat(parts)


def stream_layers(monitor: StreamMonitor, module: nn.Module) -> list[LayerSpec]:
    """The layers that a monitor reads, checked."""
    layers = monitor.layers(module)
    if not isinstance(layers, (list, tuple)) or not all(
        layer is None or isinstance(layer, (str, nn.Module)) for layer in layers
    ):
        raise ConfigurationError(
            f"{monitor!r}: layers() must return a list of dotted names, modules or None, got {describe(layers)}"
        )
    return list(layers)


def _logits_in(outputs: Any, count: int) -> Tensor | None:
    """(N, K) class scores in what a step returned, or None."""
    try:
        logits = output_logits(outputs)
    except ConfigurationError:
        return None
    return logits.detach() if logits.ndim == 2 and len(logits) == count and logits.is_floating_point() else None


def _is_compiled(module: nn.Module) -> bool:
    """Whether code was compiled here, which would not call a new hook, or be compiled again because of it."""
    return getattr(module, "_compiler_ctx", None) is not None or any(
        unwrap_compiled(child) is not child or getattr(child, "_compiled_call_impl", None) is not None
        for child in module.modules()
    )
