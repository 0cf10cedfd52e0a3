"""Checks of the numbers that options are, made before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import TypeGuard

from lightning_interp.errors import ConfigurationError

__all__ = ["checked_integer", "checked_number", "is_integer", "is_number"]


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, NumPy's included; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, NumPy's included; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def checked_integer(name: str, value: object, least: int = 1) -> int:
    """An integer of at least so much as an ``int``; otherwise a :class:`ConfigurationError`.

    Example:
        >>> import numpy as np
        >>> checked_integer("n_samples", np.int64(3))
        3
    """
    if not is_integer(value) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigurationError(f"{name} takes {kind}, got {value!r}")
    return int(value)


def checked_number(name: str, value: object, takes: str, fits: Callable[[float], bool]) -> float:
    """A number within a range as a ``float``; otherwise a :class:`ConfigurationError`.

    Args:
        name: The option.
        value: What was given for it.
        takes: What it takes, for the error.
        fits: Whether a number is within the range.

    Returns:
        The number.

    Example:
        >>> checked_number("p", 1, "a share", lambda share: 0 <= share <= 1)
        1.0
    """
    if not is_number(value) or not fits(value):
        raise ConfigurationError(f"{name} takes {takes}, got {value!r}")
    return float(value)
