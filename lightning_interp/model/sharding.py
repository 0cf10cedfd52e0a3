"""Parameters that are spread over processes: what must be done with them, by all processes together."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["full_tensor", "is_sharded", "local_shard", "reset_fsdp_state", "reshard"]


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; every process must ask for the same tensors in the same order.

    Args:
        tensor: Any tensor; one that is sharded (a ``DTensor``) is put together, which takes its full size in memory.

    Example:
        >>> full_tensor(torch.ones(2))
        tensor([1., 1.])
    """
    if not _is_distributed(tensor):
        return tensor.detach()
    with torch.no_grad():
        found: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return found


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in its own memory; it may be empty."""
    if not _is_distributed(tensor):
        return tensor
    with torch.no_grad():
        found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return found


def is_sharded(module: nn.Module) -> bool:
    """Whether all processes must take part in each of the module's forward passes; the same answer on all of them."""
    return bool(_fully_sharded(module.modules())) or any(map(_is_distributed, module.parameters()))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Give modules that FSDP2 left gathered their sharded parameters back; their next pass gathers them again."""
    for each in _fully_sharded(modules):
        each.reshard()


def reset_fsdp_state(modules: Iterable[nn.Module]) -> None:
    """Let FSDP2 forget a pass that an error ended half-way: on all processes, which else gather in different orders."""
    for each in _fully_sharded(modules):
        # Only the root knows of it, and only after its first pass; older releases of torch have nothing of the kind.
        with suppress(RuntimeError, AttributeError):
            each.reset_iter_state()


# Asked of the loaded modules, so that explaining an ordinary model imports nothing distributed.


def _is_distributed(tensor: Tensor) -> bool:
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def _fully_sharded(modules: Iterable[nn.Module]) -> list[Any]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [each for each in modules if isinstance(each, kind)]
