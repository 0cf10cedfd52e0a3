"""The validation or test pass, batch by batch, for the monitors that stream it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks.contract import Monitor, ProbeMonitor, StreamMonitor
from lightning_interp.callbacks.run.failures import Failures
from lightning_interp.callbacks.run.outcome import Outcome
from lightning_interp.callbacks.run.probe_pass import ProbePass
from lightning_interp.callbacks.run.probes import ProbeStore
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.callbacks.run.runner import ModelRunner
from lightning_interp.callbacks.run.scalar_log import ScalarLog
from lightning_interp.callbacks.run.stream import Stream, stream_layers
from lightning_interp.callbacks.run.trainer import is_indexable, streamed_loader
from lightning_interp.data.annotations import Annotations
from lightning_interp.errors import ConfigurationError
from lightning_interp.model.locate import find_layer
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.sharding import reset_fsdp_state

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
        self._due: list[StreamMonitor] = []  # in this pass, the same on every rank
        self._streams: dict[StreamMonitor, Stream] = {}  # of those whose state could be made

    def check(self, module: LightningModule) -> None:
        """Refuse layers that do not exist, and monitors of annotations where no images are known to have any."""
        for monitor in self._monitors:
            for layer in stream_layers(monitor, module):
                if layer is not None:
                    find_layer(module, layer)
            is_checked = monitor.uses_annotations and not self._failures.has_failed(monitor)
            if is_checked and not self._is_annotated(monitor, module):
                raise _no_annotations(monitor)

    def begin(self, module: LightningModule) -> None:
        """Make the state of the monitors that are due."""
        self.stop()
        self._streams = {}
        loader = streamed_loader(self._trainer)
        self._due = [each for each in self._failures.active(self._monitors) if self._scalars.is_due(each)]
        for monitor in self._due:
            self._scalars.mark_due(monitor)
            if not self._failures.has_failed(monitor):
                with self._failures.noting(monitor):
                    self._streams[monitor] = Stream(monitor, module, loader, self._runner, self._probe_pass)

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
        due, self._due = self._failures.active(self._due), []
        outcome = self._computed(module, due, streams) if due else Outcome()
        for monitor in self._monitors:
            self._scalars.log(module, monitor, outcome.scalars.get(monitor, {}), suffix)
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

    def _computed(
        self, module: LightningModule, due: Sequence[StreamMonitor], streams: Mapping[StreamMonitor, Stream]
    ) -> Outcome:
        """The results of those monitors that failed on no rank; all ranks take the same steps together."""
        outcome = Outcome(errors=self._failures.noted(due))
        self._failures.gather(outcome.errors)
        streams = {monitor: streams[monitor] for monitor in due if monitor not in outcome.errors}
        self._compute(streams, outcome)
        missing = [each for each in streams if each not in outcome.errors and outcome.values[each] is None]
        for monitor in [each for each in missing if each.uses_annotations]:
            # No batch said where its objects are, so the probe's images are streamed.
            outcome.call(monitor, functools.partial(self._stream_probe, module, monitor, streams[monitor]))
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
                    result = outcome.call(monitor, finish)
                    outcome.conclude(monitor, result)
        self._failures.sync(outcome.errors)
        outcome.share_stop_reasons(due, self._ranks)
        return outcome.without_failures()

    def _compute(self, streams: Mapping[StreamMonitor, Stream], outcome: Outcome) -> None:
        for monitor, stream in streams.items():
            outcome.values[monitor] = outcome.call(monitor, stream.compute)
        self._failures.gather(outcome.errors)

    def _stream_probe(self, module: LightningModule, monitor: StreamMonitor, stream: Stream) -> None:
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


def _no_annotations(monitor: Monitor) -> ConfigurationError:
    return ConfigurationError(
        f"{monitor!r} found no boxes or masks to score maps against. Give them in one of these ways: "
        'unpack=lambda batch: {"images": ..., "targets": ..., "boxes": ...} (or "masks"); batches that are such '
        "mappings; attributes boxes or masks of the validation set, with an entry for each item; or "
        "probe=Probe(images, targets, boxes=...). Boxes are (x1, y1, x2, y2) in pixels of the images as the model gets "
        "them"
    )
