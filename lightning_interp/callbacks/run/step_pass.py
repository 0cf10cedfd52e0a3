"""The optimiser steps after which monitors of steps are due."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks.contract import Monitor, StepMonitor
from lightning_interp.callbacks.run.failures import Failures
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.callbacks.run.runner import ModelRunner
from lightning_interp.callbacks.run.trainer import is_last_step
from lightning_interp.model.sharding import reshard

__all__ = ["StepPass"]


class StepPass:
    """Calls monitors before and after the optimiser steps after which they are due, and only there.

    Args:
        trainer: The run's Trainer.
        monitors: All monitors of the run.
        runner: How the module is run.
        ranks: The processes.
        failures: Where failures are noted.
    """

    def __init__(
        self, trainer: Trainer, monitors: Sequence[Monitor], runner: ModelRunner, ranks: Ranks, failures: Failures
    ) -> None:
        self._trainer = trainer
        self._monitors = [monitor for monitor in monitors if isinstance(monitor, StepMonitor)]
        self._runner = runner
        self._ranks = ranks
        self._failures = failures
        self._stepping: list[StepMonitor] = []  # in the same order on every rank
        self.steps = 0  # optimiser steps at the end of the last batch

    def before_step(self, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Call the monitors that are due after the next optimiser step."""
        steps, epoch = self._trainer.global_step + 1, self._trainer.current_epoch
        is_last = is_last_step(self._trainer, module)
        due = [
            monitor
            for monitor in self._monitors
            if monitor.schedule.due_after_steps(self.steps, steps)
            or (is_last and monitor.schedule.due_after_epoch(epoch))
        ]
        if not due:
            return
        if collective := self._runner.is_collective:
            # What failed on this rank alone is not agreed on yet: the other ranks still count on it.
            due = [monitor for monitor in due if not self._failures.is_disabled(monitor)]
            reshard(module.modules())
        else:
            due = [each for each in due if not (self._failures.is_disabled(each) or self._failures.has_failed(each))]
        if not due or not (self._ranks.is_rank_zero or collective):
            return
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters = {name: parameter for name, parameter in module.named_parameters() if id(parameter) in stepped}
        for monitor in due:
            with self._failures.noting(monitor), torch.no_grad():
                monitor.before_optimizer_step(parameters)
                self._stepping.append(monitor)

    def after_batch(self) -> tuple[int, int]:
        """Call the same monitors after the step.

        Returns:
            The optimiser steps before and after the batch.
        """
        for monitor in self._stepping:
            with self._failures.noting(monitor), torch.no_grad():
                monitor.after_optimizer_step()
        self._stepping.clear()
        previous, self.steps = self.steps, self._trainer.global_step
        return previous, self.steps
