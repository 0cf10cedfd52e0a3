"""When a monitor is due: pure functions of epoch and step. Knows no torch and no Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_interp.checks import check_bool, check_integer, is_integer
from lightning_interp.errors import ConfigurationError

__all__ = ["Schedule"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The epochs or optimiser steps at which a monitor is due.

    Exactly one of the three rules holds. The answer depends on epoch and step alone, so it is the same on every rank
    without communication.

    Args:
        every_n_epochs: Due at the end of the epochs where ``(epoch + 1) % every_n_epochs == 0``.
        at_epochs: 0-based epochs at whose end it is due, instead of ``every_n_epochs``.
        every_n_train_steps: Due after every so many optimiser steps, instead of both.
        at_start: Whether it is due before training, too, as step 0.

    Raises:
        ConfigurationError: If a number is not a positive integer, ``at_epochs`` is empty or holds a negative
            number, or more than one rule is given.

    Example:
        >>> schedule = Schedule(every_n_epochs=2)
        >>> [epoch for epoch in range(6) if schedule.due_after_epoch(epoch)]
        [1, 3, 5]
        >>> Schedule(every_n_train_steps=100).due_after_steps(previous=199, now=200)
        True
    """

    every_n_epochs: int = 1
    at_epochs: tuple[int, ...] | None = None
    every_n_train_steps: int | None = None
    at_start: bool = True

    @classmethod
    def create(
        cls,
        every_n_epochs: int = 1,
        at_epochs: Sequence[int] | None = None,
        every_n_train_steps: int | None = None,
        at_start: bool = True,
    ) -> Schedule:
        """Build a schedule from a monitor's options: ``at_epochs`` may be any sequence of integers."""
        if at_epochs is not None:
            if isinstance(at_epochs, (str, int)):
                raise ConfigurationError(f"at_epochs takes a list of 0-based epochs, got {at_epochs!r}")
            at_epochs = tuple(at_epochs)
        return cls(every_n_epochs, at_epochs, every_n_train_steps, at_start)

    def __post_init__(self) -> None:
        check_integer("every_n_epochs", self.every_n_epochs)
        if self.every_n_train_steps is not None:
            check_integer("every_n_train_steps", self.every_n_train_steps)
        if self.at_epochs is not None:
            wrong = [epoch for epoch in self.at_epochs if not is_integer(epoch) or epoch < 0]
            if wrong or not self.at_epochs:
                raise ConfigurationError(
                    f"at_epochs takes a list of 0-based epochs, got {list(self.at_epochs)!r}; to record only the "
                    "untrained model, pass a schedule that is never due and keep at_start=True"
                    if not self.at_epochs
                    else f"at_epochs takes 0-based epochs, got {wrong[0]!r} in {list(self.at_epochs)!r}"
                )
        chosen = [
            name
            for name, given in (
                ("every_n_epochs", self.every_n_epochs != 1),
                ("at_epochs", self.at_epochs is not None),
                ("every_n_train_steps", self.every_n_train_steps is not None),
            )
            if given
        ]
        if len(chosen) > 1:
            raise ConfigurationError(f"{' and '.join(chosen)} exclude each other; give one of them")
        check_bool("at_start", self.at_start)

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether it is due at the end of the 0-based ``epoch``."""
        if self.every_n_train_steps is not None:
            return False
        if self.at_epochs is not None:
            return epoch in self.at_epochs
        return (epoch + 1) % self.every_n_epochs == 0

    def due_after_steps(self, previous: int, now: int) -> bool:
        """Whether a multiple of ``every_n_train_steps`` lies in ``(previous, now]`` optimiser steps.

        A batch can bring no step (accumulation) or several (manual optimisation).
        """
        every = self.every_n_train_steps
        return every is not None and now // every > previous // every
