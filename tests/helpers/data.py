"""Images and data sets that the tests of lightning_interp.data share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def images(n: int = 4, channels: int = 3, size: tuple[int, int] = (6, 5)) -> Tensor:
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(n))


def bytes_of(values: Tensor) -> Tensor:
    """(N, 3, H, W) within [0, 1] -> (N, H, W, 3) uint8."""
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class Items(Dataset[Any]):
    """A data set of given items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def streams() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist(), torch.initial_seed()
