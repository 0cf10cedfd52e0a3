"""Checks of arguments, each with one message; open to every folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TypeGuard, TypeVar

from lightning_interp.errors import ConfigurationError

__all__ = [
    "check_bool",
    "check_choice",
    "check_fraction",
    "check_integer",
    "check_number",
    "is_integer",
    "is_number",
]

Choice = TypeVar("Choice")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, NumPy's included; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, NumPy's included; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_integer(name: str, value: object, minimum: int = 1) -> int:
    """Return an integer of at least ``minimum`` as an ``int``; otherwise raise a :class:`ConfigurationError`.

    Example:
        >>> import numpy as np
        >>> check_integer("n_samples", np.int64(3))
        3
    """
    if not is_integer(value) or value < minimum:
        kind = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
        raise ConfigurationError(f"{name} takes {kind}, got {value!r}")
    return int(value)


def check_number(name: str, value: object, expected: str, is_valid: Callable[[float], bool]) -> float:
    """Return a number within a range as a ``float``; otherwise raise a :class:`ConfigurationError`.

    Args:
        name: The argument.
        value: The value that was given for it.
        expected: What it takes, for the message.
        is_valid: Whether a number is within the range.

    Example:
        >>> check_number("p", 1, "a share", lambda share: 0 <= share <= 1)
        1.0
    """
    if not is_number(value) or not is_valid(value):
        raise ConfigurationError(f"{name} takes {expected}, got {value!r}")
    return float(value)


def check_fraction(name: str, value: object) -> float:
    """Return a number from 0 to 1 as a ``float``; otherwise raise a :class:`ConfigurationError`.

    Example:
        >>> check_fraction("alpha", 0.5)
        0.5
    """
    return check_number(name, value, "a number from 0 to 1", lambda share: 0 <= share <= 1)


def check_bool(name: str, value: object) -> bool:
    """Return True or False; otherwise raise a :class:`ConfigurationError`."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} takes True or False, got {value!r}")
    return value


def check_choice(name: str, value: object, choices: Collection[Choice]) -> Choice:
    """Return one of a few values; otherwise raise a :class:`ConfigurationError` that names near matches.

    Example:
        >>> check_choice("mode", "relu", ("relu", "min_max"))
        'relu'
    """
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    *others, last = map(repr, choices)
    near = get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(f"{name} takes {', '.join(others)}{' or ' if others else ''}{last}, got {value!r}{hint}")
