"""Targets of an explanation: classes, or a callable from a model's output to scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.model.outputs import output_logits

__all__ = ["Targets", "as_targets", "resolve_classes", "target_scores"]

Targets = int | Tensor | Callable[[Any], Tensor] | None


def as_targets(targets: Any) -> Targets:
    """Return targets, with lists and arrays of classes as tensors.

    Raises:
        ConfigurationError: If they are neither classes nor a callable.

    Example:
        >>> as_targets([2, 0])
        tensor([2, 0])
    """
    if targets is None or isinstance(targets, (int, Tensor)) or callable(targets):
        return targets  # type: ignore[no-any-return]
    try:
        return torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigurationError(
            "targets takes None, a class, int64 (N,) classes, or a callable from the output to scores (N,), got "
            f"{describe(targets)}"
        ) from None


def resolve_classes(targets: int | Tensor | None, logits: Tensor) -> Tensor:
    """Return the target class of each image.

    Args:
        targets: A class for all images, int64 (N,) classes, or None for each image's predicted class.
        logits: (N, K); one logit is the evidence for class 1 against class 0.

    Returns:
        int64 (N,), on the logits' device.

    Raises:
        ConfigurationError: If targets do not fit the logits.

    Example:
        >>> logits = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.0, 0.0]])
        >>> resolve_classes(None, logits), resolve_classes(2, logits)
        (tensor([1, 0]), tensor([2, 2]))
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise ConfigurationError(
            f"the model's output {tuple(logits.shape)} holds no class scores (N, K); pass targets as a callable from "
            "the output to scores (N,)"
        )
    count, n_classes = logits.shape
    if targets is None:
        return (logits[:, 0] > 0).long() if n_classes == 1 else logits.argmax(1)
    classes = torch.as_tensor(targets, device=logits.device)
    if classes.is_inference():
        classes = classes.clone()  # inference tensors cannot be saved for a backward pass
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ConfigurationError(f"targets are class numbers (int64), got {classes.dtype}")
    classes = classes.long().expand(count) if classes.ndim == 0 else classes.long()
    if classes.shape != (count,):
        raise ConfigurationError(
            f"targets has shape {tuple(classes.shape)}, expected one class for each of the {count} images"
        )
    last = max(n_classes, 2) - 1
    is_out_of_range = (classes < 0) | (classes > last)
    if bool(is_out_of_range.any()):
        raise ConfigurationError(
            f"target {int(classes[is_out_of_range][0])} is out of range; the model has the classes 0 to {last}"
        )
    return classes


def target_scores(output: Any, targets: Tensor | Callable[[Any], Tensor], count: int) -> Tensor:
    """Return the explained score of each image.

    Args:
        output: The model's output.
        targets: int64 (N,) classes within its range, or a callable from the output to scores (N,).
        count: N.

    Returns:
        (N,) float32: the targets' logits, or the callable's scores.

    Raises:
        ConfigurationError: If the callable returns anything else.

    Example:
        >>> target_scores(torch.tensor([[0.5, 2.0], [3.0, 0.0]]), torch.tensor([1, 0]), 2)
        tensor([2., 3.])
    """
    if callable(targets):
        scores = targets(output)
        if not isinstance(scores, Tensor) or scores.shape != (count,):
            raise ConfigurationError(
                f"the callable given as targets gave {describe(scores)}, expected scores ({count},)"
            )
        return scores.float()
    logits = output_logits(output).float()
    if logits.shape[1] == 1:
        return logits[:, 0] * (2 * targets - 1)
    return logits.gather(1, targets[:, None])[:, 0]
