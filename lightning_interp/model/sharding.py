"""Sharded parameters, and the collective operations on them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["full_tensor", "is_sharded", "local_shard", "reset_fsdp_state", "reshard"]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, detached; a collective operation, so all ranks must call it in the same order.

    Args:
        tensor: Any tensor; a sharded one (a ``DTensor``) is all-gathered, which takes its full size in memory.

    Example:
        >>> full_tensor(torch.ones(2))
        tensor([1., 1.])
    """
    if not _is_distributed(tensor):
        return tensor.detach()
    with torch.no_grad():
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, which shares its memory and may be empty."""
    if not _is_distributed(tensor):
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's forward passes are collective operations; the same on all ranks."""
    return bool(_fully_sharded(module.modules())) or any(map(_is_distributed, module.parameters()))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Reshard the modules whose parameters FSDP2 left gathered; their next pass gathers them again."""
    for module in _fully_sharded(modules):
        module.reshard()


def reset_fsdp_state(modules: Iterable[nn.Module]) -> None:
    """Reset FSDP2's state of a pass that an error ended, on all ranks, which else would gather in different orders."""
    for module in _fully_sharded(modules):
        # Only a root has this state, and only after its first pass; older releases of torch have no such method.
        with suppress(RuntimeError, AttributeError):
            module.reset_iter_state()


# Looked up in the loaded modules, so that nothing distributed is imported for ordinary models.


def _is_distributed(tensor: Tensor) -> bool:
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def _fully_sharded(modules: Iterable[nn.Module]) -> list[Any]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in modules if isinstance(module, kind)]
