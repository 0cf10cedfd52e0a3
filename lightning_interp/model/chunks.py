"""How many images run through a model at once."""

from __future__ import annotations

import torch

__all__ = ["rows_per_pass"]


def rows_per_pass(device: torch.device, *, cpu: int, other: int) -> int:
    """Return the number of images in one forward pass.

    A CPU is faster over few images, whose activations stay in its caches; other devices need many to be busy.

    Args:
        device: Where the model runs.
        cpu: The number on a CPU.
        other: The number on any other device.

    Example:
        >>> rows_per_pass(torch.device("cpu"), cpu=16, other=64)
        16
    """
    return cpu if device.type == "cpu" else other
