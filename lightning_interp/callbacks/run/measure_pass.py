"""The passes of monitors that measure something over units, images or batches of their own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_interp.callbacks._lightning import LightningModule, Trainer, apply_to_collection
from lightning_interp.callbacks.contract import MeasureMonitor, Monitor
from lightning_interp.callbacks.inputs import MeasureData
from lightning_interp.callbacks.run.failures import Failures
from lightning_interp.callbacks.run.outcome import Outcome
from lightning_interp.callbacks.run.probes import ProbeStore
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.callbacks.run.runner import ModelRunner
from lightning_interp.callbacks.run.scalar_log import ScalarLog
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.sharding import reset_fsdp_state

__all__ = ["MeasurePass"]


class MeasurePass:
    """Runs the measurements of a run, each rank its share of the items, and logs their numbers.

    Args:
        trainer: The run's Trainer.
        monitors: All monitors of the run.
        runner: How the module is run.
        ranks: The processes.
        failures: How failures are agreed on.
        probes: The probes.
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
        scalars: ScalarLog,
    ) -> None:
        self._trainer = trainer
        self._monitors = [monitor for monitor in monitors if isinstance(monitor, MeasureMonitor)]
        self._runner = runner
        self._ranks = ranks
        self._failures = failures
        self._probes = probes
        self._scalars = scalars

    def start(self, module: LightningModule) -> Outcome:
        """Measure the untrained model; its numbers are logged again at the first validation."""
        outcome = self._measure(module, [monitor for monitor in self._monitors if monitor.schedule.at_start])
        for monitor in self._monitors:
            monitor.last_scalars = dict(outcome.scalars.get(monitor, monitor.last_scalars))
        return outcome

    def end(self, module: LightningModule, suffix: str = "") -> Outcome:
        """Measure what is due at the end of a validation or test, or of an epoch without one, and log the numbers."""
        due = [monitor for monitor in self._monitors if self._scalars.is_due(monitor)]
        outcome = self._measure(module, due)
        for monitor in self._monitors:
            self._scalars.log(module, monitor, outcome.scalars.get(monitor, {}), suffix)
        return outcome

    def _measure(self, module: LightningModule, due: Sequence[MeasureMonitor]) -> Outcome:
        """The merged results, on every rank."""
        due = self._failures.active(due)
        outcome = Outcome(errors=self._failures.noted(due))
        if not due:
            return outcome
        collective = self._runner.is_collective
        if collective:
            self._failures.gather(outcome.errors)
        partials: dict[MeasureMonitor, Any] = {}
        for monitor in due:
            self._scalars.mark_due(monitor)
            if monitor not in outcome.errors:
                with outcome.collecting([monitor]), preserve_state(module, parameters=True):
                    partials[monitor] = self._partial(module, monitor)
            if collective:
                self._failures.gather(outcome.errors)
                if monitor in outcome.errors:
                    reset_fsdp_state(module.modules())
        self._failures.gather(outcome.errors)
        for monitor in due:
            if monitor not in outcome.errors:
                # Every rank of a sharded module measured all items.
                parts = [partials[monitor]] if collective else self._ranks.all_gather(partials[monitor])
                parts = [part for part in parts if part is not None]
                if parts:
                    outcome.conclude(monitor, outcome.call(monitor, functools.partial(monitor.merge, parts)))
        self._failures.sync(outcome.errors)
        outcome.share_stop_reasons(due, self._ranks)
        return outcome.without_failures()

    def _partial(self, module: LightningModule, monitor: MeasureMonitor) -> Any:
        """This rank's result, on the CPU; None where no item is its share."""
        probe = self._probes.get(monitor)
        if probe is None:
            raise ConfigurationError(
                f"{monitor!r} has no images yet: no data set could be read by index, and no batch came by; pass "
                "probe=Probe(images, targets)"
            )
        data = MeasureData(probe, self._runner.device, self._runner.predict(monitor.predict))
        items = monitor.items(module, data)
        if not isinstance(items, Sequence):
            raise TypeError(f"{monitor!r}: items() must return a sequence, got {describe(items)}")
        share = items if self._runner.is_collective else items[self._ranks.share(len(items))]
        if not share:
            return None
        partial = monitor.measure(module, data, share)
        if partial is None:
            raise TypeError(f"{monitor!r}: measure() returned None; return the result of the share")
        return apply_to_collection(partial, Tensor, lambda tensor: tensor.detach().cpu())
