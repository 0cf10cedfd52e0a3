"""The one error of our own, and the words for what came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["ConfigurationError", "describe"]


class ConfigurationError(ValueError):
    """An argument, model or data set with which explaining cannot work, whatever the training does.

    It says what was expected, what came and what to do. Unlike the failure of an explanation, which never
    ends a training run, it is always raised, before the first batch is trained.

    Example:
        >>> import torch
        >>> from lightning_interp.model.locate import find_layer
        >>> find_layer(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), "1")
        Traceback (most recent call last):
        ...
        lightning_interp.errors.ConfigurationError: there is no layer '1' in Sequential...
    """


def describe(value: Any, depth: int = 3) -> str:
    """Say what something is in a few words, for an error: types, shapes, keys.

    Args:
        value: Anything.
        depth: How many levels of containers to open.

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
    opened: list[str]
    if isinstance(value, Mapping):
        opened = [f"{key}: {describe(item, depth - 1)}" for key, item in value.items()] if depth else []
        marks = "{}"
    elif isinstance(value, (list, tuple)):
        opened = [describe(item, depth - 1) for item in value] if depth else []
        marks = "()"
    else:
        own = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else {}
        tensors = {name: item for name, item in own.items() if isinstance(item, Tensor)}
        opened = [f"{name}: {describe(item)}" for name, item in tensors.items()]
        return f"{kind} with {', '.join(opened)}" if opened else kind
    shown = opened if len(opened) <= 6 else [*opened[:6], f"... {len(opened)} in all"]
    return f"{kind} {marks[0]}{', '.join(shown)}{marks[1]}"
