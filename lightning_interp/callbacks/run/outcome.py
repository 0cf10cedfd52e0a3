"""What monitors returned in one pass, and how they failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning_interp.callbacks.contract import Monitor, ScalarMonitor
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.errors import describe

__all__ = ["Outcome"]


@dataclass(eq=False)
class Outcome:
    """The results of the monitors of one pass, on this rank.

    Args:
        values: For each monitor what it returned; tensors are on their way to the CPU.
        errors: For each monitor that failed its exception.
        scalars: For each monitor with a result its numbers.
        stop_reasons: For each monitor that asks for the end of training why.
    """

    values: dict[Monitor, Any] = field(default_factory=dict)
    errors: dict[Monitor, Exception] = field(default_factory=dict)
    scalars: dict[Monitor, dict[str, float]] = field(default_factory=dict)
    stop_reasons: dict[Monitor, str] = field(default_factory=dict)

    @contextmanager
    def collecting(self, monitors: Iterable[Monitor]) -> Iterator[None]:
        """Collect an exception of the block for these monitors, and go on."""
        try:
            yield
        except Exception as error:
            for monitor in monitors:
                self.errors.setdefault(monitor, error)

    def call(self, monitor: Monitor, action: Callable[[], Any]) -> Any:
        """Return what an action of a monitor returns, or None after an exception, which is collected."""
        with self.collecting([monitor]):
            return action()
        return None

    def conclude(self, monitor: ScalarMonitor, result: Any) -> None:
        """Keep a result, with its numbers and whether training should end."""
        with self.collecting([monitor]):
            if result is None:
                raise TypeError(f"{monitor!r} gave None as a result; finish(), measure() and merge() must return one")
            scalars = monitor.scalars(result)
            if not isinstance(scalars, Mapping):
                raise TypeError(f"{monitor!r}: scalars() takes numbers by name, got {describe(scalars)}")
            numbers = {str(name): float(value) for name, value in scalars.items()}
            reason = monitor.should_stop(result)
            self.values[monitor], self.scalars[monitor] = result, numbers
            if reason is not None:
                self.stop_reasons[monitor] = reason

    def share_stop_reasons(self, monitors: Sequence[Monitor], ranks: Ranks) -> None:
        """Let every rank know why any rank's monitor asks for the end; every rank must call this."""
        reasons = {index: self.stop_reasons[each] for index, each in enumerate(monitors) if each in self.stop_reasons}
        for others in ranks.all_gather(reasons):
            for index, reason in others.items():
                self.stop_reasons.setdefault(monitors[index], reason)

    def without_failures(self) -> Outcome:
        """The results of the monitors that did not fail, and have one."""

        def kept(results: dict[Monitor, Any]) -> dict[Monitor, Any]:
            return {
                monitor: result
                for monitor, result in results.items()
                if monitor not in self.errors and result is not None
            }

        return Outcome(kept(self.values), self.errors, kept(self.scalars), kept(self.stop_reasons))
