"""Who explains which share of the probe, who writes, and how ranks agree on a failure."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from lightning_interp.callbacks._lightning import Trainer
from lightning_interp.model.sharding import is_sharded

__all__ = ["Ranks", "obstacle", "runs_together"]


def runs_together(trainer: Trainer) -> bool:
    """Whether all ranks must run the same passes: where the module is sharded, over one process or many."""
    return is_sharded(trainer.lightning_module)


def obstacle(trainer: Trainer) -> str | None:
    """Why nothing can be seen of a Trainer's module on any rank, if so."""
    # By name: the strategies of both packages, without importing either.
    strategies = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    wrapped = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    flat = wrapped is not None and any(isinstance(each, wrapped) for each in _modules(trainer))
    if flat or strategies & {"FSDPStrategy", "XLAFSDPStrategy"}:
        return (
            "FSDP1 (FSDPStrategy) keeps flat parameters, of which neither layers nor gradients can be read; use "
            "ModelParallelStrategy with torch's fully_shard (FSDP2)"
        )
    if "DeepSpeedStrategy" in strategies and getattr(trainer.strategy, "zero_stage_3", False):
        return "DeepSpeed's stage 3 keeps parameters where they cannot be read; use stage 2, or ModelParallelStrategy"
    return None


def _modules(trainer: Trainer) -> Iterable[nn.Module]:
    model = trainer.strategy.model
    return () if model is None else model.modules()


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

    def align(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        """Overwrite tensors with the writing rank's; ``device`` is where the ranks can talk."""
        if self.size == 1:
            return
        for tensor in tensors:
            there = tensor.detach().to(device).contiguous()
            torch.distributed.broadcast(there, src=0)
            tensor.data.copy_(there)
