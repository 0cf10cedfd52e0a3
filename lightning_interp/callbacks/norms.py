"""How large weights, gradients and updates are, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_interp._lightning import LightningModule
from lightning_interp.callbacks.base import Monitor, MonitorOptions
from lightning_interp.errors import ConfigurationError
from lightning_interp.records import Picture, Scalar, ScalarLayout
from lightning_interp.render import history_heatmap
from lightning_interp.weights import Layers, check_order, parameter_norms

__all__ = ["NormMonitor"]

_TITLES = {
    "weight": "norm of the weights",
    "gradient": "norm of the gradients",
    "update_ratio": "update over weight, the step before the look",
}
_COLUMNS = 50  # of the picture


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
        """Learn the layers."""
        layers = Layers.of(module)
        if layers.names != self._layers.names and self._layers.names:
            self._history.clear()
        self._layers = layers

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
            torch._foreach_sub_(before, now)
            self._measured.setdefault("update", {}).update(parameter_norms(self._before, self.order))
        self._before.clear()
        self._stepped.clear()

    def observe(self, module: nn.Module) -> dict[str, tuple[list[bool], Tensor]]:
        """For each kind of norm: which layers have one, and (L + 1,) norms on the device, the total last."""
        measured, self._measured = self._measured, {}
        seen = {}
        if self.weights:
            norms = parameter_norms(dict(module.named_parameters()), self.order)
            seen["weight"] = self._present(norms), self._layers.combine(norms, self.order)
        if measured.get("gradient"):
            norms = measured["gradient"]
            seen["gradient"] = self._present(norms), self._layers.combine(norms, self.order)
        if measured.get("update"):
            update, before = (self._layers.combine(measured[kind], self.order) for kind in ("update", "before"))
            ratio = torch.where(before > 0, update / before, torch.nan)
            seen["update_ratio"] = self._present(measured["update"]), ratio
        return seen

    def report(
        self, seen: dict[str, tuple[list[bool], Tensor]], step: int
    ) -> Iterator[Scalar | Picture | ScalarLayout]:
        """A number a layer, all layers by logged steps as a picture, and which curves share a chart."""
        if not seen:
            return
        rows = torch.stack([norms for _, norms in seen.values()]).cpu()  # the one synchronisation
        for (what, (present, _)), row in zip(seen.items(), rows, strict=True):
            for name, there, value in zip((*self._layers.names, "total"), [*present, True], row.tolist(), strict=True):
                if there:
                    yield Scalar(self.tag(f"{what}/{name}"), value)
            history = self._history.setdefault(what, {})
            history[step] = torch.where(torch.tensor(present), row[:-1], torch.nan)
            steps = _spread(sorted(history))
            table = torch.stack([history[each] for each in steps], dim=1)
            order = "max" if self.order == float("inf") else f"{self.order:g}"
            title = f"{_TITLES[what]}, each layer at each logged step"
            yield Picture(self.tag(what), history_heatmap(self._layers.names, steps, table, title, f"L{order} norm"))
        charts = {what: [rf"{re.escape(self.tag(what))}/.*"] for what in seen}
        charts["total"] = [re.escape(self.tag(f"{what}/total")) for what in seen]
        yield ScalarLayout(self.tag("layers"), charts)

    def state_dict(self) -> dict[str, Any]:
        """What the picture shows of the past."""
        return {"layers": list(self._layers.names), "history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        self._layers = Layers(tuple(state_dict["layers"]), {})
        self._history = state_dict["history"]

    def _present(self, norms: Mapping[str, Tensor]) -> list[bool]:
        with_norm = {self._layers.of_parameter[name] for name in norms}
        return [index in with_norm for index in range(len(self._layers.names))]


def _spread(steps: list[int]) -> list[int]:
    """At most so many steps as a picture has columns for, evenly spread, the last one kept."""
    if len(steps) <= _COLUMNS:
        return steps
    return [steps[round(index * (len(steps) - 1) / (_COLUMNS - 1))] for index in range(_COLUMNS)]
