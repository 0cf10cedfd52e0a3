"""Histograms and norms against those of NumPy and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_interp import ConfigurationError
from lightning_interp.sinks.records import Histogram
from lightning_interp.weights import Layers, check_order, histograms, parameter_norms

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def count(values: Tensor, bins: int = 64) -> tuple[Histogram | None, int]:
    ((name, counted, not_finite),) = histograms({"x": values}, bins).to_cpu()
    return None if counted is None else Histogram(name, *counted), not_finite


@pytest.mark.parametrize("bins", [1, 2, 10, 64, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_numpys(bins: int, dtype: torch.dtype) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(bins), dtype=torch.float64).to(dtype)
    record, not_finite = count(values, bins)
    assert record is not None
    expected, edges = np.histogram(values.double().numpy(), bins)
    # A value within rounding of an edge may stand on either side.
    assert np.abs(np.cumsum(record.counts.numpy()) - np.cumsum(expected)).max() <= 2
    assert np.allclose(record.edges.numpy(), edges)
    assert (record.count, not_finite) == (2000, 0)
    assert record.total == pytest.approx(float(values.double().sum()), rel=1e-4, abs=1e-4)
    assert record.total_of_squares == pytest.approx(float(values.double().square().sum()))


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(FINITE | st.just(float("nan")) | st.just(math.inf), min_size=1, max_size=40), bins=st.integers(1, 9)
)
def test_every_finite_value_is_counted_once(values: list[float], bins: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    finite = tensor[tensor.isfinite()].double()
    record, not_finite = count(tensor, bins)
    assert not_finite == len(values) - len(finite)
    if len(finite) == 0:
        assert record is None
        return
    assert record is not None
    assert record.count == len(finite)
    assert bool((record.edges.diff() > 0).all())
    assert float(record.edges[0]) <= float(finite.min())
    assert float(finite.max()) <= float(record.edges[-1])
    assert record.total == pytest.approx(float(finite.sum()), rel=1e-4, abs=1e-4 * float(finite.abs().max()))
    assert record.total_of_squares == pytest.approx(float(finite.square().sum()), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, 1e30, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("bins", [1, 2, 5])
def test_a_constant_stands_in_the_middle(value: float, bins: int) -> None:
    record, not_finite = count(torch.full((7,), value), bins)
    assert record is not None
    assert (record.count, not_finite) == (7, 0)
    assert int(record.counts.argmax()) == bins // 2
    middle = record.counts.argmax()
    assert record.edges[middle] < value < record.edges[middle + 1]


def test_what_is_empty_is_left_out_and_what_is_not_finite_is_counted_apart() -> None:
    counted = histograms({"empty": torch.zeros(0, 3), "nan": torch.full((4,), torch.nan), "one": torch.tensor(2.0)})
    assert counted.names == ("nan", "one")
    (_, nan_record, not_finite), (_, record, none_missing) = counted.to_cpu()
    assert (nan_record, not_finite, none_missing) == (None, 4, 0)
    assert record is not None
    assert record.counts.sum() == 1
    mixed, not_finite = count(torch.tensor([math.inf, -math.inf, math.nan, 1.0, 2.0]), 2)
    assert mixed is not None
    assert (mixed.counts.tolist(), not_finite) == ([1, 1], 3)
    assert (mixed.total, mixed.total_of_squares) == (3, 5)
    assert list(histograms({}).to_cpu()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_counted_in_full(dtype: torch.dtype) -> None:
    values = torch.linspace(-6e4, 6e4, 5000).to(dtype)
    record, not_finite = count(values, 10)
    assert record is not None
    assert (record.count, not_finite) == (5000, 0)
    assert record.total_of_squares == pytest.approx(float(values.double().square().sum()))
    assert float(record.counts.min()) > 400


def test_the_whole_range_of_a_type() -> None:
    largest = torch.finfo(torch.float32).max
    record, not_finite = count(torch.tensor([-largest, 0.0, 1.0, largest]), 4)
    assert record is not None
    assert (record.count, not_finite) == (4, 0)
    assert record.counts.tolist() == [1, 0, 2, 1]
    assert math.isfinite(record.total_of_squares)


def test_tensors_of_many_kinds_at_once() -> None:
    tensors = {
        "a": torch.ones(2, 3),
        "b": torch.randn(5, dtype=torch.float64),
        "c": torch.arange(4),
        "d": torch.randn(3, 3).bfloat16(),
        "e": nn.Parameter(torch.randn(2)),
    }
    totals = {name: counted.counts.sum() for name, counted, _ in histograms(tensors, 3).to_cpu() if counted is not None}
    assert totals == {name: tensor.numel() for name, tensor in tensors.items()}


@pytest.mark.parametrize("bins", [0, -1])
def test_bins_must_be_positive(bins: int) -> None:
    with pytest.raises(ValueError, match="bins"):
        histograms({"x": torch.ones(2)}, bins)


ORDERS = [1, 2, 3, 2.5, math.inf]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norms_are_torchs(order: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {str(n): torch.randn(n, 3, generator=generator).to(dtype) for n in (1, 2, 50, 2000)}
    norms = parameter_norms({**tensors, "empty": torch.zeros(0)}, order)
    assert list(norms) == list(tensors)
    for name, tensor in tensors.items():
        assert norms[name].dtype == torch.float32
        assert float(norms[name]) == pytest.approx(float(torch.linalg.vector_norm(tensor.double(), order)), rel=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_is_one_vector(order: float) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    layers = Layers.of(model)
    combined = layers.combine(parameter_norms(dict(model.named_parameters()), order), order)
    flat = [torch.cat([vector.detach().flatten() for vector in layer.parameters()]) for layer in (model[0], model[2])]
    expected = [torch.linalg.vector_norm(vector.double(), order) for vector in (*flat, torch.cat(flat))]
    assert layers.names == ("0", "2")
    assert combined.tolist() == pytest.approx([float(vector) for vector in expected], rel=1e-5)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_combining_neither_vanishes_nor_overflows(order: float, size: float) -> None:
    layers = Layers.of(nn.Linear(1, 1))
    combined = layers.combine({"weight": torch.tensor(3 * size), "bias": torch.tensor(4 * size)}, order)
    assert combined.tolist() == pytest.approx([(3**order + 4**order) ** (1 / order) * size] * 2, rel=1e-5, abs=0)


@pytest.mark.parametrize(("order", "size"), [(2, 1e-17), (2, 1e17), (1, 1e-30), (1, 1e30)])
def test_norms_of_very_small_and_large_values(size: float, order: float) -> None:
    norms = parameter_norms({"x": torch.full((5000,), size)}, order)
    assert float(norms["x"]) == pytest.approx(5000 ** (1 / order) * size, rel=1e-3, abs=0)


def test_a_layer_without_a_norm_is_zero_and_nothing_at_all_is_zeros() -> None:
    layers = Layers.of(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    assert layers.combine({"1.bias": torch.tensor(2.0)}).tolist() == [0, 2, 2]
    assert layers.combine({}).tolist() == [0, 0, 0]
    assert layers.combine({"1.bias": torch.tensor(2.0)}, math.inf).tolist() == [0, 2, 2]


def test_a_norm_that_is_not_finite_stays_so() -> None:
    layers = Layers.of(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    combined = layers.combine({"0.bias": torch.tensor(1.0), "1.bias": torch.tensor(math.nan)})
    assert float(combined[0]) == 1
    assert math.isnan(combined[1])
    assert math.isnan(combined[2])


@pytest.mark.parametrize("order", [0, 0.5, -1, "2", True, None, math.nan])
def test_orders_below_one_are_refused(order: object) -> None:
    with pytest.raises(ConfigurationError, match="ord"):
        check_order(order)
