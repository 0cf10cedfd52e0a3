"""The localisation metrics: closed forms, the published sweep, exactness over batches and ranks, invalid input."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_average_precision

from lightning_interp import ConfigurationError
from lightning_interp.explain.maps import resize_maps
from lightning_interp.localize import (
    EnergyPointingGame,
    MaxBoxAccuracy,
    PixelAveragePrecision,
    PointingGame,
    energy_pointing_game,
    fit_threshold,
    maps_to_boxes,
    maps_to_masks,
    max_box_accuracy,
    pixel_average_precision,
    pointing_game,
)
from lightning_interp.localize.thresholds import threshold_grid
from tests.helpers.box_sweep import all_contour_boxes, coarse_maps, components_at, contour_boxes, iou, smooth_maps

DATA = Path(__file__).parents[3] / "shared" / "data"
HAS_DATA = (DATA / "oxford-iiit-pet" / "annotations" / "boxes.csv").exists()


def some_boxes(maps: Tensor, seed: int = 0) -> Tensor:
    """The maps' boxes at different thresholds, moved: for a box accuracy between 0 and 1."""
    (n, height, width), generator = maps.shape, torch.Generator().manual_seed(seed)
    boxes = torch.cat([maps_to_boxes(image_map[None], 0.1 + 0.6 * i / n) for i, image_map in enumerate(maps)])
    low, high = (boxes + width / 14 * torch.randn(n, 4, generator=generator)).split(2, 1)
    low = torch.minimum(low.clamp(min=0), torch.tensor([width, height]) - 4.0)
    return torch.cat([low, torch.minimum(torch.maximum(high, low + 4), torch.tensor([width, height]))], 1)


def some(n: int = 9, size: int = 32) -> dict[str, Any]:
    masks = smooth_maps(n, size, 4.0, seed=7) > 0.6
    maps = coarse_maps(n, size, 6)
    return {"maps": maps, "boxes": some_boxes(maps, 3), "masks": masks, "ignore": masks.roll(3, 2)}


CASES: dict[str, tuple[Callable[[], Metric], tuple[str, ...]]] = {
    "max_box_accuracy_v1": (lambda: MaxBoxAccuracy(n_thresholds=50), ("maps", "boxes")),
    "max_box_accuracy_v2": (lambda: MaxBoxAccuracy(2, n_thresholds=50), ("maps", "boxes")),
    "pixel_average_precision": (PixelAveragePrecision, ("maps", "masks", "ignore")),
    "pointing_game": (PointingGame, ("maps", "boxes")),
    "pointing_game_masks": (PointingGame, ("maps", "masks")),
    "pointing_game_classes": (PointingGame, ("maps", "boxes", "classes")),
    "energy_pointing_game": (EnergyPointingGame, ("maps", "boxes")),
    "energy_pointing_game_masks": (EnergyPointingGame, ("maps", "masks")),
}


def arguments(names: tuple[str, ...]) -> list[Tensor]:
    values = {**some(), "classes": torch.tensor([0, 0, 0, 0, 0, 1, 1, 7, 7])}
    return [values[name] for name in names]


def scores(metric: Metric) -> dict[str, float]:
    values = {"score": metric.compute(), **metric.baselines()}
    if isinstance(metric, MaxBoxAccuracy):
        values["threshold"] = torch.tensor(metric.best_threshold())
    return {name: float(value) for name, value in values.items()}


# Over batches and ranks


@pytest.mark.parametrize("name", CASES)
def test_batches_do_not_matter(name: str) -> None:
    make, names = CASES[name]
    whole, parts = make(), make()
    given = arguments(names)
    whole.update(*given)
    for share in (slice(5, 9), slice(0, 1), slice(1, 5)):
        parts.update(*(tensor[share] for tensor in given))
    assert scores(parts) == scores(whole)
    assert 0 < scores(whole)["score"] < 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", [3, 9], ids=["uneven", "a rank without images"])
