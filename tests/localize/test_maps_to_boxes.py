"""Maps to masks and boxes, and the component tree against one threshold after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_interp import ConfigurationError
from lightning_interp.explain.maps import normalize_maps
from lightning_interp.localize import fit_threshold, maps_to_boxes, maps_to_masks
from lightning_interp.localize.boxes import normalize
from lightning_interp.localize.components import component_tree
from lightning_interp.localize.thresholds import best_threshold, threshold_grid
from tests.helpers.box_sweep import coarse_maps, components_at, iou, largest_at, smooth_maps


def gaussian(size: int, x: float, y: float, sigma: float) -> Tensor:
    axis = torch.arange(size, dtype=torch.float64)
    across, down = ((axis - middle).square() / (-2 * sigma**2) for middle in (x, y))
    return (down.exp()[:, None] * across.exp()[None]).float()


# The tree


@st.composite
def level_maps(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    n = draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(0, n), min_size=height * width, max_size=height * width))
    return np.array(values, dtype=np.int32).reshape(height, width), n


@settings(max_examples=250, deadline=None)
@given(level_maps())
def test_the_tree_holds_what_labels_find_at_every_level(drawn: tuple[np.ndarray, int]) -> None:
    levels, n = drawn
    tree = component_tree(levels, n)
    for level in range(1, n + 1):
        has_level = (tree.lowest <= level) & (level <= tree.highest)
        rows = zip(tree.boxes[has_level].tolist(), tree.half_areas[has_level], tree.counts[has_level], strict=True)
        components = sorted((box, int(area), int(count)) for box, area, count in rows)
        assert components == sorted(components_at(levels >= level))
        assert tree.largest_boxes()[level - 1].tolist() == largest_at(levels >= level)


def fields() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "noise": torch.rand(2, 24, 31, generator=generator),
        "smooth": smooth_maps(3, 40, 3.0),
        "coarse": coarse_maps(3, 40, 7),
        "plateaus": (smooth_maps(3, 32, 2.0, seed=1) * 5).round() / 5,
        "ridges": torch.sin(torch.arange(40) / 2).abs().expand(1, 40, 40) + smooth_maps(1, 40, 4.0),
        "constant": torch.ones(1, 7, 5),
        "row": torch.rand(2, 1, 40, generator=generator),
        "column": torch.rand(2, 40, 1, generator=generator),
        "pixel": torch.ones(1, 1, 1),
        "nothing": torch.zeros(1, 6, 6),
    }


@pytest.mark.parametrize("name", fields())
@pytest.mark.parametrize("normalization", ["relu_max", "min_max"])
def test_the_trees_boxes_are_those_of_each_threshold_by_itself(name: str, normalization: str) -> None:
    maps = fields()[name]
    grid = threshold_grid(60)
    levels = torch.bucketize(normalize(maps, normalization), grid).numpy()
    swept = torch.stack([maps_to_boxes(maps, float(threshold), normalization=normalization) for threshold in grid], 1)
    for level, boxes in zip(levels, swept, strict=True):
        assert component_tree(level, 60).largest_boxes().tolist() == boxes.tolist()


def test_the_best_value_of_a_level_is_that_of_the_components_there() -> None:
    levels = torch.bucketize(smooth_maps(1, 40, 2.0)[0], threshold_grid(37)).numpy()
    tree = component_tree(levels, 37)
    values = np.random.default_rng(0).random(len(tree.boxes))
    slow = [values[(tree.lowest <= level) & (level <= tree.highest)].max() for level in range(1, 38)]
    assert tree.max_per_level(values, 0.0).tolist() == slow


# Masks and boxes


@pytest.mark.parametrize(("threshold", "reach"), [(0.2, 1.794), (0.5, 1.177), (0.9, 0.459)])
def test_the_box_of_a_bump_reaches_as_far_as_its_formula_says(threshold: float, reach: float) -> None:
    # exp(-r^2 / 2 s^2) > t where r < s sqrt(-2 ln t)
    x, y, sigma = 30.0, 21.0, 7.0
    box = maps_to_boxes(5 * gaussian(64, x, y, sigma)[None], threshold)[0]
    radius = int(reach * sigma)
    assert box.tolist() == [x - radius, y - radius, x + radius + 1, y + radius + 1]
    assert box.dtype == torch.float32


def test_a_value_at_the_threshold_is_not_over_it() -> None:
    maps = torch.tensor([[[0.5, 0.2, 1.0]], [[1.0, 0.4, 2.0]]])
    assert maps_to_masks(maps, 0.5).tolist() == [[[False, False, True]]] * 2
    assert maps_to_masks(maps, 0.2)[0].tolist() == [[True, False, True]]


def test_normalisations_differ_on_signed_maps() -> None:
    maps = torch.tensor([[[-3.0, 0.0, 1.0]]])
    assert maps_to_masks(maps, 0.5).tolist() == [[[False, False, True]]]
    assert maps_to_masks(maps, 0.5, normalization="min_max").tolist() == [[[False, True, True]]]


@pytest.mark.parametrize(
    ("value", "normalization"),
    [(0.0, "relu_max"), (-2.0, "relu_max"), (3.0, "min_max"), (float("nan"), "relu_max"), (float("inf"), "min_max")],
)
def test_a_map_with_nothing_to_show_finds_nothing(value: float, normalization: str) -> None:
    maps = torch.stack([torch.full((4, 4), value), torch.eye(4)])
    maps[0, 1, 1] = value
    assert maps_to_masks(maps, 0.0, normalization=normalization).flatten(1).any(1).tolist() == [False, True]
    assert maps_to_boxes(maps, 0.0, normalization=normalization)[0].tolist() == [0, 0, 0, 0]
    nothing, one = maps_to_boxes(maps, 0.0, "all", normalization=normalization)
    assert nothing.shape == (0, 4)
    assert one.tolist() == [[0, 0, 4, 4]]


def test_one_pixel_that_is_not_a_number_spoils_its_map_alone() -> None:
    maps = torch.ones(2, 4, 4)
    maps[0, 0, 0] = torch.nan
    assert maps_to_boxes(maps).tolist() == [[0, 0, 0, 0], [0, 0, 4, 4]]


@pytest.mark.parametrize(("normalization", "mode"), [("relu_max", "relu"), ("min_max", "min_max")])
def test_finite_maps_are_normalised_as_everywhere_in_the_package(normalization: str, mode: str) -> None:
    maps = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalize(maps, normalization), normalize_maps(maps, mode), rtol=1e-6, atol=1e-7)


def test_infinities_and_huge_differences() -> None:
    low, high = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    maps = torch.tensor([[[-torch.inf, 1.0, 2.0]], [[low, 0.0, high]]])
    assert normalize(maps).tolist() == [[[0, 0.5, 1]], [[0, 0, 1]]]
    assert normalize(maps, "min_max").tolist() == [[[0, 0, 0]], [[0, 0.5, 1]]]


def test_the_largest_component_is_largest_by_area_not_by_pixels() -> None:
    maps = torch.zeros(1, 12, 12)
    maps[0, 1, :] = 1.0  # twelve pixels in a line: area 0
    maps[0, 5:8, 3:6] = 1.0  # nine pixels: area 4
    maps[0, 10, 10] = 1.0
    assert maps_to_boxes(maps).tolist() == [[3, 5, 6, 8]]
    every = maps_to_boxes(maps, components="all")
    assert every[0].tolist() == [[3, 5, 6, 8], [0, 1, 12, 2], [10, 10, 11, 11]]


def test_corners_connect() -> None:
    assert maps_to_boxes(torch.eye(5)[None], components="all")[0].tolist() == [[0, 0, 5, 5]]


def test_boxes_keep_no_graph_and_take_any_floating_type() -> None:
    maps = torch.rand(2, 8, 8, requires_grad=True)
    assert not maps_to_boxes(maps).requires_grad
    expected = maps_to_boxes(maps.detach().bfloat16().float())
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(maps_to_boxes(maps.detach().bfloat16().to(dtype)), expected)
    tiny = torch.eye(4, dtype=torch.float64)[None] * 1e-60
    assert maps_to_boxes(tiny).tolist() == [[0, 0, 4, 4]]
    assert maps_to_boxes(maps[:0]).shape == (0, 4)
    assert maps_to_boxes(maps[:0], components="all") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maps": torch.zeros(2, 3, 8, 8)}, r"\(N, H, W\).*float32 \(2, 3, 8, 8\)"),
        ({"maps": torch.zeros(2, 8, 8, dtype=torch.uint8)}, "floating"),
        ({"threshold": 1.0}, "0 <= threshold < 1, got 1.0"),
        ({"threshold": 20}, "got 20"),
        ({"threshold": float("nan")}, "got nan"),
        ({"components": "biggest"}, "'largest' or 'all', got 'biggest'"),
        ({"normalization": "softmax"}, "'relu_max' or 'min_max', got 'softmax'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        maps_to_boxes(**{"maps": torch.zeros(2, 8, 8), **arguments})


# The fitted threshold


def shrunken(share: float, n: int = 12) -> tuple[Tensor, Tensor]:
    """Bumps whose true boxes are those at a share of the maximum."""
    generator = torch.Generator().manual_seed(5)
    places = 24 + 16 * torch.rand(n, 2, generator=generator)
    maps = torch.stack([gaussian(64, float(x), float(y), 4.0) for x, y in places])
    return maps, maps_to_boxes(maps, share)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_the_fitted_threshold_finds_the_share_that_made_the_boxes(share: float) -> None:
    maps, boxes = shrunken(share)
    threshold = fit_threshold(maps, boxes, iou=0.99)
    assert threshold == pytest.approx(share, abs=0.03)
    assert torch.equal(maps_to_boxes(maps, threshold), boxes)


def test_the_fitted_threshold_beats_or_equals_every_other() -> None:
    maps = coarse_maps(12, 48, 9)
    boxes = maps_to_boxes(maps, 0.35)
    boxes[::3] = maps_to_boxes(maps, 0.1)[::3]

    def hits(threshold: float) -> int:
        predicted = maps_to_boxes(maps, threshold).tolist()
        return sum(iou(*pair) >= 0.8 for pair in zip(predicted, boxes.tolist(), strict=True))

    fitted = hits(fit_threshold(maps, boxes, iou=0.8, n_thresholds=50))
    assert fitted == max(hits(float(threshold)) for threshold in threshold_grid(50))
    assert fitted > hits(0.8)


@pytest.mark.parametrize(
    ("hits", "index"),
    [
        ([0, 1, 2, 2, 2, 2, 1, 0], 3),
        ([2, 0, 2, 2, 2, 0, 2, 2], 3),
        ([0, 0, 0, 0, 0, 0, 0, 5], 7),
        ([5, 5, 5, 0, 0, 0, 0, 0], 1),
    ],
)
def test_of_equal_thresholds_the_middle_of_the_longest_run_is_taken(hits: list[int], index: int) -> None:
    assert best_threshold(torch.tensor(hits)) == index / 8


def test_where_nothing_is_found_the_usual_threshold_is_left() -> None:
    assert fit_threshold(torch.zeros(1, 8, 8), torch.tensor([[1, 1, 4, 4]])) == 0.2


def test_any_of_several_boxes_may_be_matched() -> None:
    maps, boxes = shrunken(0.3)
    several = [torch.stack([torch.tensor([0.0, 0.0, 2.0, 2.0]), box]) for box in boxes]
    assert fit_threshold(maps, several) == fit_threshold(maps, boxes)


@pytest.mark.parametrize("iou", [0.0, 1.1])
def test_an_overlap_out_of_range_is_refused(iou: float) -> None:
    with pytest.raises(ConfigurationError, match=r"\(0, 1\]"):
        fit_threshold(torch.ones(1, 8, 8), torch.tensor([[1, 1, 4, 4]]), iou=iou)


def test_a_threshold_needs_images() -> None:
    with pytest.raises(ConfigurationError, match="at least one map"):
        fit_threshold(torch.zeros(0, 8, 8), torch.zeros(0, 4))
