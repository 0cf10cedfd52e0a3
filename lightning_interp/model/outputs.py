"""Run a model, and extract the class scores from its output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError, describe

__all__ = ["Predict", "checked_images", "first_tensor", "output_logits", "run_model"]

Predict = Callable[[nn.Module, Tensor], Any]


def checked_images(images: Any) -> Tensor:
    """Return images that fit the contract; otherwise raise a :class:`ConfigurationError`."""
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        raise ConfigurationError(
            f"images are a floating tensor (N, C, H, W) with at least one image, got {describe(images)}"
        )
    return images


def run_model(model: nn.Module, images: Tensor, predict: Predict | None) -> Any:
    """Return the model's output; raise a :class:`ConfigurationError` where it has no ``forward``."""
    if predict is not None:
        return predict(model, images)
    try:
        return model(images)
    except NotImplementedError as error:
        # Raised by torch's placeholder, which Lightning's calls.
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
    """Return the class scores (N, K) in a model's output.

    Args:
        output: A tensor, a mapping or an object with ``logits``, or a tuple whose first tensor they are; a single
            logit for each image may be (N,).

    Returns:
        (N, K).

    Raises:
        ConfigurationError: If the output has none of these forms.

    Example:
        >>> import torch
        >>> output_logits({"logits": torch.zeros(2, 5), "features": torch.zeros(2, 8)}).shape
        torch.Size([2, 5])
    """
    logits: Any = output
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        named = [output[name] for name in ("logits", "out", "output", "scores") if name in output]
        logits = named[0] if named else tensors[0] if len(tensors) == 1 else None
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, (tuple, list)):
        logits = first_tensor(output)
    if not isinstance(logits, Tensor) or logits.ndim == 0:
        raise ConfigurationError(
            f"no logits found in the model's output, {describe(output)}; expected a tensor (N, K), a mapping or "
            "object with 'logits', or a tuple that starts with them; otherwise pass predict=lambda model, images: ..."
        )
    return logits[:, None] if logits.ndim == 1 else logits


def first_tensor(output: Any) -> Tensor | None:
    """Return the tensor itself, or the first one in a tuple or list; None where there is none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return next((item for item in output if isinstance(item, Tensor)), None)
    return None