def test_ranks_do_not_matter(name: str, split: int) -> None:
    make, names = CASES[name]
    given = arguments(names)
    whole, ranks = make(), [make(), make()]
    whole.update(*given)
    for rank, share in zip(ranks, (slice(0, split), slice(split, 9)), strict=True):
        if split < 9 or rank is ranks[0]:
            rank.update(*(tensor[share] for tensor in given))
    states = [dict(rank._defaults) | {key: getattr(rank, key) for key in rank._defaults} for rank in ranks]

    def gather(sent: Tensor, group: Any = None) -> list[Tensor]:
        # What the other rank sends: its state, or torchmetrics' empty float32 where it saw no image.
        (key,) = [key for key in states[1] if same(getattr(ranks[0], key), sent)]
        other = states[1][key]
        if isinstance(other, list):
            other = torch.cat(other) if other else torch.tensor([], dtype=ranks[1].dtype)
        assert other.dtype == sent.dtype
        assert other.ndim == sent.ndim
        return [sent, other]

    ranks[0].distributed_available_fn = lambda: True
    ranks[0].dist_sync_fn = gather
    assert scores(ranks[0]) == scores(whole)


def same(state: Any, sent: Tensor) -> bool:
    state = torch.cat(state) if isinstance(state, list) else state
    return state.shape == sent.shape and torch.equal(state, sent)


@pytest.mark.parametrize("name", CASES)
def test_reset_forgets_and_forward_scores_the_batch(name: str) -> None:
    make, names = CASES[name]
    metric, fresh = make(), make()
    given = arguments(names)
    metric.update(*given)
    metric.reset()
    part = [tensor[:4] for tensor in given]
    fresh.update(*part)
    assert float(metric(*part)) == scores(fresh)["score"]
    assert scores(metric) == scores(fresh)


@pytest.mark.parametrize("name", CASES)
def test_nothing_scores_nan(name: str) -> None:
    metric = CASES[name][0]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method", UserWarning)  # of torchmetrics
        assert math.isnan(metric.compute())
    assert all(math.isnan(value) for value in metric.baselines().values())


def test_the_functions_say_what_the_metrics_say() -> None:
    values = some()
    maps, boxes, masks, ignore = (values[name] for name in ("maps", "boxes", "masks", "ignore"))
    classes = torch.tensor([0, 0, 0, 0, 0, 1, 1, 7, 7])
    pairs = [
        (MaxBoxAccuracy(), (boxes,), max_box_accuracy(maps, boxes)),
        (MaxBoxAccuracy(2), (boxes,), max_box_accuracy(maps, boxes, version=2)),
        (PixelAveragePrecision(), (masks, ignore), pixel_average_precision(maps, masks, ignore)),
        (PointingGame(), (boxes, classes), pointing_game(maps, boxes, classes)),
        (PointingGame(3), (masks,), pointing_game(maps, masks, tolerance=3)),
        (EnergyPointingGame(), (boxes,), energy_pointing_game(maps, boxes)),
    ]
    for metric, targets, expected in pairs:
        metric.update(maps, *targets)
        assert torch.equal(metric.compute(), expected)


# Box accuracy


def slow_accuracy(maps: Tensor, boxes: Tensor, version: int, n: int) -> float:
    best = []
    for smallest in {1: [0.5], 2: [0.3, 0.5, 0.7]}[version]:
        hits = np.zeros(n)
        for index, threshold in enumerate(threshold_grid(n)):
            if version == 1:
                candidates_per_map = [[box] for box in maps_to_boxes(maps, float(threshold)).tolist()]
            else:
                masks = maps_to_masks(maps, float(threshold)).numpy()
                candidates_per_map = [[box for box, _, _ in components_at(mask)] for mask in masks]
            for candidates, target in zip(candidates_per_map, boxes.tolist(), strict=True):
                hits[index] += any(iou(box, target) >= smallest for box in candidates)
        best.append(hits.max() / len(maps))
    return float(np.mean(best))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["coarse", "noise"])
def test_box_accuracy_is_that_of_each_threshold_by_itself(version: int, kind: str) -> None:
    maps = coarse_maps(8, 24, 6, seed=2) if kind == "coarse" else smooth_maps(8, 24, 1.0)
    boxes = some_boxes(maps)
    slow = slow_accuracy(maps, boxes, version, 25)
    assert max_box_accuracy(maps, boxes, version=version, n_thresholds=25).item() == pytest.approx(slow)
    assert 0 < slow < 1


def test_an_overlap_of_just_a_half_is_enough() -> None:
    maps = torch.zeros(1, 8, 8)
    maps[0, 0:2, 0:2] = 1.0
    assert max_box_accuracy(maps, torch.tensor([[0, 0, 4, 2]])) == 1
    assert max_box_accuracy(maps, torch.tensor([[0.0, 0.0, 4.01, 2.0]])) == 0


