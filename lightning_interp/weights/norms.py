"""Norms of layers, many tensors at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.locate import plain_name
from lightning_interp.model.sharding import full_tensor, local_shard

__all__ = ["Layers", "check_order", "parameter_norms"]


def check_order(order: object) -> float:
    """A norm's order as a float.

    Raises:
        ConfigurationError: If it is not a number of at least 1, or infinity.

    Example:
        >>> check_order(2)
        2.0
    """
    if isinstance(order, bool) or not isinstance(order, (int, float)) or not order >= 1:
        raise ConfigurationError(f"ord takes a norm's order, a number of at least 1 or float('inf'), got {order!r}")
    return float(order)


@dataclass(frozen=True, slots=True)
class Layers:
    """Which parameters make up which layer.

    Args:
        names: The layers' dotted names, in order of definition; a module's own parameters are one layer.
        of_parameter: The layer's number for each parameter's name.

    Example:
        >>> layers = Layers.of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
        >>> (layers.names, layers.of_parameter["2.bias"])
        (('0', '2'), 1)
    """

    names: tuple[str, ...]
    of_parameter: Mapping[str, int]

    @classmethod
    def of(cls, module: nn.Module) -> Layers:
        """The layers of a module that own parameters."""
        names: dict[str, int] = {}
        of_parameter = {}
        for name, _ in module.named_parameters():
            layer = plain_name(name.rpartition(".")[0]) or "root"
            of_parameter[name] = names.setdefault(layer, len(names))
        return cls(tuple(names), of_parameter)

    @torch.no_grad()
    def combine(self, norms: Mapping[str, Tensor], order: float = 2.0) -> Tensor:
        """The norm of each layer's parameters taken together, and of all.

        Args:
            norms: For parameters' names their norm (), see :func:`parameter_norms`; all of one order.
            order: The order.

        Returns:
            (L + 1,) float32 on the first norm's device, without waiting for it: the layers, then the total; 0 for a
            layer of which nothing is given.

        Example:
            >>> layers = Layers.of(nn.Linear(1, 1))
            >>> layers.combine({"weight": torch.tensor(3.0), "bias": torch.tensor(4.0)})
            tensor([5., 5.])
        """
        if not norms:
            return torch.zeros(len(self.names) + 1)
        device = next(iter(norms.values())).device
        parts = torch.stack([each.to(device) for each in norms.values()])
        index = torch.tensor([self.of_parameter[name] for name in norms], device=device)
        layers = parts.new_zeros(len(self.names))
        if math.isinf(order):
            return torch.cat([layers.scatter_reduce(0, index, parts, "amax"), parts.amax()[None]])
        # In double precision the powers of float32 norms neither vanish nor overflow.
        powers = parts.double() ** order
        sums = torch.cat([layers.double().index_add(0, index, powers), powers.sum()[None]])
        return (sums ** (1 / order)).float()


@torch.no_grad()
def parameter_norms(tensors: Mapping[str, Tensor], order: float = 2.0) -> dict[str, Tensor]:
    """The norm of each tensor, as few kernels as there are kinds of tensors.

    Args:
        tensors: Named tensors of any shape and real dtype, on any devices; empty ones are left out. Sharded ones are
            put together, one at a time: every process must ask for the same.
        order: The norm's order, at least 1, or infinity.

    Returns:
        For each name a norm (), float32 on the tensor's device, without waiting for it. It is summed in float32 (half
        precision too), where norms below about 1e-22 are 0 and those above 1e19 infinite.

    Example:
        >>> parameter_norms({"weight": torch.tensor([3.0, 4.0])})
        {'weight': tensor(5.)}
    """
    kept = {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel() > 0}
    if not kept:
        return {}
    sharded = [name for name, tensor in kept.items() if local_shard(tensor) is not tensor]
    if sharded:
        norms = parameter_norms({name: tensor for name, tensor in kept.items() if name not in sharded}, order)
        for name in sharded:
            norms |= parameter_norms({name: full_tensor(kept[name])}, order)
        return {name: norms[name] for name in kept}
    values = [each if each.dtype in (torch.float32, torch.float64) else each.float() for each in kept.values()]
    if order in (1.0, 2.0) or math.isinf(order):
        found = list(torch._foreach_norm(values, order))
    else:
        found = [torch.linalg.vector_norm(value, order) for value in values]
    return {name: each.float() for name, each in zip(kept, found, strict=True)}
