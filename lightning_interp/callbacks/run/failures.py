"""What becomes of a monitor that fails: noted, agreed on by all ranks, and disabled."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from lightning_interp.callbacks.contract import Monitor
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.errors import ConfigurationError

__all__ = ["Failures", "format_exception"]

AnyMonitor = TypeVar("AnyMonitor", bound=Monitor)


class Failures:
    """The failures of the monitors of one run.

    A failure is first noted, on one rank or on the writer's thread; the ranks agree on it when the monitor is next due
    (:meth:`sync`), and disable the monitor together.

    Args:
        monitors: All monitors, in the same order on every rank.
        ranks: The processes.
        is_interrupted: Whether another exception ends the run already.
    """

    def __init__(self, monitors: Sequence[Monitor], ranks: Ranks, is_interrupted: Callable[[], bool]) -> None:
        self._monitors = list(monitors)
        self._ranks = ranks
        self._is_interrupted = is_interrupted
        self._disabled: set[Monitor] = set()
        self._noted: dict[Monitor, Exception] = {}
        self._reported: list[Exception] = []
        # Until the first batch a misconfiguration ends the run, whatever on_error says.
        self.training_started = False

    def active(self, monitors: Iterable[AnyMonitor]) -> list[AnyMonitor]:
        """The monitors that are not disabled; the same on every rank."""
        return [monitor for monitor in monitors if monitor not in self._disabled]

    def is_disabled(self, monitor: Monitor) -> bool:
        """Whether a monitor is disabled; the same on every rank."""
        return monitor in self._disabled

    def has_failed(self, monitor: Monitor) -> bool:
        """Whether a monitor failed on this rank, which the other ranks may not know yet."""
        return monitor in self._noted

    def note(self, monitor: Monitor, error: Exception) -> None:
        """Note a failure on this rank or thread alone; the first of a monitor counts."""
        self._noted.setdefault(monitor, error)

    @contextmanager
    def noting(self, monitor: Monitor) -> Iterator[None]:
        """Note an exception of the block, and go on."""
        try:
            yield
        except Exception as error:
            self.note(monitor, error)

    def noted(self, monitors: Iterable[Monitor]) -> dict[Monitor, Exception]:
        """The failures of these monitors that the ranks have not agreed on yet."""
        return {monitor: self._noted[monitor] for monitor in monitors if monitor in self._noted}

    def mark_reported(self, error: Exception) -> None:
        """Do not warn of this exception again."""
        self._reported.append(error)

    def gather(self, errors: dict[Monitor, Exception]) -> None:
        """Add the other ranks' errors to this rank's, in place; every rank must call this."""
        reports = {
            index: (isinstance(errors[monitor], ConfigurationError), format_exception(errors[monitor]))
            for index, monitor in enumerate(self._monitors)
            if monitor in errors
        }
        for rank, report in enumerate(self._ranks.all_gather(reports)):
            for index, (is_misconfiguration, text) in report.items():
                kind = ConfigurationError if is_misconfiguration else RuntimeError
                errors.setdefault(self._monitors[index], kind(f"on rank {rank}: {text}"))

    def sync(self, errors: dict[Monitor, Exception]) -> None:
        """Agree on the errors with the other ranks, and disable their monitors; every rank must call this.

        Raises:
            Exception: The error of a monitor with ``on_error="raise"``, or a misconfiguration before training.
        """
        self.gather(errors)
        for monitor in [monitor for monitor in self._monitors if monitor in errors]:
            self._noted.pop(monitor, None)
            self._disable(monitor, errors[monitor])

    def close(self) -> None:
        """Report what was noted since the ranks last agreed."""
        for monitor in list(self._noted):
            self._disable(monitor, self._noted.pop(monitor))

    def disable_all(self, reason: str) -> None:
        """Disable every monitor for a reason that holds on all ranks, and warn once."""
        if any(monitor.on_error == "raise" for monitor in self._monitors):
            raise ConfigurationError(reason)
        if self._ranks.is_rank_zero and not self._disabled:
            warnings.warn(f"lightning_interp records nothing of this run: {reason}", stacklevel=2)
        self._disabled.update(self._monitors)

    def _disable(self, monitor: Monitor, error: Exception) -> None:
        if monitor in self._disabled:
            return  # what still waited to be written failed, too
        is_misuse = isinstance(error, ConfigurationError) and not self.training_started
        # Where an exception ends the run already, that one is reported, and the loggers are still closed.
        if (monitor.on_error == "raise" or is_misuse) and not self._is_interrupted():
            raise error
        self._disabled.add(monitor)
        if self._ranks.is_rank_zero and error not in self._reported:
            warnings.warn(
                f"{monitor!r} failed and is disabled from here on; training goes on. Pass on_error='raise' to stop "
                f"here.\n{format_exception(error)}",
                stacklevel=2,
            )


def format_exception(error: BaseException) -> str:
    """An exception with its traceback, as text."""
    return "".join(traceback.format_exception(error)).strip()
