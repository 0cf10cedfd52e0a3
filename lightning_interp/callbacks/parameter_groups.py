"""Parameter groups that are split after the optimiser was created, and the schedulers' values for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_interp.errors import ConfigurationError

__all__ = ["GroupIndices", "add_group", "find_groups", "find_head_group", "follow_head", "set_rate", "split_groups"]

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SCHEDULER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")


class GroupIndices(NamedTuple):
    """Indices of the optimiser and of its parameter group, for the head and for each group of the backbone."""

    head: tuple[int, int]
    backbone: tuple[tuple[int, int], ...]


def find_head_group(optimizers: Sequence[Optimizer], head: list[nn.Parameter]) -> tuple[int, int]:
    """Return the indices of the head's group; raise a :class:`ConfigurationError` if no optimiser trains it."""
    for parameter in head:
        for indices in find_groups(optimizers, {id(parameter)}, exclusive=False):
            return indices
    raise ConfigurationError(
        "no optimiser trains the new head, whose learning rate the backbone's follows; make the optimiser in "
        "configure_optimizers, of the module's current parameters"
    )


def find_groups(optimizers: Sequence[Optimizer], ids: set[int], *, exclusive: bool = True) -> Iterator[tuple[int, int]]:
    """Yield the indices of the groups with any of these parameters and, if exclusive, without others.

    Args:
        optimizers: The optimisers.
        ids: The ``id`` of each parameter.
        exclusive: Whether groups with other parameters are left out.
    """
    for optimizer_index, optimizer in enumerate(optimizers):
        for group_index, group in enumerate(optimizer.param_groups):
            is_wanted = [id(parameter) in ids for parameter in group["params"]]
            if any(is_wanted) and (all(is_wanted) or not exclusive):
                yield optimizer_index, group_index


def split_groups(optimizer: Optimizer, ids: set[int], schedulers: list[Any]) -> None:
    """Move these parameters out of each group that has others, into a new group with the same options."""
    for index, group in enumerate(list(optimizer.param_groups)):
        is_moved = [id(parameter) in ids for parameter in group["params"]]
        if not any(is_moved) or all(is_moved):
            continue
        names = group.get("param_names", [""] * len(is_moved))
        items = list(zip(group["params"], names, is_moved, strict=True))
        group["params"] = [parameter for parameter, _, moved in items if not moved]
        if "param_names" in group:
            group["param_names"] = [name for _, name, moved in items if not moved]
        moved_parameters = [parameter for parameter, _, moved in items if moved]
        add_group(optimizer, index, moved_parameters, [name for _, name, moved in items if moved], schedulers)


def add_group(
    optimizer: Optimizer, source: int, parameters: list[nn.Parameter], names: list[str], schedulers: list[Any]
) -> None:
    """Add a group with the options of the source group, and the schedulers' values for that group."""
    group = optimizer.param_groups[source]
    options = {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "param_names")}
    if "name" in options:
        options["name"] = f"{options['name']}-backbone"
    named_parameters = list(zip(names, parameters, strict=True))
    optimizer.add_param_group({**options, "params": named_parameters if "param_names" in group else parameters})
    for scheduler, name, values in _scheduler_lists(optimizer, schedulers):
        setattr(scheduler, name, [*values, copy.copy(values[source])])


def follow_head(optimizer: Optimizer, head: int, group: int, multiplier: float, schedulers: list[Any]) -> None:
    """Schedule a group of the backbone like the head's group, with rates divided by the multiplier."""
    head_group, backbone_group = optimizer.param_groups[head], optimizer.param_groups[group]
    for name in _GROUP_RATES:
        if name in head_group and name != "lr":
            backbone_group[name] = head_group[name] / multiplier
    for scheduler, name, values in _scheduler_lists(optimizer, schedulers):
        value = values[head] / multiplier if name in _SCHEDULER_RATES else values[head]
        setattr(scheduler, name, [value if index == group else other for index, other in enumerate(values)])


def _scheduler_lists(optimizer: Optimizer, schedulers: Sequence[Any]) -> Iterator[tuple[Any, str, list[Any]]]:
    """Attributes with a value for each group, of the optimiser's schedulers and of those within them."""
    for scheduler in schedulers:
        if getattr(scheduler, "optimizer", None) is optimizer:
            for name in (*_SCHEDULER_RATES, *_SCHEDULER_LISTS):
                values = getattr(scheduler, name, None)
                if isinstance(values, (list, tuple)):
                    yield scheduler, name, list(values)
            yield from _scheduler_lists(optimizer, getattr(scheduler, "_schedulers", ()))


def set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Set a group's learning rate."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # in place: a compiled or captured step reads this tensor
    else:
        group["lr"] = float(rate)
