"""Where the model looks: class activation maps over the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_interp import explain
from lightning_interp.callbacks.base import Method, ProbeMonitor, ProbeMonitorOptions, check_share
from lightning_interp.callbacks.monitors._captions import captions
from lightning_interp.data.probe import Probe
from lightning_interp.render import ColorScale, check_colormap, enlarge, normalize_maps, overlay, tile_grid
from lightning_interp.sinks.records import Picture

__all__ = ["CAMMonitor"]


class CAMMonitor(ProbeMonitor):
    """Lays class activation maps over the probe's images, one picture a look.

    Each tile is an image with the rectified map, divided by its own maximum, laid over it; its frame is green and its
    caption ticked where the prediction is right. Tag: ``cam/<method>``.

    Args:
        method: ``"gradcam"`` (any model), ``"cam"`` (exact, for a GAP + linear head), ``"gradcam_plus_plus"``,
            ``"hirescam"``, ``"xgradcam"``, ``"layercam"``, ``"eigencam"``, ``"scorecam"``, ``"ablationcam"``,
            ``"attention_rollout"`` (vision transformers), ``"rise"``, an explainer of :mod:`lightning_interp.explain`,
            or a callable ``(model, images, targets) -> maps`` (N, H, W).
        layer: A dotted name or module; None: the tensor that enters the final pooling or flattening.
        target: Which class is explained: ``"predicted"``, ``"label"``, or a class number.
        cmap: The name of a matplotlib colour map.
        alpha: How much of the heat covers the image, 0 to 1.
        method_options: What the method itself takes.
        **options: See :class:`ProbeMonitor`: ``probe``, ``predict``, ``unpack``; and :class:`Monitor`:
            ``every_n_epochs``, ``at_epochs``, ``every_n_train_steps``, ``at_start``, ``name``, ``on_error``.

    Raises:
        ConfigurationError: If an argument is out of range; before the first batch is trained, if the layer does not
            exist or the model has none with spatial extent.

    Example:
        >>> from lightning_interp import CAMMonitor
        >>> CAMMonitor(method="gradcam", layer="layer4", every_n_epochs=5)
        CAMMonitor

    Reference:
        Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016; Selvaraju et al., Grad-CAM,
        ICCV 2017.
    """

    kind = "cam"
    methods: ClassVar = {name: method for name, method in explain.explainers().items() if method.family != "gradients"}

    def __init__(
        self,
        *,
        method: Method = "gradcam",
        layer: str | nn.Module | None = None,
        target: str | int = "predicted",
        cmap: str = "jet",
        alpha: float = 0.5,
        method_options: Mapping[str, Any] | None = None,
        **options: Unpack[ProbeMonitorOptions],
    ) -> None:
        super().__init__(method=method, layer=layer, target=target, method_options=method_options, **options)
        check_colormap(cmap)
        self.cmap = cmap
        check_share("alpha", alpha)
        self.alpha = alpha

    def draw(self, seen: Mapping[str, Tensor], probe: Probe) -> Iterator[Picture]:
        """One grid of all images."""
        relative = isinstance(self.method, explain.Explainer) and not self.method.has_zero
        heat = normalize_maps(seen["maps"], "min_max" if relative else "relu")
        tiles = overlay(enlarge(probe.to_display()), heat, self.cmap, self.alpha)
        own = "each image from its own minimum to its maximum" if relative else "each image by its own maximum"
        scale = ColorScale(self.cmap, "min" if relative else "0", "max", f"{self.method_name}, {own}")
        yield Picture(self.tag(self.method_name), tile_grid(tiles, captions(seen, probe), scale=scale))
