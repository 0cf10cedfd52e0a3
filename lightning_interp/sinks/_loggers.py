"""Recognise loggers without importing their packages."""

from __future__ import annotations

from typing import Any

__all__ = ["has_base", "live_experiment"]

# Lightning's stand-ins on ranks above zero and in a dry run, and what older wandb versions return when disabled.
_DISABLED = ("DummyLogger", "DummyExperiment", "_DummyExperiment", "RunDisabled")


def has_base(value: object, *names: str) -> bool:
    """Whether a class of one of these names is in the MRO of a value's type."""
    return any(base.__name__ in names for base in type(value).__mro__)


def live_experiment(logger: object) -> Any | None:
    """Return a logger's experiment, or None if it has none or is disabled."""
    if has_base(logger, *_DISABLED):
        return None
    experiment = getattr(logger, "experiment", None)
    return None if has_base(experiment, *_DISABLED) else experiment
