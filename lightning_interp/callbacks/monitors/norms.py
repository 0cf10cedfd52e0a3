"""How large weights, gradients and updates are, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.base import Monitor, MonitorOptions
from lightning_interp.errors import ConfigurationError
from lightning_interp.model.sharding import local_shard
from lightning_interp.render import history_heatmap
from lightning_interp.sinks.records import Picture, Scalar, ScalarLayout
from lightning_interp.weights import Layers, check_order, parameter_norms

__all__ = ["NormMonitor"]

_TITLES = {
    "weight": "weights",
    "gradient": "gradients",
    "update_ratio": "update / weight",
}
_COLUMNS = 50  # of the picture


class _Seen(NamedTuple):
    """One kind of norm: each layer's, and the total's, at a look, and all layers at all looks so far."""

    names: tuple[str, ...]
    there: list[bool]  # which layers have it
    values: list[float]  # (L + 1,): the layers, the total
    steps: list[int]
    table: Tensor  # (L, steps)


class NormMonitor(Monitor):
    """Writes the norms of each layer's weights, gradients and updates, and of all layers together.

    A layer's own parameters (weight and bias) count as one vector. Gradients are those of the last optimiser step
    before the look: accumulated, unscaled, not yet clipped. The update ratio is the real change that this step made
    to the weights, over the weights' norm before it. Tags: ``norms/weight/<layer>``, ``norms/gradient/<layer>``,
    ``norms/update_ratio/<layer>``, each with ``total``; the pictures ``norms/weight``, ... show all layers by logged
    steps.

    Args:
        ord: The norm's order, a number of at least 1 or infinity.
        weights: Whether weights are measured.
        gradients: Whether gradients are.
        updates: Whether updates are; this holds a copy of the parameters during the step that is measured.
        **options: See :class:`Monitor`: ``every_n_epochs``, ``at_epochs``, ``every_n_train_steps``, ``at_start``,
            ``name``, ``on_error``.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> from lightning_interp import NormMonitor
        >>> NormMonitor(ord=float("inf"), every_n_train_steps=100)
        NormMonitor
    """

    kind = "norms"

    def __init__(
        self,
        *,
        ord: float = 2,
        weights: bool = True,
        gradients: bool = True,
        updates: bool = True,
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(**options)
        self.order = check_order(ord)
        for name, value in {"weights": weights, "gradients": gradients, "updates": updates}.items():
            if not isinstance(value, bool):
                raise ConfigurationError(f"{name} takes True or False, got {value!r}")
        if not (weights or gradients or updates):
            raise ConfigurationError("NormMonitor has nothing to measure: weights, gradients and updates are all False")
        self.weights, self.gradients, self.updates = weights, gradients, updates
        self._layers = Layers((), {})
        self._stepped: dict[str, nn.Parameter] = {}
        self._before: dict[str, Tensor] = {}
        self._measured: dict[str, dict[str, Tensor]] = {}
        self._history: dict[str, dict[int, Tensor]] = {}

    def check(self, module: LightningModule) -> None:
        """Learn the layers; forget what an interrupted run left."""
        self._measured.clear()
        self._before.clear()
        self._stepped.clear()
        layers = Layers.of(module)
        if layers.names != self._layers.names and self._layers.names:
            self._history.clear()
        self._layers = layers

    def tags(self, module: LightningModule) -> list[str]:
        """One picture for each kind of norm."""
        return [self.tag(what) for what in self._kinds()]

    def before_optimizer_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Measure the gradients while they are whole; keep the weights that the step will change."""
        if self.gradients:
            gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
            self._measured.setdefault("gradient", {}).update(parameter_norms(gradients, self.order))
        if self.updates:
            self._stepped.update(parameters)
            self._before.update({name: each.detach().clone() for name, each in parameters.items()})

    def after_optimizer_step(self) -> None:
        """Measure what the step changed."""
        before, now = list(self._before.values()), [self._stepped[name].detach() for name in self._before]
        if before:
            self._measured.setdefault("before", {}).update(parameter_norms(self._before, self.order))
            torch._foreach_sub_([local_shard(each) for each in before], [local_shard(each) for each in now])
            self._measured.setdefault("update", {}).update(parameter_norms(self._before, self.order))
        self._before.clear()
        self._stepped.clear()

    def observe(self, module: nn.Module, step: int) -> dict[str, _Seen]:
        """For each kind of norm: the layers' norms now and at the earlier looks."""
        measured, self._measured = self._measured, {}
        if self.weights:
            measured["weight"] = parameter_norms(dict(module.named_parameters()), self.order)
        rows = {what: self._layers.combine(norms, self.order) for what, norms in measured.items() if norms}
        if "update" in rows:
            before, update = rows.pop("before"), rows.pop("update")
            rows["update_ratio"] = torch.where(before > 0, update / before, torch.nan)
            measured["update_ratio"] = measured["update"]
        if not rows:
            return {}
        seen = {}
        for (what, _), row in zip(rows.items(), torch.stack(list(rows.values())).cpu(), strict=True):  # one transfer
            with_norm = {self._layers.of_parameter[name] for name in measured[what]}
            there = [index in with_norm for index in range(len(self._layers.names))]
            history = self._history.setdefault(what, {})
            history[step] = torch.where(torch.tensor(there), row[:-1], torch.nan)
            steps = _spread(sorted(history))
            table = torch.stack([history[each] for each in steps], dim=1)
            seen[what] = _Seen(self._layers.names, there, row.tolist(), steps, table)
        return seen

    def report(self, seen: dict[str, _Seen], step: int) -> Iterator[Scalar | Picture | ScalarLayout]:
        """A number a layer, all layers by logged steps as a picture, and which curves share a chart."""
        order = "max" if self.order == float("inf") else f"{self.order:g}"
        for what, found in seen.items():
            for name, there, value in zip(found.names, found.there, found.values, strict=False):
                if there:
                    yield Scalar(self.tag(f"{what}/{name}"), value)
            yield Scalar(self.tag(f"{what}/total"), found.values[-1])
            label = f"ratio of L{order} norms" if what == "update_ratio" else f"L{order} norm"
            title = f"{_TITLES[what]}, layers by logged steps"
            picture = history_heatmap(found.names, found.steps, found.table, title, label)
            yield Picture(self.tag(what), picture)
        # Before the first step only weights are seen, but TensorBoard takes a layout once.
        charts = {what: [rf"{re.escape(self.tag(what))}/.*"] for what in self._kinds()}
        charts["total"] = [re.escape(self.tag(f"{what}/total")) for what in self._kinds()]
        yield ScalarLayout(self.tag("layers"), charts)

    def state_dict(self) -> dict[str, Any]:
        """What the picture shows of the past."""
        return {"layers": list(self._layers.names), "history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        self._layers = Layers(tuple(state_dict["layers"]), {})
        self._history = state_dict["history"]

    def _kinds(self) -> list[str]:
        return [
            what
            for what, is_wanted in zip(_TITLES, (self.weights, self.gradients, self.updates), strict=True)
            if is_wanted
        ]


def _spread(steps: list[int]) -> list[int]:
    """At most so many steps as a picture has columns for, evenly spread, the last one kept."""
    if len(steps) <= _COLUMNS:
        return steps
    return [steps[round(index * (len(steps) - 1) / (_COLUMNS - 1))] for index in range(_COLUMNS)]
