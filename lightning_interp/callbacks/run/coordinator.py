"""The one callback that runs all monitors of a Trainer. Read it from top to bottom to know when everything happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch.optim import Optimizer

from lightning_interp.callbacks._lightning import Callback, LightningModule, Trainer, rank_zero_info
from lightning_interp.callbacks.contract import Monitor
from lightning_interp.callbacks.run.card import run_card
from lightning_interp.callbacks.run.failures import Failures
from lightning_interp.callbacks.run.measure_pass import MeasurePass
from lightning_interp.callbacks.run.outcome import Outcome
from lightning_interp.callbacks.run.output import Output, open_sinks
from lightning_interp.callbacks.run.probe_pass import ProbePass
from lightning_interp.callbacks.run.probes import ProbeStore
from lightning_interp.callbacks.run.ranks import Ranks, unsupported_strategy
from lightning_interp.callbacks.run.runner import ModelRunner
from lightning_interp.callbacks.run.scalar_log import ScalarLog
from lightning_interp.callbacks.run.snapshot import Snapshots
from lightning_interp.callbacks.run.step_pass import StepPass
from lightning_interp.callbacks.run.stream_pass import StreamPass
from lightning_interp.callbacks.run.trainer import logged_step
from lightning_interp.errors import ConfigurationError

__all__ = ["Coordinator"]


class Coordinator(Callback):
    """Runs the monitors of one Trainer during one run, from ``setup`` to ``teardown`` or an exception.

    It stands in ``trainer.callbacks`` behind the first monitor while the run lasts, has no state in checkpoints,
    and a copy of it (in a Trainer that is pickled or deep-copied during the run) does nothing. Its hooks come at the
    same moments on every rank, and none communicates unless a monitor is due.

    Args:
        trainer: The Trainer.
        monitors: Its monitors, in order.
    """

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        super().__init__()
        self.trainer = trainer
        self.monitors = list(monitors)
        self.ranks = Ranks.of(trainer)
        self.failures = Failures(monitors, self.ranks, lambda: trainer.interrupted)
        self.output = Output(open_sinks(trainer, self.ranks), monitors, self.failures)
        self.runner = ModelRunner(trainer, self.ranks)
        self.probes = ProbeStore(trainer, monitors, self.ranks, self.failures)
        self.scalars = ScalarLog(trainer, self.probes, self.failures)
        self.steps = StepPass(trainer, monitors, self.runner, self.ranks, self.failures)
        passes = ProbePass(self.runner, self.ranks, self.failures)
        self.layer_names = passes.layer_names
        self.snapshots = Snapshots(self.runner, self.ranks, self.failures, self.probes, passes, self.output)
        self.stream = StreamPass(
            trainer, monitors, self.runner, self.ranks, self.failures, self.probes, passes, self.scalars
        )
        self.measures = MeasurePass(
            trainer, monitors, self.runner, self.ranks, self.failures, self.probes, self.scalars
        )
        self._awaits_start = False

    @classmethod
    def attach(cls, trainer: Trainer, stage: str) -> None:
        """Put a coordinator into a Trainer's callbacks, unless it has one that runs."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [callback for callback in callbacks if isinstance(callback, Monitor)]
        if stage == "predict" or any(isinstance(each, cls) and each.monitors == monitors for each in callbacks):
            return
        for callback in [callback for callback in callbacks if isinstance(callback, (cls, _Copy))]:
            # Left where another callback raised in on_exception, or in a copied Trainer.
            if isinstance(callback, cls):
                callback.output.close()
            callbacks.remove(callback)
        # In place, behind the first monitor: Lightning iterates over this list, and others may hold it.
        callbacks.insert(callbacks.index(monitors[0]) + 1, cls(trainer, monitors))

    def __reduce__(self) -> tuple[type[_Copy], tuple[()]]:
        return _Copy, ()

    # ---- The start of training.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work before anything else is done."""
        self._check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the probes, and record the untrained model."""
        if self._is_supported():
            self.steps.steps = trainer.global_step
            self.scalars.start()
            self.probes.find(pl_module)
            self.stream.check(pl_module)
            self._awaits_start = True
            self._start_if_ready(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the probes that nothing else gives from the first batch."""
        self.probes.offer_batch(batch)
        self._start_if_ready(pl_module)

    # ---- Optimiser steps and the end of epochs.

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read gradients where they are accumulated and unscaled, not yet clipped."""
        self.steps.before_step(pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record where a number of optimiser steps is reached."""
        previous, steps = self.steps.after_batch()
        due = [monitor for monitor in self.monitors if monitor.schedule.due_after_steps(previous, steps)]
        self.snapshots.take(pl_module, due, logged_step(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record where the epoch is due."""
        # In this hook Lightning's own counter is one ahead of the step at which it logs the epoch's metrics.
        step = max(logged_step(trainer) - 1, 0)
        due = [monitor for monitor in self.monitors if monitor.schedule.due_after_epoch(trainer.current_epoch)]
        self.snapshots.take(pl_module, due, step)
        if not trainer.enable_validation:
            self._finish_pass(self.measures.end(pl_module), step)

    # ---- Validation and test.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before ``trainer.validate`` does anything."""
        if trainer.state.fn == "validate":
            self._prepare_evaluation(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before ``trainer.test`` does anything."""
        self._prepare_evaluation(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to stream."""
        if not trainer.sanity_checking and self._is_supported():
            self.stream.begin(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to stream."""
        if self._is_supported():
            self.stream.begin(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the probes that nothing else gives from the first batch; tap the step."""
        self.probes.offer_batch(batch)
        self.stream.before_batch(pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the probes that nothing else gives from the first batch; tap the step."""
        self.probes.offer_batch(batch)
        self.stream.before_batch(pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the streams."""
        self.stream.after_batch(pl_module, outputs)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the streams."""
        self.stream.after_batch(pl_module, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the numbers of streams and measurements."""
        if not trainer.sanity_checking:
            self._finish_pass(self.stream.end(pl_module), logged_step(trainer))
            self._finish_pass(self.measures.end(pl_module), logged_step(trainer))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the numbers of the test set, apart from those of training."""
        self._finish_pass(self.stream.end(pl_module, "-test"), logged_step(trainer), "-test")
        self._finish_pass(self.measures.end(pl_module, "-test"), logged_step(trainer), "-test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record once after ``trainer.validate``."""
        self.scalars.forget()
        if trainer.state.fn == "validate":
            self._record_evaluation(pl_module, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record once after ``trainer.test``."""
        self._record_evaluation(pl_module, "test")

    # ---- The end.

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what was recorded so far."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write everything, and leave the Trainer."""
        self._close()

    # ---- What the hooks do.

    def _check(self, module: LightningModule) -> None:
        tags: set[str] = set()
        for monitor in self.monitors:
            monitor.reset()
            monitor.check(module)
            for tag in monitor.tags(module):
                if tag in tags:
                    raise ConfigurationError(f"two monitors would write {tag!r}; give one of them a name=...")
                tags.add(tag)

    def _is_supported(self) -> bool:
        reason = unsupported_strategy(self.trainer)
        if reason is not None:
            self.failures.disable_all(reason)
        return reason is None

    def _start_if_ready(self, module: LightningModule) -> None:
        if not self._awaits_start or not self.probes.is_complete:
            return
        self._awaits_start = False
        # A resumed run, and a second fit, have had their start.
        is_fresh = self.steps.steps == 0
        starting = [monitor for monitor in self.monitors if monitor.schedule.at_start and is_fresh]
        self.snapshots.take(module, starting, step=0)
        # The others do a dry run on one image, so that what cannot work is reported before the first batch is trained.
        self.snapshots.take(module, [each for each in self.monitors if each not in starting], step=0, dry_run=True)
        if is_fresh:
            self.snapshots.write_results(self.measures.start(module), step=0)
        self.failures.training_started = True
        if self.ranks.is_rank_zero and (active := self.failures.active(self.monitors)):
            layer_names = dict(self.layer_names)
            self.output.submit([(None, lambda: [run_card(active, layer_names)])], logged_step(self.trainer))

    def _prepare_evaluation(self, module: LightningModule) -> None:
        self._check(module)
        if self._is_supported():
            self.probes.find(module)
            self.stream.check(module)

    def _record_evaluation(self, module: LightningModule, stage: Literal["validate", "test"]) -> None:
        self.failures.training_started = True
        suffix = "-test" if stage == "test" else ""
        self.snapshots.take(module, self.monitors, logged_step(self.trainer), suffix=suffix)

    def _finish_pass(self, outcome: Outcome, step: int, suffix: str = "") -> None:
        self.snapshots.write_results(outcome, step, suffix)
        for monitor, reason in outcome.stop_reasons.items():
            rank_zero_info(f"{monitor!r} ends the training: {reason}")
            self.trainer.should_stop = True

    def _close(self) -> None:
        self.trainer.callbacks = [each for each in self.trainer.callbacks if each is not self]  # type: ignore[attr-defined]
        self.stream.stop()
        self.output.close()
        self.failures.close()


class _Copy(Callback):
    """What a coordinator becomes in a copied or pickled Trainer: nothing."""
