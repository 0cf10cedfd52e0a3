"""The processes that train together: shares of work, and collective operations on Python objects."""

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

__all__ = ["Ranks", "is_collective", "unsupported_strategy"]


def is_collective(trainer: Trainer) -> bool:
    """Whether all ranks must run the same passes: where the module is sharded, over one process or many."""
    return is_sharded(trainer.lightning_module)


def unsupported_strategy(trainer: Trainer) -> str | None:
    """Why neither layers nor gradients of a Trainer's module can be read, on any rank; None where they can."""
    # By name: the strategies of both packages, without importing either.
    strategies = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    wrapper = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    is_flat = wrapper is not None and any(isinstance(module, wrapper) for module in _modules(trainer))
    if is_flat or strategies & {"FSDPStrategy", "XLAFSDPStrategy"}:
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
        rank: This process's rank, from 0.
        size: The number of processes.

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
    def is_rank_zero(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This rank's part of ``total`` items; in the order of the ranks the parts make up all of them."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's value on rank zero, None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_rank_zero else None
        torch.distributed.gather_object(value, values, dst=0)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank zero's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def broadcast_tensors(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        """Overwrite tensors with rank zero's, over a device that the process group's backend can use."""
        if self.size == 1:
            return
        for tensor in tensors:
            values = tensor.detach().to(device).contiguous()
            torch.distributed.broadcast(values, src=0)
            tensor.data.copy_(values)
