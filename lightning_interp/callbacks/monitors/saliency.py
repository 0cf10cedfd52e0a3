"""Which pixels matter: gradients of the class score beside the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from lightning_interp import explain
from lightning_interp.callbacks.base import Method, ProbeMonitor, ProbeMonitorOptions
from lightning_interp.callbacks.monitors._captions import captions
from lightning_interp.data.probe import Probe
from lightning_interp.render import (
    ColorScale,
    check_colormap,
    colorize,
    enlarge,
    normalize_maps,
    side_by_side,
    tile_grid,
)
from lightning_interp.sinks.records import Picture

__all__ = ["SaliencyMonitor"]

_PERCENTILE = 99.0


class SaliencyMonitor(ProbeMonitor):
    """Shows the gradient of the pre-softmax class score towards the pixels, beside each image of the probe.

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
        super().__init__(method=method, layer=None, target=target, method_options=method_options, **options)
        check_colormap(cmap)
        self.cmap = cmap

    def draw(self, seen: Mapping[str, Tensor], probe: Probe) -> Iterator[Picture]:
        """One grid of image and map pairs."""
        # A few hot pixels would leave the rest black.
        heat = normalize_maps(seen["maps"], "max_abs", percentile=_PERCENTILE)
        tiles = side_by_side(enlarge(probe.to_display()), enlarge(colorize(heat, self.cmap)))
        scale = ColorScale(
            self.cmap, "0", "max", f"{self.method_name}, each image by its own {_PERCENTILE:.0f}th percentile"
        )
        yield Picture(self.tag(self.method_name), tile_grid(tiles, captions(seen, probe), scale=scale))
