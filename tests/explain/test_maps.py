from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import normalize_maps, resize_maps

LARGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(
    ("mode", "expected"),
    [("relu", [0, 0, 0.5, 1]), ("min_max", [0, 0.5, 0.75, 1]), ("max_abs", [1, 0, 0.5, 1])],
)
def test_modes(mode: Any, expected: list[float], scale: float) -> None:
    maps = torch.tensor([[[-2.0, 0.0], [1.0, 2.0]]]) * scale
    torch.testing.assert_close(normalize_maps(maps, mode).flatten(), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("mode", ["relu", "min_max", "max_abs"])
@pytest.mark.parametrize("percentile", [None, 50, 99.0, 100])
@pytest.mark.parametrize(
    "values",
    [[0.0] * 4, [3.0] * 4, [-3.0] * 4, [torch.nan] * 4, [torch.inf, -torch.inf, 1, 2], [LARGE, -LARGE, 0, 1]],
)
def test_the_result_is_finite_and_within_zero_and_one(mode: Any, percentile: float | None, values: list[float]) -> None:
    result = normalize_maps(torch.tensor(values).view(1, 2, 2), mode, percentile=percentile)
    assert result.dtype == torch.float32
    assert ((result >= 0) & (result <= 1)).all()


@pytest.mark.parametrize(("mode", "value"), [("relu", -3.0), ("min_max", 3.0), ("max_abs", 0.0), ("relu", torch.nan)])
def test_a_map_without_contrast_is_zero(mode: Any, value: float) -> None:
    assert not normalize_maps(torch.full((1, 2, 2), value), mode).any()


def test_non_finite_values_are_zero_and_do_not_count() -> None:
    maps = torch.tensor([[[torch.nan, -1.0, 3.0, torch.inf]]])
    assert normalize_maps(maps, "min_max").flatten().tolist() == [0, 0, 1, 0]
    assert normalize_maps(maps).flatten().tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(normalize_maps(maps, "max_abs").flatten(), torch.tensor([0, 1 / 3, 1, 0]))


def test_each_map_has_its_own_scale_and_is_not_changed() -> None:
    maps = torch.tensor([[[1.0, 2.0]], [[100.0, 400.0]]])
    before = maps.clone()
    assert normalize_maps(maps).tolist() == [[[0.5, 1.0]], [[0.25, 1.0]]]
    assert torch.equal(maps, before)


@pytest.mark.parametrize("mode", ["relu", "min_max", "max_abs"])
def test_the_largest_numbers_do_not_overflow(mode: Any) -> None:
    assert normalize_maps(torch.tensor([[[LARGE, -LARGE, 0.0]]]), mode).max() == 1


def test_a_percentile_clips_outliers() -> None:
    maps = torch.ones(1, 10, 10)
    maps[0, 0, 0] = 1000
    assert normalize_maps(maps)[0, 1, 1] < 0.01
    assert normalize_maps(maps, percentile=99).eq(1).all()
    ramp = torch.arange(1.0, 101.0).view(1, 10, 10)
    torch.testing.assert_close(normalize_maps(ramp, percentile=50), (ramp / 50).clamp(max=1))
    sparse = torch.zeros(1, 10, 10)
    sparse[0, 0, :4] = torch.arange(1.0, 5.0)
    assert normalize_maps(sparse, percentile=90).equal(sparse / 4)  # the percentile is zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_any_real_dtype(dtype: torch.dtype) -> None:
    maps = torch.tensor([[[0, 1], [1, 0]]], dtype=dtype)
    assert normalize_maps(maps).equal(maps.float())


def test_no_maps_and_maps_with_a_graph() -> None:
    assert normalize_maps(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    assert not normalize_maps(torch.ones(1, 2, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (torch.zeros(3, 3), {}, r"maps takes a real tensor \(N, H, W\) with H, W > 0, got float32 \(3, 3\)"),
        (torch.zeros(1, 0, 3), {}, r"got float32 \(1, 0, 3\)"),
        (torch.zeros(1, 3, 3, dtype=torch.complex64), {}, "got complex64"),
        (torch.zeros(1, 3, 3), {"mode": "minmax"}, "mode takes 'relu', .*, got 'minmax'; did you mean 'min_max'"),
        (torch.zeros(1, 3, 3), {"percentile": 0}, "percentile takes a number above 0, at most 100, or None, got 0"),
        (torch.zeros(1, 3, 3), {"percentile": 101}, "percentile takes .*, got 101"),
        (torch.zeros(1, 3, 3), {"percentile": float("nan")}, "percentile takes .*, got nan"),
        (torch.zeros(1, 3, 3), {"percentile": "99"}, "percentile takes .*, got '99'"),
    ],
)
def test_arguments_out_of_range(maps: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        normalize_maps(maps, **options)


@pytest.mark.parametrize("size", [(7, 9), (2, 3), (4, 5)])
def test_maps_are_resized_bilinearly(size: tuple[int, int]) -> None:
    maps = torch.rand(2, 4, 5)
    expected = interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(resize_maps(maps, size), expected)
    assert torch.equal(resize_maps(maps, torch.Size(size)), expected)


def test_maps_of_any_number_of_dimensions_are_resized() -> None:
    maps = torch.rand(2, 3, 4, 5)
    resized = resize_maps(maps, (8, 10))
    assert resized.shape == (2, 3, 8, 10)
    assert torch.equal(resized[1, 2], resize_maps(maps[1, 2], (8, 10)))


def test_maps_of_the_right_size_are_not_copied() -> None:
    maps = torch.rand(2, 4, 5)
    assert resize_maps(maps, (4, 5)) is maps
    for size in ((4, 5), (8, 8)):
        assert resize_maps(maps.double(), size).dtype == torch.float32
        assert resize_maps(maps.bfloat16(), size).dtype == torch.float32
