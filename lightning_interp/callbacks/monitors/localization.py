"""How well a model localises what it recognises: scores on the validation data, and boxes on the probe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import box_iou, masks_to_boxes
from typing_extensions import Unpack

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.base import Method, ProbeMonitor, ProbeMonitorOptions, check_share
from lightning_interp.callbacks.monitors._captions import captions
from lightning_interp.data.annotations import Annotations
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import cam, gradcam
from lightning_interp.localize import (
    EnergyPointingGame,
    GAPClassifier,
    MaxBoxAccuracy,
    PixelAveragePrecision,
    PointingGame,
    fit_threshold,
    maps_to_boxes,
)
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.targets import Targets, resolve_classes
from lightning_interp.model.trace import Trace
from lightning_interp.render import ColorScale, check_colormap, draw_boxes, enlarge, normalize_maps, overlay, tile_grid
from lightning_interp.sinks.records import Picture

__all__ = ["LocalizationMonitor", "Scores"]

_TRUE, _PREDICTED = (0, 230, 80), (255, 140, 0)  # "green" and "orange" in the title
_USUAL_THRESHOLD = 0.2
_CHUNK = 16  # images whose maps of all classes are made at once
_BASELINES = {
    "max_box_accuracy": ("whole_image", "centered_box"),
    "pointing_game": ("center",),
    "energy_pointing_game": ("uniform",),
    "pixel_average_precision": ("uniform",),
}


class LocalizationMonitor(ProbeMonitor):
    """Scores where the model looks against true boxes or masks, on the validation data, and draws the probe's boxes.

    Logged through ``pl_module.log`` at the end of each validation inside ``fit`` and of ``trainer.validate``, so that
    ``ModelCheckpoint(monitor="localization/max_box_accuracy", mode="max")`` and ``EarlyStopping`` work:
    ``localization/max_box_accuracy``, ``localization/pointing_game`` and ``localization/energy_pointing_game``, with
    masks also ``localization/pixel_average_precision``; behind each its trivial baselines
    (``localization/max_box_accuracy/whole_image``); and ``localization/threshold``, the best one for drawing boxes. Of
    masks alone, boxes are drawn around each image's mask. ``trainer.test`` logs ``localization-test/...``.

    A validation in a due epoch is scored, and the first one always; in the others the last numbers are logged again,
    and so they are after a failure of this monitor: NaN, if there were none yet (which ``EarlyStopping`` takes for a
    reason to stop, unless ``check_finite=False``). Of several validation loaders the first is scored. Under DDP the
    numbers are those of all ranks' images together; an image that ``DistributedSampler`` repeats to make the shards
    even counts once. Other distributed samplers may repeat images, which then count twice.

    Where the objects are is taken from the first of these that says it: the batch, or what ``unpack`` makes of it, if
    that is a mapping with ``"boxes"`` (N, 4), or a list of N (M, 4), or ``"masks"`` (N, H, W), bool or uint8, with
    ``"ignore"`` beside them for pixels that ``pixel_average_precision`` leaves out; the data set's attributes ``boxes``
    and ``masks`` with an entry for each item, where the loader goes through the items in order (without shuffling;
    under DDP with torch's DistributedSampler); the probe, which then is all that is scored. Boxes are x1, y1, x2, y2 in
    pixels of the images as the model gets them, after resizing and cropping, maxima exclusive. Images without an object
    are left out, but for ``pixel_average_precision``.

    Where the module holds a :class:`~lightning_interp.localize.GAPClassifier`, the maps are its own, of the very
    forward pass that the validation step makes; there is no second one. Otherwise, and where code is compiled or
    parameters are sharded, each batch is explained by a pass of its own, with a backward pass for Grad-CAM.

    The picture ``localization/boxes`` shows the probe's images with their maps, the true boxes and the predicted one.

    Args:
        method: None: the maps of the module's ``GAPClassifier`` where it has one, else Grad-CAM. ``"gradcam"``,
            ``"cam"``, an explainer of :mod:`lightning_interp.explain`, or a callable ``(model, images, targets) ->
            maps`` (N, H, W).
        layer: A dotted name or module; None: the tensor that enters the final pooling or flattening.
        target: Which class's map is scored: ``"label"`` (localisation with the true class known, as in the literature;
            the predicted one where there are no labels), ``"predicted"``, or a class number.
        threshold: Where the drawn boxes end, as a share of each map's maximum; None: the best one of the last
            validation, and before the first the best one for the probe.
        version: Of ``max_box_accuracy``: 1, the largest component at IoU 0.5, or 2, the best of all components, the
            mean over IoU 0.3, 0.5 and 0.7.
        normalization: How maps are brought to [0, 1] before thresholds: ``"relu_max"`` or ``"min_max"``.
        cmap: The name of a matplotlib colour map.
        alpha: How much of the heat covers the image, 0 to 1.
        method_options: What the method itself takes.
        **options: See :class:`ProbeMonitor`: ``probe``, ``predict``, ``unpack``; and :class:`Monitor`:
            ``every_n_epochs``, ``at_epochs``, ``every_n_train_steps``, ``at_start``, ``name``, ``on_error``.

    Raises:
        ConfigurationError: If an argument is out of range; before the first batch is trained, if there are no boxes or
            masks, if they lie outside their images, or if the layer does not exist.

    Example:
        >>> from lightning_interp import LocalizationMonitor
        >>> LocalizationMonitor(every_n_epochs=5, unpack=lambda batch: {"images": batch[0], "boxes": batch[2]})
        LocalizationMonitor

    Reference:
        Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, CVPR 2020; Zhang et al., Top-down
        Neural Attention by Excitation Backprop, ECCV 2016; Wang et al., Score-CAM, CVPR workshops 2020.
    """

    kind = "localization"
    scores_validation = True
    methods: ClassVar = {"cam": cam, "gradcam": gradcam}

    def __init__(
        self,
        *,
        method: Method | None = None,
        layer: str | nn.Module | None = None,
        target: str | int = "label",
        threshold: float | None = None,
        version: Literal[1, 2] = 1,
        normalization: Literal["relu_max", "min_max"] = "relu_max",
        cmap: str = "jet",
        alpha: float = 0.3,
        method_options: Mapping[str, Any] | None = None,
        **options: Unpack[ProbeMonitorOptions],
    ) -> None:
        super().__init__(
            method="gradcam" if method is None else method,
            layer=layer,
            target=target,
            method_options=method_options,
            **options,
        )
        check_colormap(cmap)
        check_share("alpha", alpha)
        if threshold is not None:
            check_share("threshold", threshold)
            if threshold == 1:
                raise ConfigurationError("threshold takes a number below 1: above its maximum a map has nothing")
        self.cmap = cmap
        self.alpha = alpha
        self.threshold = threshold
        self.version = version
        self.normalization = normalization
        self.scores: dict[str, float] = {}
        self._fitted = math.nan
        self._prefers_gap = method is None and layer is None
        self.begin_scores(torch.device("cpu"))  # refuses what is out of range

    @property
    def method_name(self) -> str:
        """The method as it stands in the picture."""
        return "class maps" if self._prefers_gap else super().method_name

    def state_dict(self) -> dict[str, Any]:
        """The last scores, which a resumed run logs until it scores again."""
        return {"scores": dict(self.scores)} if self.scores else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last scores of the run that is resumed."""
        self.remember(state_dict.get("scores", {}), lasting=True)

    def tags(self, module: LightningModule) -> list[str]:
        """All of its kind."""
        return [self.tag("*")]

    def targets(self, labels: Tensor | None) -> Targets:
        """What is explained; where there are no labels, the predicted classes."""
        return None if self.target == "label" and labels is None else super().targets(labels)

    def where(self, module: nn.Module) -> tuple[str | nn.Module | None, bool]:
        """The layer, and whether its gradient is needed; a GAPClassifier's features need none."""
        gap = self.gap(module)
        return super().where(module) if gap is None else (gap.features, False)

    def maps(self, trace: Trace, site: HookPoint | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The maps (N, H, W) of images that are looked at, and the classes (N,) that they explain."""
        gap = self.gap(trace.model)
        if gap is None or site is None:
            return super().maps(trace, site, labels)
        classes = trace.with_targets(self.targets(labels)).targets
        assert isinstance(classes, Tensor)
        height, width = trace.images.shape[-2:]
        with torch.no_grad():
            return self.heard_maps(gap, trace.activations(site), classes, (height, width), aimed=True)

    def alongside(self, count: int) -> dict[str, Tensor]:
        """The threshold, as it stands now."""
        known = self._fitted if self.threshold is None else self.threshold
        return {"threshold": torch.full((count,), known, dtype=torch.float64)}

    # ---- What the session asks for while a validation runs.

    def gap(self, module: nn.Module) -> GAPClassifier | None:
        """The classifier whose own maps are scored, where there is one."""
        found = (each for each in module.modules() if isinstance(each, GAPClassifier))
        return next(found, None) if self._prefers_gap else None

    def begin_scores(self, device: torch.device) -> Scores:
        """Empty scores for one pass through the data."""
        return Scores(self.version, self.normalization, device)

    def remember(self, found: Mapping[str, float], *, lasting: bool) -> None:
        """Keep what a validation found: in training for as long as it lasts, otherwise the threshold alone."""
        self._fitted = found.get("threshold", self._fitted)
        if lasting and found:
            self.scores = dict(found)

    def names(self, probe: Probe | None) -> list[str]:
        """What is logged where nothing was ever found."""
        unmasked = probe is not None and probe.masks is None and probe.boxes is not None
        metrics = [each for each in _BASELINES if not (unmasked and each == "pixel_average_precision")]
        return [
            "threshold",
            *(f"{each}{end}" for each in metrics for end in ("", *(f"/{b}" for b in _BASELINES[each]))),
        ]

    def counted_classes(self, classes: Tensor, labels: Tensor | None) -> Tensor | None:
        """The classes whose rates the pointing game averages: the true ones, where those are explained."""
        return classes if self.target == "label" and labels is not None else None

    def heard_maps(
        self,
        gap: GAPClassifier,
        features: Tensor,
        labels: Tensor | None,
        size: tuple[int, int],
        *,
        aimed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The maps (N, H, W) of a GAPClassifier's features, in float32, and the classes (N,) that they explain.

        Args:
            gap: The classifier.
            features: (N, C, h, w).
            labels: (N,), or None.
            size: H and W.
            aimed: Whether the labels are the classes to explain, whatever this monitor's target is.
        """
        weight = next((each for each in gap.head.parameters() if each.is_floating_point()), features)
        made = []
        for start in range(0, len(features), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            every: Tensor = gap.head.maps(features[chunk].to(weight.dtype)).float()  # type: ignore[operator]
            own = None if labels is None else labels[chunk]
            classes = own if aimed and own is not None else self._classes(gap, every, own)
            made.append((_of_classes(every, classes, size), classes))
        maps, explained = zip(*made, strict=True)
        return torch.cat(maps), torch.cat(explained)

    def _classes(self, gap: GAPClassifier, every: Tensor, labels: Tensor | None) -> Tensor:
        """The classes to explain; each logit is the mean of a map, and the bias."""
        bias, targets = gap.head.bias, self.targets(labels)
        assert not callable(targets)
        return resolve_classes(targets, every.mean((2, 3)) + (bias.float() if isinstance(bias, Tensor) else 0))

    # ---- The picture.

    def draw(self, seen: Mapping[str, Tensor], probe: Probe) -> Iterator[Picture]:
        """One grid of all images."""
        maps = seen["maps"]
        truth = _true_boxes(Annotations(probe.boxes, probe.masks))
        threshold, source = self._drawn_threshold(float(seen["threshold"][0]), maps, truth)
        found = maps_to_boxes(maps, threshold, normalization=self.normalization)
        heat = normalize_maps(maps, "relu" if self.normalization == "relu_max" else "min_max")
        tiles = enlarge(probe.to_display())
        factors = [tiles.shape[2] / maps.shape[2], tiles.shape[1] / maps.shape[1]]
        scale = torch.tensor(factors * 2, dtype=torch.float32)
        tiles = overlay(tiles, heat, self.cmap, self.alpha)
        if truth is not None:
            tiles = draw_boxes(tiles, [own * scale for own in truth], _TRUE, width=5)
        tiles = draw_boxes(tiles, list((found * scale)[:, None]), _PREDICTED, width=2)
        legend = "true box green, predicted box orange" if truth is not None else "predicted box orange"
        title = f"{legend}: above {threshold:.2g} of each map's maximum, {source}"
        bar = ColorScale(self.cmap, "0", "max", f"{self.method_name}, each image by its own maximum")
        said = None if truth is None else [_overlap(box, own) for box, own in zip(found, truth, strict=True)]
        yield Picture(self.tag("boxes"), tile_grid(tiles, captions(seen, probe, said), title=title, scale=bar))

    def _drawn_threshold(self, known: float, maps: Tensor, truth: Sequence[Tensor] | None) -> tuple[float, str]:
        """The threshold for the drawn boxes, and where it comes from."""
        if not math.isnan(known):
            return known, "as given" if self.threshold is not None else "fitted on the validation data"
        rows = [index for index, own in enumerate(truth or ()) if len(own)]
        if truth is None or not rows:
            return _USUAL_THRESHOLD, "the usual one"
        fitted = fit_threshold(maps[rows], [truth[index] for index in rows], normalization=self.normalization)
        return fitted, "fitted on these images"


class Scores:
    """The localisation metrics of one pass through the data.

    Args:
        version: Of the box accuracy.
        normalization: Of the maps.
        device: Where the ranks can talk.
    """

    def __init__(
        self, version: Literal[1, 2], normalization: Literal["relu_max", "min_max"], device: torch.device
    ) -> None:
        self._box = MaxBoxAccuracy(version, normalization=normalization).to(device)
        self._pixel = PixelAveragePrecision(normalization=normalization).to(device)
        self._pointing, self._energy = PointingGame().to(device), EnergyPointingGame().to(device)
        # A rank may see no image at all, and computes with the others nevertheless.
        nothing = torch.zeros(0, 1, 1, dtype=torch.float32)
        self._add_boxes(nothing, [], [], None)
        self._pixel.update(nothing, nothing > 0)

    def update(self, maps: Tensor, said: Annotations, new: Sequence[bool], classes: Tensor | None) -> None:
        """Add images.

        Args:
            maps: (N, H, W).
            said: Where their objects are.
            new: For each whether it counts.
            classes: (N,) whose rates the pointing game averages, or None.
        """
        boxes = _true_boxes(said)
        assert boxes is not None
        rows = [index for index, own in enumerate(boxes) if new[index] and len(own)]
        own = [boxes[index] for index in rows]
        if rows:
            truth = own if said.masks is None or said.boxes is not None else said.masks[rows]
            self._add_boxes(maps[rows], own, truth, None if classes is None else classes[rows])
        if said.masks is not None and any(new):
            counted = [index for index, each in enumerate(new) if each]
            ignore = None if said.ignore is None else said.ignore[counted]
            self._pixel.update(maps[counted], said.masks[counted], ignore)

    def try_out(self, probe: Probe) -> None:
        """Refuse boxes and masks that cannot be scored."""
        n, _, height, width = probe.images.shape
        self.update(
            torch.zeros(n, height, width, dtype=torch.float32), Annotations(probe.boxes, probe.masks), [True] * n, None
        )

    def found(self) -> dict[str, float]:
        """All scores and baselines that could be computed; every rank must ask."""
        values: dict[str, float] = {}
        for name, metric in zip(_BASELINES, (self._box, self._pointing, self._energy, self._pixel), strict=True):
            values[name] = float(metric.compute())
            values |= {f"{name}/{baseline}": float(value) for baseline, value in metric.baselines().items()}
        values["threshold"] = self._box.best_threshold() if not math.isnan(values["max_box_accuracy"]) else math.nan
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def _add_boxes(self, maps: Tensor, boxes: list[Tensor], truth: Any, classes: Tensor | None) -> None:
        self._box.update(maps, boxes)
        self._pointing.update(maps, truth, classes)
        self._energy.update(maps, truth)


def _true_boxes(said: Annotations) -> list[Tensor] | None:
    """Each image's boxes (M, 4), or the one around its mask; M = 0 where there is no object."""
    if said.boxes is not None:
        return list(said.boxes)
    if said.masks is None:
        return None
    # torchvision's maxima are the last pixels themselves.
    more = torch.tensor([0, 0, 1, 1])
    nothing = torch.zeros(0, 4, dtype=torch.float32)
    return [masks_to_boxes(each[None].cpu()).float() + more if bool(each.any()) else nothing for each in said.masks]


def _of_classes(every: Tensor, classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Of maps (N, K, h, w) each image's own, at the images' size; one map speaks for class 1 against class 0."""
    if every.shape[1] == 1:
        own = every * (2 * classes - 1)[:, None, None, None]
    else:
        own = every[torch.arange(len(every), device=every.device), classes][:, None]
    return interpolate(own, size, mode="bilinear", align_corners=False)[:, 0]


def _overlap(box: Tensor, own: Tensor) -> str:
    """What is said of a predicted box."""
    if len(own) == 0:
        return "no object"
    return f"IoU {float(box_iou(box[None].float(), own.float()).max()):.2f}" if bool(box.any()) else "IoU 0: no box"
