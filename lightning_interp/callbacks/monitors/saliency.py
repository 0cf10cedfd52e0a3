"""Gradients of the class score beside the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_interp import explain
from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.contract import ProbeMonitor, ProbeMonitorOptions
from lightning_interp.callbacks.inputs import Needs
from lightning_interp.callbacks.monitors._captions import captions
from lightning_interp.callbacks.monitors._map_method import MapMethod, Method
from lightning_interp.data.probe import Probe
from lightning_interp.model.trace import Trace
from lightning_interp.render import (
    ColorScale,
    check_colormap,
    colorize,
    enlarge,
    side_by_side,
    tile_grid,
)
from lightning_interp.sinks.records import Picture

__all__ = ["SaliencyMonitor"]

_PERCENTILE = 99.0


class SaliencyMonitor(ProbeMonitor):
    """Draw the gradient of the pre-softmax class score with respect to the pixels, beside each image of the probe.

    Over the channels the largest absolute value counts. Tag: ``saliency/<method>``.

    Args:
        method: ``"saliency"``, ``"smoothgrad"``, ``"vargrad"``, ``"input_x_gradient"``, ``"integrated_gradients"``,
            ``"guided_backprop"``, ``"guided_gradcam"``, ``"deconvnet"``, an explainer of
            :mod:`lightning_interp.explain`, or a callable ``(model, images, targets) -> maps`` (N, H, W).
        target: Which class is explained: ``"predicted"``, ``"label"``, or a class number.
        cmap: The name of a matplotlib colour map.
        method_options: What the method itself takes, as ``{"n_samples": 20}``.
        **options: See :class:`ProbeMonitor`: ``probe``, ``predict``, ``unpack``; and :class:`Monitor`:
            ``every_n_epochs``, ``at_epochs``, ``every_n_train_steps``, ``at_start``, ``name``, ``on_error``.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> from lightning_interp import SaliencyMonitor
        >>> SaliencyMonitor(method="smoothgrad", method_options={"n_samples": 20}, at_epochs=[0, 9])
        SaliencyMonitor

    Reference:
        Simonyan et al., Deep Inside Convolutional Networks, ICLR Workshop 2014; Smilkov et al., SmoothGrad, 2017.
    """

    kind = "saliency"
    methods: ClassVar = explain.explainers("gradients")

    def __init__(
        self,
        *,
        method: Method = "saliency",
        target: str | int = "predicted",
        cmap: str = "inferno",
        method_options: Mapping[str, Any] | None = None,
        **options: Unpack[ProbeMonitorOptions],
    ) -> None:
        super().__init__(**options)
        self.map_method = MapMethod(type(self).__name__, self.methods, method, None, target, method_options)
        check_colormap(cmap)
        self.cmap = cmap

    def tags(self, module: LightningModule) -> list[str]:
        """One picture."""
        return [self.tag(self.map_method.name)]

    def describe(self) -> str:
        """How to read the pixels."""
        return (
            f"Which pixels change the class score, by {self.map_method.name}, beside each image: bright pixels change "
            f"it most. Each image is divided by its own {_PERCENTILE:.0f}th percentile. Gradients are local and noisy: "
            "they say what a tiny change would do, not which part of the image the score consists of."
        )

    def needs(self, module: nn.Module) -> Needs:
        """What the method needs."""
        return self.map_method.needs()

    def outputs(self, trace: Trace, labels: Tensor | None) -> dict[str, Tensor]:
        """The maps, the classes that they explain, and the logits."""
        return self.map_method.outputs(trace, labels)

    def draw(self, outputs: Mapping[str, Tensor], probe: Probe) -> Iterator[Picture]:
        """One grid of image and map pairs."""
        # By a percentile: a few outliers would leave all other pixels black.
        heat = explain.normalize_maps(outputs["maps"], "max_abs", percentile=_PERCENTILE)
        tiles = side_by_side(enlarge(probe.to_display()), enlarge(colorize(heat, self.cmap)))
        scale = ColorScale(
            self.cmap, "0", "max", f"{self.map_method.name}, each image by its own {_PERCENTILE:.0f}th percentile"
        )
        yield Picture(self.tag(self.map_method.name), tile_grid(tiles, captions(outputs, probe), scale=scale))