def test_version_2_takes_the_best_component_and_averages_over_overlaps() -> None:
    maps = torch.zeros(1, 16, 16)
    maps[0, 0:8, 0:8] = 1.0
    maps[0, 10:14, 10:14] = 1.0
    small = torch.tensor([[10, 10, 14, 16]])  # IoU 16 / 24 with the smaller component
    assert max_box_accuracy(maps, small) == 0
    assert max_box_accuracy(maps, small, version=2).item() == pytest.approx(2 / 3)


def test_the_threshold_is_one_for_the_set() -> None:
    axis = torch.arange(32.0)
    bump = torch.exp(-((axis - 15.5) ** 2) / 50)
    maps = (bump[:, None] * bump).expand(2, 32, 32)
    wide, narrow = maps_to_boxes(maps[:1], 0.02)[0], maps_to_boxes(maps[:1], 0.8)[0]
    metric = MaxBoxAccuracy()
    metric.update(maps, torch.stack([wide, narrow]))
    assert metric.compute() == 0.5  # each could be found, but not both at once
    alone = MaxBoxAccuracy()
    alone.update(maps, torch.stack([narrow, narrow]))
    assert alone.compute() == 1
    assert alone.best_threshold() == fit_threshold(maps, torch.stack([narrow, narrow]))
    assert iou(maps_to_boxes(maps, alone.best_threshold())[0], narrow) >= 0.5


def test_the_box_baselines_in_closed_form() -> None:
    # Centred squares of side 10 and 16 in images of 20: IoU with the whole image 0.25 and 0.64.
    boxes = torch.tensor([[5, 5, 15, 15], [2, 2, 18, 18], [0, 0, 4, 4]])
    metric = MaxBoxAccuracy()
    metric.update(torch.zeros(3, 20, 20), boxes)
    assert metric.compute() == 0
    # A centred square of side 12 matches both: 100 / 144 and 144 / 256.
    expected = {"whole_image": 1 / 3, "centered_box": 2 / 3}
    assert {name: float(value) for name, value in metric.baselines().items()} == pytest.approx(expected)


def test_a_map_with_nothing_to_show_is_a_miss() -> None:
    maps = torch.stack([torch.zeros(8, 8), torch.full((8, 8), torch.nan), torch.ones(8, 8)])
    boxes = torch.tensor([[0, 0, 8, 8]] * 3)
    assert max_box_accuracy(maps, boxes).item() == pytest.approx(1 / 3)
    assert max_box_accuracy(maps, boxes, version=2).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ["coarse", "smooth"])
def test_box_accuracy_is_within_half_a_point_of_the_contour_sweep(kind: str) -> None:
    pytest.importorskip("cv2")
    maps = coarse_maps(200, 64) if kind == "coarse" else smooth_maps(200, 64, 7.0)
    boxes = some_boxes(maps)
    reference = swept(maps, boxes)
    assert 0.2 < reference < 0.98
    accuracy = max_box_accuracy(maps, boxes, n_thresholds=200).item()
    assert accuracy == pytest.approx(reference, abs=0.0051)  # one of the 200 images


def swept(maps: Tensor, boxes: Tensor, n_thresholds: int = 200) -> float:
    from torchvision.ops import box_iou

    hits = torch.zeros(n_thresholds)
    for image_map, target in zip(maps.numpy(), boxes, strict=True):
        found_boxes = torch.from_numpy(contour_boxes(image_map, n_thresholds)).double()
        hits += box_iou(found_boxes, target[None].double())[:, 0] >= 0.5
    return float(hits.max() / len(maps))


def test_version_2_is_that_of_the_contour_sweep() -> None:
    pytest.importorskip("cv2")
    maps = (coarse_maps(12, 48, 8) * 255).floor() / 255  # contours are drawn of 8 bit images
    boxes = some_boxes(maps)
    best = []
    for smallest in (0.3, 0.5, 0.7):
        hits = np.zeros(255)
        for image_map, target in zip(maps.numpy(), boxes.tolist(), strict=True):
            sweep = all_contour_boxes(image_map, 255)
            hits += [any(iou(box, target) >= smallest for box in found_boxes) for found_boxes in sweep]
        best.append(hits.max() / 12)
    assert max_box_accuracy(maps, boxes, version=2, n_thresholds=255).item() == pytest.approx(np.mean(best), abs=0.005)
    assert best[0] > best[2]


