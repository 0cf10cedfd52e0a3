"""Histograms of weights and gradients."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from typing_extensions import Unpack

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.contract import MonitorOptions, StepMonitor
from lightning_interp.checks import check_bool, check_integer
from lightning_interp.errors import ConfigurationError
from lightning_interp.model.locate import plain_name
from lightning_interp.sinks.records import Histogram, Scalar
from lightning_interp.weights import Histograms, histograms

__all__ = ["WeightHistogramMonitor"]


class WeightHistogramMonitor(StepMonitor):
    """Write a histogram of each parameter, counted on the parameter's device.

    Tags: ``weights/<name>`` and ``gradients/<name>``; ``weights/not_finite`` and ``gradients/not_finite`` say how many
    values are NaN or infinite, which the histograms leave out, and ``weights/<name>/not_finite`` where they are.

    Args:
        parameters: A glob (``"layer4.*"``) or a list of globs and names.
        gradients: Whether the gradients are shown, too: those of the last optimiser step before the snapshot,
            accumulated and unscaled, before clipping.
        bins: How many bins.
        **options: See :class:`Monitor`: ``every_n_epochs``, ``at_epochs``, ``every_n_train_steps``, ``at_start``,
            ``name``, ``on_error``.

    Raises:
        ConfigurationError: If an argument is out of range; before the first batch is trained, if a glob matches
            nothing.

    Example:
        >>> from lightning_interp import WeightHistogramMonitor
        >>> WeightHistogramMonitor(parameters="*.weight", gradients=True, bins=128)
        WeightHistogramMonitor
    """

    kind = "weights"

    def __init__(
        self,
        *,
        parameters: str | Sequence[str] = "*",
        gradients: bool = False,
        bins: int = 64,
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(**options)
        globs = [parameters] if isinstance(parameters, str) else list(parameters)
        if not globs or not all(isinstance(glob, str) and glob for glob in globs):
            raise ConfigurationError(f"parameters takes a glob or a list of globs, got {parameters!r}")
        self.globs = globs
        self.gradients = check_bool("gradients", gradients)
        self.bins = check_integer("bins", bins)
        self._gradient_histograms: Histograms | None = None

    def check(self, module: LightningModule) -> None:
        """Raise where a glob matches no parameter."""
        names = [plain_name(name) for name, _ in module.named_parameters()]
        for glob in self.globs:
            if names and not fnmatch.filter(names, glob):
                raise ConfigurationError(f"no parameter matches {glob!r}; there are {', '.join(names[:6])}, ...")

    def reset(self) -> None:
        """Drop the gradients of a step that no snapshot followed."""
        self._gradient_histograms = None

    def describe(self) -> str:
        """How to read the histograms."""
        return (
            "How the values of each parameter are spread, with those that are not finite left out and counted under "
            "`not_finite`. A distribution that collapses to zero or runs away is a sign of a dying or exploding layer; "
            "how wide it should be depends on the layer's size and its normalisation."
        )

    def before_optimizer_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Count the gradients."""
        if self.gradients:
            chosen = self._chosen(parameters)
            gradients = {name: parameter.grad for name, parameter in chosen.items() if parameter.grad is not None}
            self._gradient_histograms = histograms(gradients, self.bins)

    def capture(self, module: nn.Module, step: int) -> dict[str, Histograms]:
        """Count the weights; the gradients are counted already."""
        data = {self.kind: histograms(self._chosen(dict(module.named_parameters())), self.bins)}
        if self._gradient_histograms is not None:
            data["gradients"], self._gradient_histograms = self._gradient_histograms, None
        return data

    def records(self, data: dict[str, Histograms], step: int) -> Iterator[Histogram | Scalar]:
        """The histograms, and how many values they leave out."""
        for kind, counted in data.items():
            prefix = f"{kind}-{self.name}/" if self.name else f"{kind}/"
            total_not_finite = 0
            for name, bins, not_finite in counted.to_cpu():
                if bins is not None:
                    yield Histogram(prefix + name, *bins)
                if not_finite:
                    yield Scalar(f"{prefix}{name}/not_finite", not_finite)
                total_not_finite += not_finite
            yield Scalar(f"{prefix}not_finite", total_not_finite)

    def _chosen(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        named = {plain_name(name): parameter for name, parameter in parameters.items()}
        return {
            name: parameter
            for name, parameter in named.items()
            if any(fnmatch.fnmatchcase(name, glob) for glob in self.globs)
        }
