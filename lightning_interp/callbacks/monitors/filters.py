"""The filters of convolutions as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.contract import MonitorOptions, WeightMonitor
from lightning_interp.checks import check_integer
from lightning_interp.errors import ConfigurationError
from lightning_interp.model.locate import find_layer, first_convolution
from lightning_interp.model.sharding import full_tensor
from lightning_interp.render import filter_grid
from lightning_interp.sinks.records import Picture

__all__ = ["FilterMonitor"]


class FilterMonitor(WeightMonitor):
    """Draw the filters of convolutions.

    The filters of the first convolution (a ViT's patch embedding too) are small images: in colour where it has three
    input channels, in grey where it has one. A deeper layer gives a grid, filters by input channels, largest norm
    first. Each filter is scaled by its own largest absolute weight; zero is mid-grey. Tag: ``filters/<layer>``.

    Args:
        layers: Dotted names of convolutions; None: the first one.
        max_filters: How many filters are shown at most.
        **options: See :class:`Monitor`: ``every_n_epochs``, ``at_epochs``, ``every_n_train_steps``, ``at_start``,
            ``name``, ``on_error``.

    Raises:
        ConfigurationError: If an argument is out of range; before the first batch is trained, if a layer does not exist
            or has no filters (O, C, h, w).

    Example:
        >>> from lightning_interp import FilterMonitor
        >>> FilterMonitor(layers=["conv1", "layer1.0.conv2"], max_filters=32)
        FilterMonitor
    """

    kind = "filters"

    def __init__(
        self,
        *,
        layers: Sequence[str] | None = None,
        max_filters: int = 64,
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(**options)
        if isinstance(layers, str) or (layers is not None and not all(isinstance(name, str) for name in layers)):
            raise ConfigurationError(f"layers takes a list of dotted names, got {layers!r}")
        self.layers = None if layers is None else list(layers)
        self.max_filters = check_integer("max_filters", max_filters)

    def check(self, module: LightningModule) -> None:
        """Raise where a layer does not exist or has no filters."""
        for name in self._names(module):
            weight = getattr(find_layer(module, name), "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 4:
                given = f"a weight {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
                raise ConfigurationError(f"the layer {name!r} has {given}; filters (O, C, h, w) were expected")

    def tags(self, module: LightningModule) -> list[str]:
        """One picture a layer."""
        return [self.tag(name) for name in self._names(module)]

    def describe(self) -> str:
        """How to read the filters."""
        return (
            "The weights of convolution filters as pictures, each scaled by its own largest absolute weight; zero is "
            "mid-grey. Filters that stay noise have not learned (yet); identical ones are redundant. A strong picture "
            "is no large weight: the scale is each filter's own."
        )

    def capture(self, module: nn.Module, step: int) -> dict[str, Tensor]:
        """Copies of the filters, on the CPU."""
        weights = {name: find_layer(module, name).get_parameter("weight") for name in self._names(module)}
        return {name: full_tensor(weight).to("cpu", torch.float32, copy=True) for name, weight in weights.items()}

    def records(self, data: dict[str, Tensor], step: int) -> Iterator[Picture]:
        """One picture a layer."""
        for name, weight in data.items():
            kind: Literal["image", "channels"] = "image" if weight.shape[1] in (1, 3) else "channels"
            picture = filter_grid(weight, name=name, kind=kind, max_filters=self.max_filters)
            yield Picture(self.tag(name), picture)

    def _names(self, module: nn.Module) -> list[str]:
        return [first_convolution(module)[0]] if self.layers is None else self.layers
