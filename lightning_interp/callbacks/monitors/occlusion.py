"""What the model cannot do without: the class score where patches of the image are hidden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_interp.callbacks.base import ProbeMonitor, ProbeMonitorOptions, check_share
from lightning_interp.callbacks.monitors._captions import captions
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import occlusion
from lightning_interp.explain.perturbation import patch_boxes, patch_starts, spread
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.trace import Trace
from lightning_interp.render import (
    ColorScale,
    check_colormap,
    draw_boxes,
    enlarge,
    normalize_maps,
    overlay,
    side_by_side,
    tile_grid,
)
from lightning_interp.sinks.records import Picture

__all__ = ["OcclusionMonitor"]

_MARK = (255, 0, 200)
_LARGE = 10**6


class OcclusionMonitor(ProbeMonitor):
    """Hides a patch of each image, place after place, and shows where the class score suffers.

    Each tile is an image with the map laid over it (the drop of the score, averaged over the patches that cover a
    pixel; places whose hiding raises the score stay cold), beside the image with the most damaging patch marked. The
    caption says by how much the score drops there. Tag: ``occlusion/occlusion``.

    A look runs the model about ``1 / stride ** 2`` times for each image: choose ``every_n_epochs`` accordingly.

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
    methods: ClassVar = {"occlusion": occlusion}

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
        self.patch, self.stride = (tuple(each) if isinstance(each, Sequence) else each for each in (patch, stride))
        patch_starts((_LARGE, _LARGE), self.patch, self.stride)  # type: ignore[arg-type]
        if fill is not None and (isinstance(fill, bool) or not isinstance(fill, (int, float))):
            raise ConfigurationError(f"fill takes a number or None, got {fill!r}")
        chosen = {"patch": self.patch, "stride": self.stride, "fill": fill, "returns": "drop"}
        super().__init__(method="occlusion", layer=None, target=target, method_options=chosen, **options)
        check_colormap(cmap)
        self.cmap = cmap
        check_share("alpha", alpha)
        self.alpha = alpha

    def maps(self, trace: Trace, site: HookPoint | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The drop of the score at each place of the patch, (N, rows, columns), and the classes (N,)."""
        aimed = trace.with_targets(self.targets(labels))
        return occlusion.attribute(aimed, None, **self.method_options), aimed.targets  # type: ignore[return-value]

    def draw(self, seen: Mapping[str, Tensor], probe: Probe) -> Iterator[Picture]:
        """One grid of map and image pairs."""
        drops, (height, width) = seen["maps"], probe.images.shape[-2:]
        boxes = patch_boxes((height, width), self.patch, self.stride)  # type: ignore[arg-type]
        finite = drops.flatten(1).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        worst = finite.argmax(1)
        pictures = enlarge(probe.to_display())
        factors = torch.tensor([pictures.shape[2] / width, pictures.shape[1] / height] * 2)
        marked = draw_boxes(pictures, list((boxes[worst] * factors)[:, None]), _MARK)
        heat = normalize_maps(spread(drops, boxes, (height, width)))
        tiles = side_by_side(overlay(pictures, heat, self.cmap, self.alpha), marked)
        said = [f"score drops by {float(each):.3g}" for each in finite.amax(1)]
        shown = captions(seen, probe, said)
        scale = ColorScale(self.cmap, "0", "max", "drop of the class score, each image by its own maximum")
        title = "the most damaging patch is marked"
        yield Picture(self.tag(self.method_name), tile_grid(tiles, shown, title=title, scale=scale))
