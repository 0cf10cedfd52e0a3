"""Who explains which share of the probe, who writes, and how ranks agree on a failure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed

from lightning_interp._lightning import Trainer

__all__ = ["Ranks"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that train together.

    Args:
        rank: This process's number, from 0.
        size: How many there are.

    Example:
        >>> [Ranks(rank, 3).share(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, trainer: Trainer) -> Ranks:
        """The ranks of a Trainer; one where no process group was started."""
        if torch.distributed.is_available() and torch.distributed.is_initialized() and trainer.world_size > 1:
            return cls(trainer.global_rank, trainer.world_size)
        return cls()

    @property
    def writes(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """The part of ``total`` images that this rank explains; in the order of ranks they make up the whole."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def everyone(self, value: Any) -> list[Any]:
        """What each rank has to say, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def to_writer(self, value: Any) -> list[Any] | None:
        """What each rank found, on the writing rank; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.writes else None
        torch.distributed.gather_object(value, values, dst=0)
        return values

    def from_writer(self, value: Any) -> Any:
        """The writing rank's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]