# Pixels


def test_pixel_average_precision_by_hand() -> None:
    maps = torch.tensor([[[1.0, 0.8], [0.6, 0.2]], [[2.0, 0.8], [0.4, 0.0]]])  # of the second 1, 0.4, 0.2, 0
    masks = torch.tensor([[[True, False], [True, False]], [[True, True], [False, False]]])
    # From the top: 1 (2 of 2), 0.8 (2 of 3), 0.6 (3 of 4), 0.4 (4 of 5).
    expected = 1 * 0.5 + 3 / 4 * 0.25 + 4 / 5 * 0.25
    assert pixel_average_precision(maps, masks).item() == pytest.approx(expected)


def test_pixel_average_precision_is_that_of_all_scores_where_they_lie_on_the_steps() -> None:
    maps, masks = smooth_maps(4, 24, 2.0), smooth_maps(4, 24, 2.0, seed=1) + smooth_maps(4, 24, 2.0) > 1
    maps = (maps * 100).round() / 100
    expected = binary_average_precision(maps.flatten(), masks.flatten().int()).item()
    assert pixel_average_precision(maps, masks, n_thresholds=1000).item() == pytest.approx(expected, abs=1e-6)


def test_ignored_pixels_are_left_out() -> None:
    maps, masks = torch.tensor([[[1.0, 0.8, 0.6, 0.2]]]), torch.tensor([[[True, False, True, False]]])
    ignore = torch.tensor([[[False, True, False, False]]])
    assert pixel_average_precision(maps, masks) < 1
    assert pixel_average_precision(maps, masks, ignore) == 1
    metric = PixelAveragePrecision()
    metric.update(maps, masks, ignore)
    assert metric.baselines()["uniform"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_uniform_map_scores_the_objects_share(value: float) -> None:
    metric = PixelAveragePrecision()
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4] = True
    metric.update(torch.full((2, 8, 8), value), masks)
    assert metric.compute() == metric.baselines()["uniform"] == 0.25


def test_background_alone_is_an_image_too_but_not_a_set() -> None:
    maps, masks = torch.rand(2, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool)
    assert math.isnan(pixel_average_precision(maps, masks))
    masks[0, 2:4] = True
    with_background = pixel_average_precision(maps, masks)
    assert 0 < with_background < pixel_average_precision(maps[:1], masks[:1])


# Pointing


@pytest.mark.parametrize(
    ("x", "hit"), [(10, True), (19, True), (20, True), (22, True), (23, False), (7, True), (6, False)]
)
def test_the_point_may_lie_as_far_off_as_the_tolerance(x: int, hit: bool) -> None:
    maps = torch.zeros(1, 40, 40)
    maps[0, 12, x] = 1.0
    box = torch.tensor([[10, 10, 20, 20]])  # its pixels are 10 to 19
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 10:20, 10:20] = True
    for target in (box, mask):
        assert pointing_game(maps, target, tolerance=3) == hit


def test_the_usual_tolerance_is_15_pixels_at_224() -> None:
    maps = torch.zeros(2, 224, 300)
    maps[0, 100, 34] = maps[1, 100, 35] = 1.0
    boxes = torch.tensor([[10, 90, 20, 110]] * 2)
    assert pointing_game(maps, boxes) == 0.5
    assert pointing_game(maps, boxes, tolerance=15) == 0.5
    # Across a corner the distance counts: 11 and 11 are more than 15.
    maps = torch.zeros(1, 224, 224)
    maps[0, 120, 30] = 1.0
    assert pointing_game(maps, torch.tensor([[10, 90, 20, 110]])) == 0


def test_classes_are_averaged_as_in_the_paper() -> None:
    maps = torch.zeros(4, 16, 16)
    maps[:, 2, 2] = 1.0
    boxes = torch.tensor([[0, 0, 6, 6]] * 3 + [[10, 10, 16, 16]])
    assert pointing_game(maps, boxes, tolerance=0) == 0.75
    assert pointing_game(maps, boxes, torch.tensor([3, 3, 3, 8]), tolerance=0) == 0.5


