"""The package's exception, and descriptions of values for its messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["ConfigurationError", "describe"]

_MOST_ITEMS = 6


class ConfigurationError(ValueError):
    """An invalid argument, model or data set, with which no explanation can be computed.

    The message states what was expected, what was given and what to do. Unlike the failure of an explanation,
    which never ends a training run, it is always raised, before the first batch is trained.

    Example:
        >>> import torch
        >>> from lightning_interp.model.locate import find_layer
        >>> find_layer(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), "1")
        Traceback (most recent call last):
        ...
        lightning_interp.errors.ConfigurationError: there is no layer '1' in Sequential...
    """


def describe(value: Any, depth: int = 3) -> str:
    """Describe a value in one line for an error message: types, shapes, keys.

    Args:
        value: Any value.
        depth: Number of nested containers whose items are described.

    Returns:
        One line.

    Example:
        >>> import torch
        >>> from lightning_interp.errors import describe
        >>> describe({"a": torch.zeros(2, 3), "b": [1, "text"]})
        'dict {a: float32 (2, 3), b: list (int, str)}'
    """
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"ndarray {value.dtype} {value.shape}"
    items: list[str]
    if isinstance(value, Mapping):
        items = [f"{key}: {describe(item, depth - 1)}" for key, item in value.items()] if depth else []
        brackets = "{}"
    elif isinstance(value, (list, tuple)):
        items = [describe(item, depth - 1) for item in value] if depth else []
        brackets = "()"
    else:
        attributes = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else {}
        items = [f"{name}: {describe(item)}" for name, item in attributes.items() if isinstance(item, Tensor)]
        return f"{kind} with {', '.join(items)}" if items else kind
    shown = items if len(items) <= _MOST_ITEMS else [*items[:_MOST_ITEMS], f"... {len(items)} in all"]
    return f"{kind} {brackets[0]}{', '.join(shown)}{brackets[1]}"
