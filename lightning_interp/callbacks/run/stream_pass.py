"""The validation or test pass, batch by batch, for the monitors that stream it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks.contract import Monitor, ProbeMonitor, StreamMonitor
from lightning_interp.callbacks.inputs import StreamBatch
from lightning_interp.callbacks.run.failures import Failures
from lightning_interp.callbacks.run.probe_pass import Outcome, ProbePass
from lightning_interp.callbacks.run.probes import ProbeStore
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.callbacks.run.runner import ModelRunner
from lightning_interp.callbacks.run.samples import SampleIndices
from lightning_interp.callbacks.run.scalar_log import ScalarLog
from lightning_interp.callbacks.run.trainer import is_indexable, streamed_loader
from lightning_interp.data.annotations import Annotations, dataset_annotations, unpack_annotated
from lightning_interp.data.batches import unpack_batch
from lightning_interp.errors import ConfigurationError
from lightning_interp.model.forward import ForwardPass
from lightning_interp.model.hooks import HookPoint, tap
from lightning_interp.model.layout import to_grid
from lightning_interp.model.locate import unwrap_compiled
from lightning_interp.model.outputs import first_tensor, output_logits
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.sharding import reset_fsdp_state
from lightning_interp.model.trace import LayerSpec

__all__ = ["StreamPass"]


class StreamPass:
    """Streams the first loader of a validation or test to monitors. All hooks come at the same moments on every rank.

    Args:
        trainer: The run's Trainer.
        monitors: All monitors of the run.
        runner: How the module is run.
        ranks: The processes.
        failures: Where failures are noted and agreed on.
        probes: The probes.
        probe_pass: Runs passes of a monitor's own.
        scalars: Where numbers are logged.
    """

    def __init__(
        self,
        trainer: Trainer,
        monitors: Sequence[Monitor],
        runner: ModelRunner,
        ranks: Ranks,
        failures: Failures,
        probes: ProbeStore,
        probe_pass: ProbePass,
        scalars: ScalarLog,
    ) -> None:
        self._trainer = trainer
        self._monitors = [monitor for monitor in monitors if isinstance(monitor, StreamMonitor)]
        self._runner = runner
        self._ranks = ranks
        self._failures = failures
        self._probes = probes
        self._probe_pass = probe_pass
        self._scalars = scalars
        self._streams: dict[StreamMonitor, _Stream] = {}

    def check(self, module: LightningModule) -> None:
        """Refuse monitors of annotations where no images have any, as far as that is known before the pass."""
        for monitor in self._monitors:
            is_checked = monitor.uses_annotations and not self._failures.has_failed(monitor)
            if is_checked and not self._is_annotated(monitor, module):
                raise _no_annotations(monitor)

    def begin(self, module: LightningModule) -> None:
        """Make the state of the monitors that are due."""
        self.stop()
        self._streams = {}
        loader = streamed_loader(self._trainer)
        for monitor in self._failures.active(self._monitors):
            if self._scalars.is_due(monitor):
                self._scalars.mark_due(monitor)
                with self._failures.noting(monitor):
                    self._streams[monitor] = _Stream(monitor, module, loader, self._runner, self._probe_pass)

    def before_batch(self, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Read a batch that is about to be run, and tap its forward pass."""
        for monitor, stream in self._streams.items() if dataloader_idx == 0 else ():
            self._act(monitor, module, functools.partial(stream.before_batch, module, batch, batch_idx))

    def after_batch(self, module: LightningModule, outputs: Any) -> None:
        """Update the monitors by a batch that was run."""
        self.stop()
        for monitor, stream in self._streams.items():
            self._act(monitor, module, functools.partial(stream.after_batch, module, outputs))

    def end(self, module: LightningModule, suffix: str = "") -> Outcome:
        """Compute and log the results, on every rank.

        Returns:
            The results of the monitors that were due and did not fail.
        """
        self.stop()
        streams, self._streams = self._streams, {}
        active = self._failures.active(streams)
        outcome = self._computed(module, {monitor: streams[monitor] for monitor in active}) if active else Outcome()
        for monitor in self._monitors:
            result = outcome.values.get(monitor)
            self._scalars.log(module, monitor, {} if result is None else dict(monitor.scalars(result)), suffix)
        return outcome

    def stop(self) -> None:
        """Remove all taps."""
        for stream in self._streams.values():
            stream.stop()

    def _act(self, monitor: StreamMonitor, module: LightningModule, action: Callable[[], None]) -> None:
        """Act; a failure is agreed on at the end, or at once where no rank can go on without the others."""
        if self._failures.has_failed(monitor) or self._failures.is_disabled(monitor):
            return
        with self._failures.noting(monitor):
            action()
        if self._runner.is_collective:
            errors = self._failures.noted([monitor])
            self._failures.sync(errors)
            if errors:
                reset_fsdp_state(module.modules())

    def _computed(self, module: LightningModule, streams: Mapping[StreamMonitor, _Stream]) -> Outcome:
        """The results of those monitors that failed on no rank; all ranks take the same steps together."""
        outcome = Outcome(errors=self._failures.noted(streams))
        self._failures.gather(outcome.errors)
        self._compute(streams, outcome)
        missing = [each for each in streams if each not in outcome.errors and outcome.values[each] is None]
        for monitor in [each for each in missing if each.uses_annotations]:
            # No batch said where its objects are, so the probe's images are streamed.
            self._collect(outcome, monitor, functools.partial(self._stream_probe, module, monitor, streams[monitor]))
        self._failures.gather(outcome.errors)
        self._compute({each: streams[each] for each in missing if each not in outcome.errors}, outcome)
        for monitor in streams:
            if monitor not in outcome.errors and outcome.values[monitor] is None and monitor.uses_annotations:
                outcome.errors[monitor] = _no_annotations(monitor)
        with preserve_state(module), torch.no_grad():
            for monitor in streams:
                result = outcome.values.get(monitor)
                if monitor not in outcome.errors and result is not None:
                    read_images = functools.partial(self._read_images, module, monitor)
                    finish = functools.partial(monitor.finish, module, result, read_images)
                    outcome.values[monitor] = self._collect(outcome, monitor, finish)
        self._failures.sync(outcome.errors)
        values = {each: result for each, result in outcome.values.items() if each not in outcome.errors}
        return Outcome({each: result for each, result in values.items() if result is not None}, outcome.errors)

    def _compute(self, streams: Mapping[StreamMonitor, _Stream], outcome: Outcome) -> None:
        for monitor, stream in streams.items():
            if monitor not in outcome.errors:
                outcome.values[monitor] = self._collect(outcome, monitor, stream.compute)

    def _collect(self, outcome: Outcome, monitor: Monitor, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            outcome.errors[monitor] = error
            return None

    def _stream_probe(self, module: LightningModule, monitor: StreamMonitor, stream: _Stream) -> None:
        """Stream this rank's share of the probe."""
        probe = self._probes.get(monitor)
        if probe is None or (probe.boxes is None and probe.masks is None):
            return
        collective = self._runner.is_collective
        part = probe.subset(slice(0, len(probe)) if collective else self._ranks.share(len(probe)))
        counts = not collective or self._ranks.is_rank_zero
        if len(part):
            stream.update(
                module, part.images, part.targets, Annotations(part.boxes, part.masks), None, (counts,) * len(part)
            )

    def _is_annotated(self, monitor: StreamMonitor, module: LightningModule) -> bool:
        """Whether images are annotated; True where only the batches can tell."""
        probe, loader = self._probes.get(monitor), streamed_loader(self._trainer)
        dataset: Any = getattr(loader, "dataset", None)
        if not isinstance(monitor, ProbeMonitor) or probe is None:
            return True
        if probe.boxes is not None or probe.masks is not None:
            return True
        if loader is None or isinstance(monitor.probe, int):
            return False  # the probe is the loader's
        if not is_indexable(dataset) or getattr(loader, "batch_sampler", None) is None:
            return True
        read = self._probes.reader(module, dataset, [0], unpack=monitor.unpack, annotated=True)
        sample = self._probes.build_on_rank_zero(read)
        return sample.boxes is not None or sample.masks is not None

    def _read_images(self, module: LightningModule, monitor: StreamMonitor, indices: Sequence[int]) -> Tensor:
        dataset: Any = getattr(streamed_loader(self._trainer), "dataset", None)
        if not is_indexable(dataset):
            raise ConfigurationError(
                f"{monitor!r} reads single images again, and {type(dataset).__name__} can only be iterated; validate "
                "on a data set with __len__ and __getitem__"
            )
        read = self._probes.reader(module, dataset, indices, unpack=monitor.unpack)
        return self._runner.images(read().images, module)


class _Stream:
    """One monitor's state over one pass, and the batch that is being run."""

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
        with torch.inference_mode(False):  # trainer.validate runs in it, and none of its tensors can be added to
            self._state = monitor.begin(module, runner.device)
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
        layers = self._monitor.layers(module)
        is_tapped = bool(layers) and not self._runner.is_collective and not _is_compiled(module)
        if not is_tapped:
            images = images.clone()  # the step may change them in place, before passes of our own
        indices, counts = (None, [True] * len(images)) if items is None else items
        self._batch = self._stream_batch(module, images, labels, annotations, indices, tuple(counts))
        if is_tapped:
            points = self._points(module, layers, images)
            # A function cannot be tapped in a step: its activations are read by a pass of their own.
            modules = {str(number): point.module for number, point in enumerate(points.values()) if point.module}

            def keep(number: str, module: nn.Module, output: Any) -> None:
                self._keep(len(images), layers[int(number)], output)

            self._taps.enter_context(tap(modules, keep))

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
        with torch.inference_mode(False), torch.no_grad():
            return self._monitor.compute(self._state)

    def stop(self) -> None:
        """Remove the taps."""
        self._taps.close()

    def _update(self, batch: StreamBatch) -> None:
        with torch.inference_mode(False), torch.no_grad():
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


def _no_annotations(monitor: Monitor) -> ConfigurationError:
    return ConfigurationError(
        f"{monitor!r} found no boxes or masks to score maps against. Give them in one of these ways: "
        'unpack=lambda batch: {"images": ..., "targets": ..., "boxes": ...} (or "masks"); batches that are such '
        "mappings; attributes boxes or masks of the validation set, with an entry for each item; or "
        "probe=Probe(images, targets, boxes=...). Boxes are (x1, y1, x2, y2) in pixels of the images as the model gets "
        "them"
    )