def test_any_of_several_objects_may_be_pointed_at() -> None:
    maps = torch.zeros(2, 16, 16)
    maps[:, 2, 2] = 1.0
    near, far = torch.tensor([[1, 1, 4, 4]]), torch.tensor([[10, 10, 16, 16]])
    assert pointing_game(maps, [torch.cat([far, near]), far], tolerance=0) == 0.5


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_map_without_a_positive_value_points_at_nothing(value: float) -> None:
    maps, boxes = torch.full((1, 8, 8), value), torch.tensor([[0, 0, 8, 8]])
    assert pointing_game(maps, boxes) == 0
    assert energy_pointing_game(maps, boxes) == 0


def test_the_centre_as_baseline() -> None:
    metric = PointingGame(0)
    metric.update(torch.rand(2, 8, 8), torch.tensor([[3, 3, 6, 6], [0, 0, 3, 3]]))
    assert metric.baselines()["center"] == 0.5


# Energy


def test_energy_by_hand() -> None:
    maps = torch.tensor([[[1.0, 3.0], [-9.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]])
    boxes = [torch.tensor([[0, 0, 2, 1], [0, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1]])]
    assert energy_pointing_game(maps, boxes).item() == pytest.approx((4 / 8 + 0) / 2)
    masks = torch.tensor([[[True, True], [True, False]], [[False, False], [False, True]]])
    assert energy_pointing_game(maps, masks).item() == pytest.approx((4 / 8 + 1) / 2)


def test_a_uniform_map_has_the_energy_of_the_area() -> None:
    metric = EnergyPointingGame()
    metric.update(torch.full((2, 10, 10), 1e30), torch.tensor([[0, 0, 5, 10], [2, 2, 3, 3]]))
    assert metric.compute().item() == pytest.approx((0.5 + 0.01) / 2)
    assert metric.compute() == metric.baselines()["uniform"]


# Bad input

BOX_METRICS = [MaxBoxAccuracy, PointingGame, EnergyPointingGame]


@pytest.mark.parametrize("metric", BOX_METRICS)
@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.tensor([[0, 0, 4, 4], [1, 2, 11, 5]]), r"box \(1, 2, 11, 5\) of image 1.*10 x 8 pixels"),
        (torch.tensor([[-2, 0, 4, 4], [1, 2, 3, 5]]), r"box \(-2, 0, 4, 4\) of image 0.*scale them"),
        (torch.tensor([[0.0, 0.0, float("nan"), 4.0], [1, 2, 3, 5]]), "of image 0"),
        (torch.tensor([[0, 0, 4, 4], [5, 2, 5, 5]]), r"box \(5, 2, 5, 5\) of image 1 is empty.*x1 < x2"),
        (torch.tensor([[0, 0, 4, 4]]), r"a tensor \(2, 4\).*got int64 \(1, 4\)"),
        ([torch.tensor([[0, 0, 4, 4]])], r"a list of 2 tensors \(M, 4\); got list \(int64 \(1, 4\)\)"),
        ([torch.tensor([[0, 0, 4, 4]]), torch.zeros(0, 4)], "image 1 has no box"),
        ([torch.tensor([[0, 0, 4, 4]]), torch.zeros(5)], r"\(M, 4\); got float32 \(5,\) for image 1"),
        ([[0, 0, 4, 4], [0, 0, 4, 4]], "got list"),
    ],
)
def test_wrong_boxes_are_named(metric: type[Metric], boxes: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        metric().update(torch.ones(2, 8, 10), boxes)


@pytest.mark.parametrize("metric", [PixelAveragePrecision, PointingGame, EnergyPointingGame])
@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.ones(2, 10, 8, dtype=torch.bool), r"\(2, 8, 10\).*\(2, 10, 8\)"),
        (torch.ones(1, 8, 10, dtype=torch.bool), r"\(2, 8, 10\)"),
        (torch.ones(2, 8, 10), "masks == 1"),
    ],
)
def test_wrong_masks_are_named(metric: type[Metric], masks: Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        metric().update(torch.ones(2, 8, 10), masks)


@pytest.mark.parametrize("metric", [PointingGame, EnergyPointingGame])
def test_an_empty_mask_is_named(metric: type[Metric]) -> None:
    masks = torch.ones(2, 8, 10, dtype=torch.bool)
    masks[1] = False
    with pytest.raises(ConfigurationError, match="mask of image 1 is empty"):
        metric().update(torch.ones(2, 8, 10), masks)


def test_wrong_pixels_to_ignore_are_named() -> None:
    masks = torch.ones(1, 8, 8, dtype=torch.bool)
    with pytest.raises(ConfigurationError, match="ignore must be a bool tensor"):
        PixelAveragePrecision().update(torch.ones(1, 8, 8), masks, torch.ones(1, 8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxBoxAccuracy(3), "version takes 1 or 2, got 3"),
        (lambda: MaxBoxAccuracy(n_thresholds=0), "n_thresholds.*got 0"),
        (lambda: MaxBoxAccuracy(normalization="max"), "'relu_max' or 'min_max'"),
        (lambda: PixelAveragePrecision(n_thresholds=1.5), "n_thresholds.*got 1.5"),
        (lambda: PointingGame(-1), "tolerance.*got -1"),
        (lambda: PointingGame(15.0), "tolerance.*int.*got 15.0"),
        (lambda: PointingGame(True), "tolerance.*got True"),
    ],
)
def test_wrong_options_are_named_at_once(make: Callable[[], Metric], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize("classes", [torch.tensor([0]), torch.tensor([0, -1]), torch.tensor([0.0, 1.0]), [0, 1]])
def test_wrong_classes_are_named(classes: Any) -> None:
    with pytest.raises(ConfigurationError, match="classes must be 2 integers"):
        PointingGame().update(torch.ones(2, 8, 8), torch.tensor([[0, 0, 4, 4]] * 2), classes)


def test_classes_come_with_all_batches_or_with_none() -> None:
    metric = PointingGame()
    metric.update(torch.ones(1, 8, 8), torch.tensor([[0, 0, 4, 4]]), torch.tensor([1]))
    with pytest.raises(ConfigurationError, match="all batches or for none"):
        metric.update(torch.ones(1, 8, 8), torch.tensor([[0, 0, 4, 4]]))


def test_a_box_may_lose_a_little_to_rounding() -> None:
    MaxBoxAccuracy().update(torch.ones(1, 8, 8), torch.tensor([[-1e-6, 0.0, 8.000001, 8.0]]))


# Real photographs


@pytest.mark.real_data
@pytest.mark.skipif(not HAS_DATA, reason=f"no photographs at {DATA}")
def test_the_pets_of_the_photographs_are_found() -> None:
    pytest.importorskip("cv2")
    maps, boxes = pets("test", 24)
    # Of 8 bits, as the contours' images: rounding alone moves a photograph or two across the border of IoU 0.5.
    quantized = (maps * 255).floor() / 255
    reference = swept(quantized, boxes, 255)
    assert max_box_accuracy(quantized, boxes, n_thresholds=255).item() == pytest.approx(reference, abs=0.005)
    assert max_box_accuracy(maps, boxes) >= 0.85
    assert pointing_game(maps, boxes) >= 0.95


def pets(split: str, count: int) -> tuple[Tensor, Tensor]:
    """SqueezeNet's maps of the predicted classes, 224 px, and the boxes around the whole pets."""
    from PIL import Image
    from torchvision.models import squeezenet1_0
    from torchvision.transforms.functional import normalize, resize, to_tensor

    root = DATA / "oxford-iiit-pet"
    names = [line.split()[0] for line in (root / "annotations" / f"{split}.txt").read_text().splitlines()]
    names = names[:: max(1, len(names) // count)][:count]
    with (root / "annotations" / "boxes.csv").open() as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    model = squeezenet1_0()
    path = DATA / "weights" / "squeezenet1_0_deepcompression.pth"
    model.load_state_dict(torch.load(path, weights_only=True))
    images, boxes = [], []
    for name in names:
        with Image.open(root / "images" / f"{name}.jpg") as image:
            pixels = to_tensor(resize(image.convert("RGB"), [224, 224], antialias=True))
        images.append(normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        row = rows[name]
        across, down = 224 / float(row["width"]), 224 / float(row["height"])
        scales = {"pet_xmin": across, "pet_ymin": down, "pet_xmax": across, "pet_ymax": down}
        boxes.append([float(row[key]) * scale for key, scale in scales.items()])
    with torch.no_grad():
        coarse = model.eval().classifier[:2](model.features(torch.stack(images))).relu()
        class_maps = coarse[torch.arange(len(coarse)), coarse.mean((2, 3)).argmax(1)]
        maps = resize_maps(class_maps, (224, 224))
    return maps / maps.amax((1, 2), keepdim=True), torch.tensor(boxes)
