"""Norms of layers, for many tensors at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_interp.checks import check_number
from lightning_interp.model.locate import plain_name
from lightning_interp.model.sharding import full_tensor, local_shard

__all__ = ["Layers", "check_order", "parameter_norms"]


def check_order(order: object) -> float:
    """Return the order of a norm as a float.

    Raises:
        ConfigurationError: If it is not a number of at least 1, or infinity.

    Example:
        >>> check_order(2)
        2.0
    """
    takes = "a norm's order, a number of at least 1 or float('inf')"
    return check_number("ord", order, takes, lambda number: number >= 1)


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a module, and the layer of each parameter.

    Args:
        names: The layers' dotted names, in order of definition; a layer is a module with direct parameters.
        of_parameter: The layer's index for each parameter's name.

    Example:
        >>> layers = Layers.of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
        >>> (layers.names, layers.of_parameter["2.bias"])
        (('0', '2'), 1)
    """

    names: tuple[str, ...]
    of_parameter: Mapping[str, int]

    @classmethod
    def of(cls, module: nn.Module) -> Layers:
        """Return the layers of a module that have direct parameters."""
        names: dict[str, int] = {}
        of_parameter = {}
        for name, _ in module.named_parameters():
            layer = plain_name(name.rpartition(".")[0]) or "root"
            of_parameter[name] = names.setdefault(layer, len(names))
        return cls(tuple(names), of_parameter)

    @torch.no_grad()
    def combine(self, norms: Mapping[str, Tensor], order: float = 2.0) -> Tensor:
        """Combine the norms of parameters to those of layers, and of all parameters.

        Args:
            norms: The norm () of each named parameter, see :func:`parameter_norms`; all of one order.
            order: The order.

        Returns:
            (L + 1,) float32 on the first norm's device, without synchronising with it: the layers, then the total; 0
            for a layer without any of these parameters.

        Example:
            >>> layers = Layers.of(nn.Linear(1, 1))
            >>> layers.combine({"weight": torch.tensor(3.0), "bias": torch.tensor(4.0)})
            tensor([5., 5.])
        """
        if not norms:
            return torch.zeros(len(self.names) + 1)
        device = next(iter(norms.values())).device
        parts = torch.stack([norm.to(device) for norm in norms.values()])
        index = torch.tensor([self.of_parameter[name] for name in norms], device=device)
        layers = parts.new_zeros(len(self.names))
        if math.isinf(order):
            return torch.cat([layers.scatter_reduce(0, index, parts, "amax"), parts.amax()[None]])
        # In double precision the powers of float32 norms neither underflow nor overflow.
        powers = parts.double() ** order
        sums = torch.cat([layers.double().index_add(0, index, powers), powers.sum()[None]])
        return (sums ** (1 / order)).float()


@torch.no_grad()
def parameter_norms(tensors: Mapping[str, Tensor], order: float = 2.0) -> dict[str, Tensor]:
    """Compute the norm of each tensor, with one kernel for all tensors of a dtype and device.

    Args:
        tensors: Named tensors of any shape and real dtype, on any devices; empty ones are left out. Sharded ones are
            gathered, one at a time: a collective, which every process must call for the same tensors.
        order: The norm's order, at least 1, or infinity.

    Returns:
        For each name a norm (), float32 on the tensor's device, without synchronising with it. It is accumulated in
        float32 (half precision too), in which norms below about 1e-22 are 0 and those above 1e19 infinite.

    Example:
        >>> parameter_norms({"weight": torch.tensor([3.0, 4.0])})
        {'weight': tensor(5.)}
    """
    non_empty = {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel() > 0}
    if not non_empty:
        return {}
    sharded = [name for name, tensor in non_empty.items() if local_shard(tensor) is not tensor]
    if sharded:
        by_name = parameter_norms({name: tensor for name, tensor in non_empty.items() if name not in sharded}, order)
        for name in sharded:
            by_name |= parameter_norms({name: full_tensor(non_empty[name])}, order)
        return {name: by_name[name] for name in non_empty}
    values = [
        tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float() for tensor in non_empty.values()
    ]
    if order in (1.0, 2.0) or math.isinf(order):
        norms = list(torch._foreach_norm(values, order))
    else:
        norms = [torch.linalg.vector_norm(value, order) for value in values]
    return {name: norm.float() for name, norm in zip(non_empty, norms, strict=True)}
