"""The drop of the class score where patches of the image are hidden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.contract import ProbeMonitor, ProbeMonitorOptions
from lightning_interp.callbacks.inputs import Needs
from lightning_interp.callbacks.monitors._captions import captions
from lightning_interp.callbacks.monitors._map_method import MapMethod
from lightning_interp.checks import check_fraction, is_number
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import normalize_maps, occlusion
from lightning_interp.explain.perturbation import patch_boxes, patch_starts, spread
from lightning_interp.model.trace import Trace
from lightning_interp.render import (
    ColorScale,
    check_colormap,
    draw_boxes,
    enlarge,
    overlay,
    side_by_side,
    tile_grid,
)
from lightning_interp.sinks.records import Picture

__all__ = ["OcclusionMonitor"]

_MARK = (255, 0, 200)
_LARGE = 10**6


class OcclusionMonitor(ProbeMonitor):
    """Hide a patch of each image, position after position, and draw where the class score drops.

    Each tile is an image with the map laid over it (the drop of the score, averaged over the patches that cover a
    pixel; positions whose hiding raises the score stay cold), beside the image with the most damaging patch marked. The
    caption says by how much the score drops there. Tag: ``occlusion/occlusion``.

    A snapshot runs the model about ``1 / stride ** 2`` times for each image: choose ``every_n_epochs`` accordingly.

    Args:
        patch: The patch's side: an int is in pixels, a float a share of the image's side; or (height, width).
        stride: How far apart the patches stand, in the same way; at most ``patch``.
        fill: What is shown instead: None, each image's own channel means, or a number.
        target: Which class is explained: ``"predicted"``, ``"label"``, or a class number.
        cmap: The name of a matplotlib colour map.
        alpha: How much of the heat covers the image, 0 to 1.
        **options: See :class:`ProbeMonitor`: ``probe``, ``predict``, ``unpack``; and :class:`Monitor`:
            ``every_n_epochs``, ``at_epochs``, ``every_n_train_steps``, ``at_start``, ``name``, ``on_error``.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> from lightning_interp import OcclusionMonitor
        >>> OcclusionMonitor(patch=0.25, stride=0.125, every_n_epochs=10)
        OcclusionMonitor

    Reference:
        Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014.
    """

    kind = "occlusion"

    def __init__(
        self,
        *,
        patch: int | float | Sequence[int | float] = 0.2,
        stride: int | float | Sequence[int | float] = 0.1,
        fill: float | None = None,
        target: str | int = "predicted",
        cmap: str = "jet",
        alpha: float = 0.5,
        **options: Unpack[ProbeMonitorOptions],
    ) -> None:
        self.patch, self.stride = (
            tuple(length) if isinstance(length, Sequence) else length for length in (patch, stride)
        )
        patch_starts((_LARGE, _LARGE), self.patch, self.stride)  # type: ignore[arg-type]
        if fill is not None and not is_number(fill):
            raise ConfigurationError(f"fill takes a number or None, got {fill!r}")
        chosen = {"patch": self.patch, "stride": self.stride, "fill": fill, "returns": "drop"}
        super().__init__(**options)
        self.map_method = MapMethod(type(self).__name__, {"occlusion": occlusion}, "occlusion", None, target, chosen)
        check_colormap(cmap)
        self.cmap = cmap
        self.alpha = check_fraction("alpha", alpha)

    def tags(self, module: LightningModule) -> list[str]:
        """One picture."""
        return [self.tag("occlusion")]

    def describe(self) -> str:
        """How to read the drops."""
        return (
            "How much the class score drops where a patch hides the image, averaged over the patches that cover a "
            "pixel; beside it the patch that hurts most. Each image by its own maximum. A patch that is smaller than "
            "the object may change little, and the fill itself may look like something to the model."
        )

    def needs(self, module: nn.Module) -> Needs:
        """The logits; the patched images take passes of their own."""
        return self.map_method.needs()

    def outputs(self, trace: Trace, labels: Tensor | None) -> dict[str, Tensor]:
        """``drops`` (N, rows, columns) of the score at each position of the patch, the classes, and the logits."""
        trace = trace.with_targets(self.map_method.targets(labels))
        drops = occlusion.attribute(trace, **self.map_method.options)
        return {"drops": drops, "explained": trace.targets, "logits": trace.logits.detach().float()}  # type: ignore[dict-item]

    def draw(self, outputs: Mapping[str, Tensor], probe: Probe) -> Iterator[Picture]:
        """One grid of map and image pairs."""
        drops, (height, width) = outputs["drops"], probe.images.shape[-2:]
        boxes = patch_boxes((height, width), self.patch, self.stride)  # type: ignore[arg-type]
        finite = drops.flatten(1).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        worst = finite.argmax(1)
        pictures = enlarge(probe.to_display())
        factors = torch.tensor([pictures.shape[2] / width, pictures.shape[1] / height] * 2)
        marked = draw_boxes(pictures, list((boxes[worst] * factors)[:, None]), _MARK)
        heat = normalize_maps(spread(drops, boxes, (height, width)))
        tiles = side_by_side(overlay(pictures, heat, self.cmap, self.alpha), marked)
        below = [f"score drops by {float(drop):.3g}" for drop in finite.amax(1)]
        scale = ColorScale(self.cmap, "0", "max", "drop of the class score, each image by its own maximum")
        title = "the most damaging patch is marked"
        grid = tile_grid(tiles, captions(outputs, probe, below), title=title, scale=scale)
        yield Picture(self.tag("occlusion"), grid)
