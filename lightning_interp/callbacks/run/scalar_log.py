"""Numbers that monitors log through ``pl_module.log``: when they are due, and what is logged in between."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks.contract import ScalarMonitor
from lightning_interp.callbacks.run.failures import Failures
from lightning_interp.callbacks.run.output import with_suffix
from lightning_interp.callbacks.run.probes import ProbeStore
from lightning_interp.callbacks.run.trainer import forget_logged

__all__ = ["ScalarLog"]


class ScalarLog:
    """Logs the numbers of monitors at every validation, whether they are due or not.

    Args:
        trainer: The run's Trainer.
        probes: The probes, on which the names of numbers may depend.
        failures: Where a monitor that cannot name its numbers is noted.
    """

    def __init__(self, trainer: Trainer, probes: ProbeStore, failures: Failures) -> None:
        self._trainer = trainer
        self._probes = probes
        self._failures = failures
        self._first_step = 0
        self._steps: dict[ScalarMonitor, int] = {}  # at which they were last due
        self._logged: list[str] = []

    def start(self) -> None:
        """Count optimiser steps from here."""
        self._first_step = self._trainer.global_step

    def is_due(self, monitor: ScalarMonitor) -> bool:
        """Whether a monitor is due in this validation: the first time always, so that the names are there."""
        trainer = self._trainer
        previous = self._steps.get(monitor, self._first_step)
        return (
            trainer.state.fn != "fit"
            or not monitor.last_scalars
            or monitor.schedule.due_after_epoch(trainer.current_epoch)
            or monitor.schedule.due_after_steps(previous, trainer.global_step)
        )

    def mark_due(self, monitor: ScalarMonitor) -> None:
        """Remember that a monitor was due now."""
        self._steps[monitor] = self._trainer.global_step

    def log(self, module: LightningModule, monitor: ScalarMonitor, new: Mapping[str, float], suffix: str = "") -> None:
        """Log a monitor's numbers, on every rank: the new ones, or the last ones, or NaN.

        Args:
            module: The module.
            monitor: The monitor.
            new: Its numbers; empty where it was not due or failed.
            suffix: Put behind the kind of each tag; with one, the last numbers are neither logged nor replaced.
        """
        last = {} if suffix else dict(monitor.last_scalars)
        if self._trainer.state.fn == "fit" and new:
            monitor.last_scalars = dict(new)
        if self._trainer.barebones:
            return
        values = dict.fromkeys(last, torch.nan)
        if not last and not new:
            with self._failures.noting(monitor):
                values = dict.fromkeys(monitor.scalar_names(self._probes.get(monitor)), torch.nan)
        values |= new or last
        for name, value in values.items():
            tag = with_suffix(monitor.tag(name), suffix)
            number = torch.tensor(value, dtype=torch.float32)
            # Every rank has the same number, of which the maximum is exact where a mean need not be.
            module.log(tag, number, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max", batch_size=1)
            if self._trainer.validating:
                self._logged.append(tag)

    def forget(self) -> None:
        """Drop what was logged, after Lightning has passed it on."""
        forget_logged(self._trainer, self._logged)
        self._logged.clear()
