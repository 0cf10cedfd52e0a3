"""The probes of a run: where the images of each monitor come from, the same on every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch

from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks.contract import MeasureMonitor, Monitor, ProbeMonitor, StreamMonitor
from lightning_interp.callbacks.run.failures import Failures
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.callbacks.run.trainer import is_indexable, probe_loader, transfer_batch
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from lightning_interp.model.preserve import preserve_state

__all__ = ["ProbeStore", "has_probe"]

_DEFAULT_COUNT = 8


def has_probe(monitor: Monitor) -> TypeGuard[ProbeMonitor | MeasureMonitor]:
    """Whether a monitor works on a probe."""
    return isinstance(monitor, (ProbeMonitor, MeasureMonitor))


class ProbeStore:
    """The probes of a run, shared by the monitors that ask for the same images.

    Args:
        trainer: The run's Trainer.
        monitors: All monitors of the run.
        ranks: The processes; rank zero builds a probe and broadcasts it.
        failures: Where a data set that fails is noted.
    """

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor], ranks: Ranks, failures: Failures) -> None:
        self._trainer = trainer
        self._monitors = [monitor for monitor in monitors if has_probe(monitor)]
        self._ranks = ranks
        self._failures = failures
        self._probes: dict[object, Probe | None] = {}  # None: it must come from a batch
        # Of streams that read boxes and masks a probe's must be right; other monitors take no notice of them.
        self._annotated = {_key(each) for each in self._monitors if _uses_annotations(each)}

    def get(self, monitor: Monitor) -> Probe | None:
        """A monitor's probe; None where it has none, or it is not known yet."""
        return self._probes.get(_key(monitor)) if has_probe(monitor) else None

    @property
    def is_complete(self) -> bool:
        """Whether no probe must come from a batch any more."""
        return all(probe is not None for probe in self._probes.values())

    def find(self, module: LightningModule) -> None:
        """Find every probe that needs no batch; all ranks must call this."""
        loader = probe_loader(self._trainer)
        for monitor in self._monitors:
            key, source = _key(monitor), monitor.probe
            if isinstance(source, Probe):
                self._keep(key, source)
            if self._probes.get(key) is not None or self._failures.has_failed(monitor):
                continue
            dataset: Any = getattr(loader, "dataset", None) if isinstance(source, int) else source
            is_collated = getattr(loader, "batch_sampler", None) is not None or not isinstance(source, int)
            self._probes[key] = None
            if is_indexable(dataset) and is_collated:
                annotated = key in self._annotated
                self._build(
                    key, self.reader(module, dataset, n=_count(monitor), unpack=monitor.unpack, annotated=annotated)
                )

    def offer_batch(self, batch: Any) -> None:
        """Build the probes that nothing else gives from a batch on its way into the model; all ranks must call this."""
        for monitor in self._monitors:
            key = _key(monitor)
            if key in self._probes and self._probes[key] is None:
                annotated = key in self._annotated
                build = functools.partial(
                    Probe.from_batch, batch, n=_count(monitor), unpack=monitor.unpack, annotated=annotated
                )
                self._build(key, build)

    def reader(
        self, module: LightningModule, dataset: Any, indices: Sequence[int] | None = None, **options: Any
    ) -> Callable[[], Probe]:
        """What reads items of a data set as the module takes them, with all state preserved."""
        loader = probe_loader(self._trainer)

        def read() -> Probe:
            with preserve_state(module), torch.no_grad():
                return Probe.from_dataset(
                    dataset,
                    indices,
                    collate_fn=getattr(loader, "collate_fn", None),
                    transfer=functools.partial(transfer_batch, self._trainer, module),
                    **options,
                )

        return read

    def build_on_rank_zero(self, build: Callable[[], Probe]) -> Probe:
        """Return the probe that rank zero builds, or raise its error, on every rank."""
        result: Probe | Exception | None = None
        if self._ranks.is_rank_zero:
            try:
                with torch.inference_mode(False):
                    result = build()
            except Exception as error:
                result = error
        result = self._ranks.broadcast(result)
        if not isinstance(result, Probe):
            raise result or RuntimeError("rank zero sent no probe")
        return result

    def _build(self, key: object, build: Callable[[], Probe]) -> None:
        """Build a probe; an error of the data set is one of the monitors that need it."""
        try:
            self._keep(key, self.build_on_rank_zero(build))
        except ConfigurationError:
            raise
        except Exception as error:
            del self._probes[key]
            for monitor in self._monitors:
                if _key(monitor) == key:
                    self._failures.note(monitor, error)

    def _keep(self, key: object, probe: Probe) -> None:
        for monitor in self._monitors:
            if _key(monitor) == key and isinstance(monitor, ProbeMonitor):
                monitor.check_probe(probe)
        self._probes[key] = probe


def _key(monitor: ProbeMonitor | MeasureMonitor) -> object:
    """What makes two monitors share a probe."""
    source = monitor.probe
    return (source if isinstance(source, int) else id(source), monitor.unpack)


def _count(monitor: ProbeMonitor | MeasureMonitor) -> int:
    return monitor.probe if isinstance(monitor.probe, int) else _DEFAULT_COUNT


def _uses_annotations(monitor: Monitor) -> bool:
    return isinstance(monitor, StreamMonitor) and monitor.uses_annotations
