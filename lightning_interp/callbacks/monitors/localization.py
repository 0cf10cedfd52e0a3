"""How well a model localises what it recognises: scores on the validation data, and boxes on the probe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.ops import box_iou, masks_to_boxes
from typing_extensions import Unpack

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.contract import ProbeMonitor, ProbeMonitorOptions, StreamMonitor
from lightning_interp.callbacks.inputs import Needs, StreamBatch
from lightning_interp.callbacks.monitors._captions import captions
from lightning_interp.callbacks.monitors._map_method import MapMethod, Method
from lightning_interp.checks import check_fraction
from lightning_interp.data.annotations import Annotations
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import cam, gradcam, normalize_maps, resize_maps
from lightning_interp.localize import (
    EnergyPointingGame,
    GAPClassifier,
    MaxBoxAccuracy,
    PixelAveragePrecision,
    PointingGame,
    fit_threshold,
    maps_to_boxes,
)
from lightning_interp.model.targets import Targets, resolve_classes
from lightning_interp.model.trace import LayerSpec, Trace
from lightning_interp.render import ColorScale, check_colormap, draw_boxes, enlarge, overlay, tile_grid
from lightning_interp.sinks.records import Picture

__all__ = ["LocalizationMonitor"]

_TRUE, _PREDICTED = (0, 230, 80), (255, 140, 0)  # "green" and "orange" in the title
_USUAL_THRESHOLD = 0.2
_ROWS = 16  # images whose maps of all classes are made at once
_BASELINES = {
    "max_box_accuracy": ("whole_image", "centered_box"),
    "pointing_game": ("center",),
    "energy_pointing_game": ("uniform",),
    "pixel_average_precision": ("uniform",),
}


class LocalizationMonitor(ProbeMonitor, StreamMonitor):
    """Score where the model looks against true boxes or masks, on the validation data, and draw the probe's boxes.

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

    The objects are taken from the first of these that names them: the batch, or what ``unpack`` makes of it, if
    that is a mapping with ``"boxes"`` (N, 4), or a list of N (M, 4), or ``"masks"`` (N, H, W), bool or uint8, with
    ``"ignore"`` beside them for pixels that ``pixel_average_precision`` leaves out; the data set's attributes ``boxes``
    and ``masks`` with an entry for each item, where the loader goes through the items in order (without shuffling;
    under DDP with torch's DistributedSampler); the probe, which then is all that is scored. Boxes are x1, y1, x2, y2 in
    pixels of the images as the model gets them, after resizing and cropping, maxima exclusive. Images without an object
    are left out, but for ``pixel_average_precision``.

    Where the module holds a :class:`~lightning_interp.localize.GAPClassifier`, the maps are its own, of the
    forward pass that the validation step runs anyway. Otherwise, and where code is compiled or
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
    uses_annotations = True
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
        super().__init__(**options)
        chosen = "gradcam" if method is None else method
        self.map_method = MapMethod(type(self).__name__, self.methods, chosen, layer, target, method_options)
        check_colormap(cmap)
        self.cmap = cmap
        self.alpha = check_fraction("alpha", alpha)
        if threshold is not None and check_fraction("threshold", threshold) == 1:
            raise ConfigurationError("threshold takes a number below 1: above its maximum a map has nothing")
        self.threshold = threshold
        self.version = version
        self.normalization = normalization
        self._fitted = math.nan
        self._prefers_gap = method is None and layer is None
        self._metrics(torch.device("cpu"))  # refuses what is out of range

    def check(self, module: LightningModule) -> None:
        """Raise where the layer does not exist."""
        self.map_method.check(module)

    def check_probe(self, probe: Probe) -> None:
        """Raise where its boxes and masks cannot be scored."""
        if probe.boxes is not None or probe.masks is not None:
            n, _, height, width = probe.images.shape
            maps = torch.zeros(n, height, width, dtype=torch.float32)
            self._update(self._metrics(torch.device("cpu")), maps, Annotations(probe.boxes, probe.masks), [True] * n)

    def describe(self) -> str:
        """How to read the boxes and the scores."""
        return (
            "Boxes drawn from the maps (orange) beside the true ones (green), and how well maps find the objects, over "
            "the validation data: the share of right boxes at the best threshold, of peaks on the object, of heat on "
            "the object. Read each score against its baseline, `whole_image`, `centered_box`, `center` or `uniform`: "
            "where objects are large and central, a model that ignores the image scores high."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the last scores, and the threshold, of the run that is resumed."""
        super().load_state_dict(state_dict)
        self._fitted = self.last_scalars.get("threshold", self._fitted)

    # ---- The maps.

    def needs(self, module: nn.Module) -> Needs:
        """What the method needs; a GAPClassifier's maps need its features."""
        gap = self._gap(module)
        return self.map_method.needs() if gap is None else Needs({gap.features: False}, guard_parameters=False)

    def outputs(self, trace: Trace, labels: Tensor | None) -> dict[str, Tensor]:
        """The maps, the classes that they explain, the logits, and the threshold as it stands now."""
        gap, targets = self._gap(trace.model), self._targets(labels)
        if gap is None:
            maps, classes = self.map_method.maps(trace, targets)
        else:
            classes = trace.with_targets(targets).targets  # type: ignore[assignment]
            size = (trace.images.shape[2], trace.images.shape[3])
            with torch.no_grad():
                maps, _ = self.maps_from_features(gap, trace.activations(trace.layer(gap.features)), classes, size)
        threshold = self._fitted if self.threshold is None else self.threshold
        return {
            "maps": maps,
            "explained": classes,
            "logits": trace.logits.detach().float(),
            "threshold": torch.full((len(maps),), threshold, dtype=torch.float64),
        }

    def maps_from_features(
        self, gap: GAPClassifier, features: Tensor, targets: Targets, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return the maps (N, H, W) of a GAPClassifier's features, in float32, and the classes (N,) that they explain.

        Args:
            gap: The classifier.
            features: (N, C, h, w).
            targets: int64 (N,) classes, one class, or None for the predicted ones.
            size: H and W.
        """
        weight = next((values for values in gap.head.parameters() if values.is_floating_point()), features)
        bias = gap.head.bias.float() if isinstance(gap.head.bias, Tensor) else 0
        maps, classes = [], []
        for start in range(0, len(features), _ROWS):
            rows = slice(start, start + _ROWS)
            of_all_classes: Tensor = gap.head.maps(features[rows].to(weight.dtype)).float()  # type: ignore[operator]
            chosen = targets[rows] if isinstance(targets, Tensor) else targets
            # Each logit is the mean of a map, and the bias.
            explained = resolve_classes(chosen, of_all_classes.mean((2, 3)) + bias)  # type: ignore[arg-type]
            maps.append(_select(of_all_classes, explained, size))
            classes.append(explained)
        return torch.cat(maps), torch.cat(classes)

    def _gap(self, module: nn.Module) -> GAPClassifier | None:
        """The classifier whose own maps are scored, where there is one."""
        classifiers = (child for child in module.modules() if isinstance(child, GAPClassifier))
        return next(classifiers, None) if self._prefers_gap else None

    def _targets(self, labels: Tensor | None) -> Targets:
        """What is explained; the predicted classes where there are no labels."""
        return None if self.map_method.target == "label" and labels is None else self.map_method.targets(labels)

    # ---- The scores.

    def layers(self, module: nn.Module) -> list[LayerSpec]:
        """The features of a GAPClassifier, which the validation step computes anyway."""
        gap = self._gap(module)
        return [] if gap is None else [gap.features]

    def begin(self, module: nn.Module, device: torch.device) -> MetricCollection:
        """Return empty metrics."""
        return self._metrics(device)

    def update(self, state: MetricCollection, batch: StreamBatch) -> None:
        """Score a batch."""
        assert batch.annotations is not None
        gap, labels = self._gap(batch.module), batch.labels
        if gap is None:
            outputs = batch.outputs()
            maps, classes = outputs["maps"], outputs["explained"]
        else:
            features, size = batch.activations(gap.features), (batch.images.shape[2], batch.images.shape[3])
            labels = None if labels is None else labels.to(features.device)
            maps, classes = self.maps_from_features(gap, features, self._targets(labels), size)
        rated = classes if self.map_method.target == "label" and labels is not None else None
        self._update(state, maps, batch.annotations, batch.counts, rated)

    def compute(self, state: MetricCollection) -> dict[str, float] | None:
        """Return all scores and baselines that can be computed, or None."""
        values: dict[str, float] = {}
        for name in _BASELINES:
            metric: Any = state[name]
            values[name] = float(metric.compute())
            values |= {f"{name}/{baseline}": float(value) for baseline, value in metric.baselines().items()}
        box: Any = state["max_box_accuracy"]
        values["threshold"] = box.best_threshold() if not math.isnan(values["max_box_accuracy"]) else math.nan
        scores = {name: value for name, value in values.items() if not math.isnan(value)}
        self._fitted = scores.get("threshold", self._fitted)
        return scores or None

    def scalar_names(self, probe: Probe | None) -> list[str]:
        """Return the names of all scores and baselines; those of pixels only where there may be masks."""
        no_masks = probe is not None and probe.masks is None and probe.boxes is not None
        metrics = [name for name in _BASELINES if not (no_masks and name == "pixel_average_precision")]
        return [
            "threshold",
            *(f"{name}{end}" for name in metrics for end in ("", *(f"/{baseline}" for baseline in _BASELINES[name]))),
        ]

    def scalars(self, result: dict[str, float]) -> dict[str, float]:
        """Return the scores."""
        return result

    def _metrics(self, device: torch.device) -> MetricCollection:
        metrics = MetricCollection(
            {
                "max_box_accuracy": MaxBoxAccuracy(self.version, normalization=self.normalization),
                "pointing_game": PointingGame(),
                "energy_pointing_game": EnergyPointingGame(),
                "pixel_average_precision": PixelAveragePrecision(normalization=self.normalization),
            },
            compute_groups=False,
        ).to(device)
        # A rank may see no image at all, and computes with the others nevertheless.
        empty = torch.zeros(0, 1, 1, dtype=torch.float32)
        _update_boxes(metrics, empty, [], [], None)
        metrics["pixel_average_precision"].update(empty, empty > 0)
        return metrics

    def _update(
        self,
        metrics: MetricCollection,
        maps: Tensor,
        annotations: Annotations,
        counts: Sequence[bool],
        classes: Tensor | None = None,
    ) -> None:
        """Add the images that count: maps (N, H, W), and the classes (N,) whose rates the pointing game averages."""
        boxes = _true_boxes(annotations)
        assert boxes is not None
        rows = [index for index, image_boxes in enumerate(boxes) if counts[index] and len(image_boxes)]
        if rows:
            image_boxes = [boxes[index] for index in rows]
            has_boxes = annotations.masks is None or annotations.boxes is not None
            objects = image_boxes if has_boxes else annotations.masks[rows]  # type: ignore[index]
            _update_boxes(metrics, maps[rows], image_boxes, objects, None if classes is None else classes[rows])
        if annotations.masks is not None and any(counts):
            counted = [index for index, is_counted in enumerate(counts) if is_counted]
            ignore = None if annotations.ignore is None else annotations.ignore[counted]
            metrics["pixel_average_precision"].update(maps[counted], annotations.masks[counted], ignore)

    # ---- The picture.

    def draw(self, outputs: Mapping[str, Tensor], probe: Probe) -> Iterator[Picture]:
        """One grid of all images."""
        maps = outputs["maps"]
        true_boxes = _true_boxes(Annotations(probe.boxes, probe.masks))
        threshold, source = self._drawn_threshold(float(outputs["threshold"][0]), maps, true_boxes)
        boxes = maps_to_boxes(maps, threshold, normalization=self.normalization)
        heat = normalize_maps(maps, "relu" if self.normalization == "relu_max" else "min_max")
        tiles = enlarge(probe.to_display())
        factors = [tiles.shape[2] / maps.shape[2], tiles.shape[1] / maps.shape[1]]
        scale = torch.tensor(factors * 2, dtype=torch.float32)
        tiles = overlay(tiles, heat, self.cmap, self.alpha)
        if true_boxes is not None:
            tiles = draw_boxes(tiles, [image_boxes * scale for image_boxes in true_boxes], _TRUE, width=5)
        tiles = draw_boxes(tiles, list((boxes * scale)[:, None]), _PREDICTED, width=2)
        legend = "true box green, predicted box orange" if true_boxes is not None else "predicted box orange"
        title = f"{legend}: above {threshold:.2g} of each map's maximum, {source}"
        name = "class maps" if self._prefers_gap else self.map_method.name
        bar = ColorScale(self.cmap, "0", "max", f"{name}, each image by its own maximum")
        below = None if true_boxes is None else [_overlap(*pair) for pair in zip(boxes, true_boxes, strict=True)]
        yield Picture(self.tag("boxes"), tile_grid(tiles, captions(outputs, probe, below), title=title, scale=bar))

    def _drawn_threshold(self, known: float, maps: Tensor, boxes: Sequence[Tensor] | None) -> tuple[float, str]:
        """The threshold of the drawn boxes, and where it comes from."""
        if not math.isnan(known):
            return known, "as given" if self.threshold is not None else "fitted on the validation data"
        rows = [index for index, image_boxes in enumerate(boxes or ()) if len(image_boxes)]
        if boxes is None or not rows:
            return _USUAL_THRESHOLD, "the usual one"
        fitted = fit_threshold(maps[rows], [boxes[index] for index in rows], normalization=self.normalization)
        return fitted, "fitted on these images"


def _update_boxes(
    metrics: MetricCollection, maps: Tensor, boxes: list[Tensor], objects: Any, classes: Tensor | None
) -> None:
    metrics["max_box_accuracy"].update(maps, boxes)
    metrics["pointing_game"].update(maps, objects, classes)
    metrics["energy_pointing_game"].update(maps, objects)


def _true_boxes(annotations: Annotations) -> list[Tensor] | None:
    """Each image's boxes (M, 4), or the one around its mask; M = 0 where there is no object."""
    if annotations.boxes is not None:
        return list(annotations.boxes)
    if annotations.masks is None:
        return None
    # torchvision's maxima are the last pixels themselves.
    to_exclusive = torch.tensor([0, 0, 1, 1])
    empty = torch.zeros(0, 4, dtype=torch.float32)
    return [
        masks_to_boxes(mask[None].cpu()).float() + to_exclusive if bool(mask.any()) else empty
        for mask in annotations.masks
    ]


def _select(maps: Tensor, classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Of maps (N, K, h, w) each image's class, at the images' size; one map speaks for class 1 against class 0."""
    if maps.shape[1] == 1:
        selected = maps[:, 0] * (2 * classes - 1)[:, None, None]
    else:
        selected = maps[torch.arange(len(maps), device=maps.device), classes]
    return resize_maps(selected, size)


def _overlap(box: Tensor, true_boxes: Tensor) -> str:
    """The caption of a predicted box."""
    if len(true_boxes) == 0:
        return "no object"
    if not bool(box.any()):
        return "IoU 0: no box"
    return f"IoU {float(box_iou(box[None].float(), true_boxes.float()).max()):.2f}"
