"""Parameter groups that are split after the optimiser was made, and the schedulers that know of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_interp.errors import ConfigurationError

__all__ = ["Places", "add_group", "find_head", "follow", "set_rate", "split_groups", "where"]

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SCHEDULER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")


class Places(NamedTuple):
    """Where the parameter groups stand: the optimiser's number and the group's, the same after a restart."""

    head: tuple[int, int]
    backbone: tuple[tuple[int, int], ...]


def find_head(optimizers: Sequence[Optimizer], head: list[nn.Parameter]) -> tuple[int, int]:
    """The place of the head's group; a :class:`ConfigurationError` where no optimiser trains it."""
    for parameter in head:
        for place in where(optimizers, {id(parameter)}, whole=False):
            return place
    raise ConfigurationError(
        "no optimiser trains the new head, whose learning rate the backbone's follows; make the optimiser in "
        "configure_optimizers, of self.parameters() as they are there"
    )


def where(optimizers: Sequence[Optimizer], ids: set[int], *, whole: bool = True) -> Iterator[tuple[int, int]]:
    """The places of the groups that hold some of these parameters and, if whole, no others."""
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            mine = [id(each) in ids for each in group["params"]]
            if any(mine) and (all(mine) or not whole):
                yield number, index


def split_groups(optimizer: Optimizer, ids: set[int], schedulers: list[Any]) -> None:
    """Move these parameters out of each group that holds others too."""
    for index, group in enumerate(list(optimizer.param_groups)):
        mine = [id(each) in ids for each in group["params"]]
        if not any(mine) or all(mine):
            continue
        parameters, names = group["params"], group.get("param_names", [""] * len(mine))
        moved = [(each, name) for each, name, is_mine in zip(parameters, names, mine, strict=True) if is_mine]
        group["params"] = [each for each, is_mine in zip(parameters, mine, strict=True) if not is_mine]
        if "param_names" in group:
            group["param_names"] = [each for each, is_mine in zip(names, mine, strict=True) if not is_mine]
        add_group(optimizer, index, [each for each, _ in moved], [name for _, name in moved], schedulers)


def add_group(
    optimizer: Optimizer, source: int, parameters: list[nn.Parameter], names: list[str], schedulers: list[Any]
) -> None:
    """Add a group with the options of another one, for the schedulers too."""
    group = optimizer.param_groups[source]
    new = {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "param_names")}
    if "name" in new:
        new["name"] = f"{new['name']}-backbone"
    with_names = list(zip(names, parameters, strict=True))
    optimizer.add_param_group({**new, "params": with_names if "param_names" in group else parameters})
    for each, name, values in _scheduled(optimizer, schedulers):
        setattr(each, name, [*values, copy.copy(values[source])])


def follow(optimizer: Optimizer, head: int, group: int, multiplier: float, schedulers: list[Any]) -> None:
    """Plan for a group of the backbone what is planned for the head's, at its own rate."""
    plan, mine = optimizer.param_groups[head], optimizer.param_groups[group]
    mine.update({name: plan[name] / multiplier for name in _GROUP_RATES if name in plan and name != "lr"})
    for each, name, values in _scheduled(optimizer, schedulers):
        entry = values[head] / multiplier if name in _SCHEDULER_RATES else values[head]
        setattr(each, name, [entry if index == group else value for index, value in enumerate(values)])


def _scheduled(optimizer: Optimizer, schedulers: Sequence[Any]) -> Iterator[tuple[Any, str, list[Any]]]:
    """What the optimiser's schedulers, and those that they are made of, keep for each group."""
    for each in schedulers:
        if getattr(each, "optimizer", None) is optimizer:
            for name in (*_SCHEDULER_RATES, *_SCHEDULER_LISTS):
                values = getattr(each, name, None)
                if isinstance(values, (list, tuple)):
                    yield each, name, list(values)
            yield from _scheduled(optimizer, getattr(each, "_schedulers", ()))


def set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Give a group a learning rate."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # a compiled or captured step reads this very tensor
    else:
        group["lr"] = float(rate)
