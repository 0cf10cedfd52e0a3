"""One snapshot: what the due monitors of weights and probes record of the module as it is now."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.contract import Monitor, ProbeMonitor, ScalarMonitor, WeightMonitor
from lightning_interp.callbacks.run.failures import Failures
from lightning_interp.callbacks.run.outcome import Outcome
from lightning_interp.callbacks.run.output import Output
from lightning_interp.callbacks.run.probe_pass import ProbePass
from lightning_interp.callbacks.run.probes import ProbeStore
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.callbacks.run.runner import ModelRunner
from lightning_interp.callbacks.run.transfer import HostCopy
from lightning_interp.model.preserve import preserve_state
from lightning_interp.sinks.records import Record

__all__ = ["Snapshots"]


class Snapshots:
    """Takes snapshots: captures, passes over probes, agreement on failures, gathering, and output.

    Args:
        runner: How the module is run.
        ranks: The processes.
        failures: How failures are agreed on.
        probes: The probes.
        probe_pass: Runs the module over probes.
        output: Where records go.
    """

    def __init__(
        self,
        runner: ModelRunner,
        ranks: Ranks,
        failures: Failures,
        probes: ProbeStore,
        probe_pass: ProbePass,
        output: Output,
    ) -> None:
        self._runner = runner
        self._ranks = ranks
        self._failures = failures
        self._probes = probes
        self._probe_pass = probe_pass
        self._output = output

    def take(
        self,
        module: LightningModule,
        due: Sequence[Monitor],
        step: int,
        *,
        suffix: str = "",
        dry_run: bool = False,
    ) -> None:
        """Take a snapshot; every rank must call this with the same monitors.

        Args:
            module: The module.
            due: The monitors that are due.
            step: The step that the records carry.
            suffix: Put behind the kind of each tag.
            dry_run: Run probe monitors on one image, and record nothing.
        """
        due = [each for each in self._failures.active(due) if isinstance(each, (WeightMonitor, ProbeMonitor))]
        if not due:
            return
        self._output.report_lost_sinks()
        collective = self._runner.is_collective
        outcome = Outcome(errors=self._failures.noted(due))
        if collective:
            self._failures.gather(outcome.errors)
        if not dry_run and (self._ranks.is_rank_zero or collective):
            self._capture(module, due, step, outcome)
        self._run_probes(module, due, outcome, dry_run)
        if collective and not self._ranks.is_rank_zero:
            outcome.values.clear()  # rank zero has the same
        self._failures.sync(outcome.errors)
        values = {index: outcome.values[each] for index, each in enumerate(due) if _has_value(outcome, each)}
        shares = self._ranks.gather(values)
        if shares is None or dry_run:
            return
        drawings = []
        for index, monitor in enumerate(due):
            if monitor not in outcome.errors:
                parts = [share[index] for share in shares if index in share]
                drawings.append((monitor, self._records_of(monitor, parts, step)))
        self._output.submit(drawings, step, suffix)

    def write_results(self, outcome: Outcome, step: int, suffix: str = "") -> None:
        """Write the records of results that every rank has, on rank zero."""
        if self._ranks.is_rank_zero:
            drawings = [
                (monitor, functools.partial(monitor.records, result, step))
                for monitor, result in outcome.values.items()
                if isinstance(monitor, ScalarMonitor)
            ]
            self._output.submit(drawings, step, suffix)

    def _capture(self, module: LightningModule, due: Sequence[Monitor], step: int, outcome: Outcome) -> None:
        for monitor in due:
            if isinstance(monitor, WeightMonitor) and monitor not in outcome.errors:
                with outcome.collecting([monitor]), preserve_state(module), torch.no_grad():
                    outcome.values[monitor] = monitor.capture(module, step)

    def _run_probes(self, module: LightningModule, due: Sequence[Monitor], outcome: Outcome, dry_run: bool) -> None:
        """One pass for all monitors that share a probe and run the module in the same way."""
        groups: dict[object, list[ProbeMonitor]] = {}
        for monitor in due:
            if isinstance(monitor, ProbeMonitor) and monitor not in outcome.errors:
                groups.setdefault((id(self._probes.get(monitor)), monitor.predict), []).append(monitor)
        for monitors in groups.values():
            probe = self._probes.get(monitors[0])
            assert probe is not None, "a snapshot without a probe"
            with outcome.collecting(monitors):
                self._probe_pass.run(module, probe, monitors, outcome, dry_run=dry_run)

    def _records_of(self, monitor: Monitor, parts: list[Any], step: int) -> Callable[[], Iterable[Record]]:
        if isinstance(monitor, WeightMonitor):
            return functools.partial(monitor.records, parts[0], step)
        assert isinstance(monitor, ProbeMonitor)
        return functools.partial(self._draw, monitor, list(itertools.chain.from_iterable(parts)))

    def _draw(self, monitor: ProbeMonitor, parts: Sequence[Mapping[str, HostCopy]]) -> Iterable[Record]:
        probe = self._probes.get(monitor)
        assert probe is not None
        outputs: dict[str, Tensor] = {name: torch.cat([part[name].wait() for part in parts]) for name in parts[0]}
        return monitor.draw(outputs, probe)


def _has_value(outcome: Outcome, monitor: Monitor) -> bool:
    return monitor in outcome.values and monitor not in outcome.errors
