"""Class activation maps over the images."""

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
from lightning_interp.checks import check_fraction
from lightning_interp.data.probe import Probe
from lightning_interp.model.trace import Trace
from lightning_interp.render import ColorScale, check_colormap, enlarge, overlay, tile_grid
from lightning_interp.sinks.records import Picture

__all__ = ["CAMMonitor"]


class CAMMonitor(ProbeMonitor):
    """Draw class activation maps over the images of the probe, one picture a snapshot.

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
        super().__init__(**options)
        self.map_method = MapMethod(type(self).__name__, self.methods, method, layer, target, method_options)
        check_colormap(cmap)
        self.cmap = cmap
        self.alpha = check_fraction("alpha", alpha)

    def check(self, module: LightningModule) -> None:
        """Raise where the layer does not exist."""
        self.map_method.check(module)

    def tags(self, module: LightningModule) -> list[str]:
        """One picture."""
        return [self.tag(self.map_method.name)]

    def describe(self) -> str:
        """How to read the heat."""
        return (
            f"Where the evidence for a class lies, by {self.map_method.name}; the bar below the picture says which "
            f"colour is strongest. {scale_of(self.map_method)}, so a weak map looks as hot as a strong one. A map is "
            "as fine as its layer, on most networks 7 x 7 to 14 x 14. Green frame: predicted right; red: wrong."
        )

    def needs(self, module: nn.Module) -> Needs:
        """What the method needs."""
        return self.map_method.needs()

    def outputs(self, trace: Trace, labels: Tensor | None) -> dict[str, Tensor]:
        """The maps, the classes that they explain, and the logits."""
        return self.map_method.outputs(trace, labels)

    def draw(self, outputs: Mapping[str, Tensor], probe: Probe) -> Iterator[Picture]:
        """One grid of all images."""
        has_zero = self.map_method.has_zero
        heat = explain.normalize_maps(outputs["maps"], "relu" if has_zero else "min_max")
        tiles = overlay(enlarge(probe.to_display()), heat, self.cmap, self.alpha)
        label = f"{self.map_method.name}, {scale_of(self.map_method)[0].lower()}{scale_of(self.map_method)[1:]}"
        scale = ColorScale(self.cmap, "0" if has_zero else "min", "max", label)
        yield Picture(self.tag(self.map_method.name), tile_grid(tiles, captions(outputs, probe), scale=scale))


def scale_of(method: MapMethod) -> str:
    """What the colours of a map are divided by."""
    return "Each image by its own maximum" if method.has_zero else "Each image from its own minimum to its maximum"
