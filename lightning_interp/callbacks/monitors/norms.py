"""Norms of weights, gradients and updates, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.contract import MonitorOptions, StepMonitor
from lightning_interp.checks import check_bool
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


class _NormData(NamedTuple):
    """One kind of norm: of the layers and of all parameters now, and of the layers at all snapshots so far."""

    names: tuple[str, ...]
    has_norm: list[bool]  # for each layer
    values: list[float]  # (L + 1,): the layers, the total
    steps: list[int]
    table: Tensor  # (L, steps)


class NormMonitor(StepMonitor):
    """Write the norms of each layer's weights, gradients and updates, and of all layers together.

    A layer's own parameters (weight and bias) count as one vector. Gradients are those of the last optimiser step
    before the snapshot: accumulated, unscaled, not yet clipped. The update ratio is the real change that this step made
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
        self.weights = check_bool("weights", weights)
        self.gradients = check_bool("gradients", gradients)
        self.updates = check_bool("updates", updates)
        if not (weights or gradients or updates):
            raise ConfigurationError("NormMonitor has nothing to measure: weights, gradients and updates are all False")
        self._layer_names: tuple[str, ...] = ()  # of the history
        self._stepped: dict[str, nn.Parameter] = {}
        self._before: dict[str, Tensor] = {}
        self._measured: dict[str, dict[str, Tensor]] = {}
        self._history: dict[str, dict[int, Tensor]] = {}

    def tags(self, module: LightningModule) -> list[str]:
        """One picture for each kind of norm."""
        return [self.tag(kind) for kind in self._kinds()]

    def reset(self) -> None:
        """Drop the measurements of a step that no snapshot followed."""
        self._measured.clear()
        self._before.clear()
        self._stepped.clear()

    def describe(self) -> str:
        """How to read the norms."""
        return (
            "How large each layer's weights and gradients are, and how far one optimiser step moves the weights "
            "compared with their norm (often about 1e-3). Gradients that vanish or explode show as layers that differ "
            "by orders of magnitude. Behind a normalisation layer the norm of the weights says little: they can be "
            "scaled freely."
        )

    def before_optimizer_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Measure the gradients; keep the weights that the step will change."""
        if self.gradients:
            gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
            self._measured.setdefault("gradient", {}).update(parameter_norms(gradients, self.order))
        if self.updates:
            self._stepped.update(parameters)
            self._before.update({name: parameter.detach().clone() for name, parameter in parameters.items()})

    def after_optimizer_step(self) -> None:
        """Measure what the step changed."""
        before, after = list(self._before.values()), [self._stepped[name].detach() for name in self._before]
        if before:
            self._measured.setdefault("before", {}).update(parameter_norms(self._before, self.order))
            torch._foreach_sub_(list(map(local_shard, before)), list(map(local_shard, after)))
            self._measured.setdefault("update", {}).update(parameter_norms(self._before, self.order))
        self._before.clear()
        self._stepped.clear()

    def capture(self, module: nn.Module, step: int) -> dict[str, _NormData]:
        """For each kind of norm: the layers' norms now and at the earlier snapshots."""
        layers = Layers.of(module)
        if layers.names != self._layer_names:
            self._history.clear()
            self._layer_names = layers.names
        measured, self._measured = self._measured, {}
        if self.weights:
            measured["weight"] = parameter_norms(dict(module.named_parameters()), self.order)
        rows = {kind: layers.combine(norms, self.order) for kind, norms in measured.items() if norms}
        if "update" in rows:
            before, update = rows.pop("before"), rows.pop("update")
            rows["update_ratio"] = torch.where(before > 0, update / before, torch.nan)
            measured["update_ratio"] = measured["update"]
        if not rows:
            return {}
        data = {}
        for kind, row in zip(rows, torch.stack(list(rows.values())).cpu(), strict=True):  # one transfer
            with_norm = {layers.of_parameter[name] for name in measured[kind]}
            has_norm = [index in with_norm for index in range(len(layers.names))]
            history = self._history.setdefault(kind, {})
            history[step] = torch.where(torch.tensor(has_norm), row[:-1], torch.nan)
            steps = _spread(sorted(history))
            table = torch.stack([history[logged] for logged in steps], dim=1)
            data[kind] = _NormData(layers.names, has_norm, row.tolist(), steps, table)
        return data

    def records(self, data: dict[str, _NormData], step: int) -> Iterator[Scalar | Picture | ScalarLayout]:
        """A number a layer, all layers by logged steps as a picture, and which curves share a chart."""
        order = "max" if self.order == float("inf") else f"{self.order:g}"
        for kind, norms in data.items():
            for name, has_norm, value in zip(norms.names, norms.has_norm, norms.values, strict=False):
                if has_norm:
                    yield Scalar(self.tag(f"{kind}/{name}"), value)
            yield Scalar(self.tag(f"{kind}/total"), norms.values[-1])
            label = f"ratio of L{order} norms" if kind == "update_ratio" else f"L{order} norm"
            title = f"{_TITLES[kind]}, layers by logged steps"
            yield Picture(self.tag(kind), history_heatmap(norms.names, norms.steps, norms.table, title, label))
        # Before the first step there are weights only, but TensorBoard takes a layout once.
        charts = {kind: [rf"{re.escape(self.tag(kind))}/.*"] for kind in self._kinds()}
        charts["total"] = [re.escape(self.tag(f"{kind}/total")) for kind in self._kinds()]
        yield ScalarLayout(self.tag("layers"), charts)

    def state_dict(self) -> dict[str, Any]:
        """Return the history that the picture shows."""
        return {"layers": list(self._layer_names), "history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of the run that is resumed."""
        self._layer_names = tuple(state_dict["layers"])
        self._history = state_dict["history"]

    def _kinds(self) -> list[str]:
        wanted = (self.weights, self.gradients, self.updates)
        return [kind for kind, is_wanted in zip(_TITLES, wanted, strict=True) if is_wanted]


def _spread(steps: list[int]) -> list[int]:
    """At most so many steps as a picture has columns for, evenly spread, the last one kept."""
    if len(steps) <= _COLUMNS:
        return steps
    return [steps[round(index * (len(steps) - 1) / (_COLUMNS - 1))] for index in range(_COLUMNS)]
