"""Running a model, and reading the class scores out of whatever it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError, describe

__all__ = ["Predict", "checked_images", "first_tensor", "output_logits", "run_model"]

Predict = Callable[[nn.Module, Tensor], Any]


def checked_images(images: Any) -> Tensor:
    """The images, where they fit the contract; otherwise a :class:`ConfigurationError`."""
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        raise ConfigurationError(
            f"images are a floating tensor (N, C, H, W) with at least one image, got {describe(images)}"
        )
    return images


def run_model(model: nn.Module, images: Tensor, predict: Predict | None) -> Any:
    """The model's output, with a helpful error where it has no ``forward``."""
    if predict is not None:
        return predict(model, images)
    try:
        return model(images)
    except NotImplementedError as error:
        # torch's own placeholder raises it; so does Lightning's, which calls torch's.
        if _has_forward(model):
            raise
        raise ConfigurationError(
            f"{type(model).__name__} has no forward(images); pass predict=lambda model, images: ... that returns the "
            "logits"
        ) from error


def _has_forward(model: nn.Module) -> bool:
    forward = inspect.unwrap(type(model).forward)
    return forward.__module__.split(".")[0] not in {"torch", "lightning", "pytorch_lightning"}


def output_logits(output: Any) -> Tensor:
    """The class scores (N, K) in whatever a model returned.

    Args:
        output: A tensor, a mapping or an object with ``logits``, or a tuple whose first tensor they are; one
            logit an image may come as (N,).

    Returns:
        The tensor.

    Raises:
        ConfigurationError: If nothing like that is there.

    Example:
        >>> import torch
        >>> output_logits({"logits": torch.zeros(2, 5), "features": torch.zeros(2, 8)}).shape
        torch.Size([2, 5])
    """
    found: Any = output
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        named = [output[name] for name in ("logits", "out", "output", "scores") if name in output]
        found = named[0] if named else tensors[0] if len(tensors) == 1 else None
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)):
        found = first_tensor(output)
    if not isinstance(found, Tensor) or found.ndim == 0:
        raise ConfigurationError(
            f"no logits found in the model's output, {describe(output)}; expected a tensor (N, K), a mapping or "
            "object with 'logits', or a tuple that starts with them; otherwise pass predict=lambda model, images: ..."
        )
    return found[:, None] if found.ndim == 1 else found


def first_tensor(output: Any) -> Tensor | None:
    """The tensor, or the first one in a tuple or list."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return next((each for each in output if isinstance(each, Tensor)), None)
    return None
