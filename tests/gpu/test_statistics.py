"""Histograms, norms and copies of tensors of a device: the CPU's numbers, without waiting for the device."""

from __future__ import annotations

import math
import pickle
import time

import pytest
import torch
from torch import Tensor

from lightning_interp.callbacks.run.transfer import HostCopy
from lightning_interp.weights import histograms, parameter_norms

BINS = 16
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def binned(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[int]]:
    """Values in the middle of bins, where no rounding moves them, with both ends, and how many are in each bin."""
    counts = [(7 * index) % 5 for index in range(BINS)]
    middles = [index + 0.5 for index, count in enumerate(counts) for _ in range(count)]
    counts[0] += 1
    counts[-1] += 1
    return torch.tensor([0.0, BINS, *middles], dtype=dtype, device=device), counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lost", [[], [math.nan], [math.inf, -math.inf, math.nan]], ids=len)
def test_histograms_are_the_cpus(dtype: torch.dtype, lost: list[float], device: torch.device) -> None:
    values, counts = binned(dtype, device)
    values = torch.cat([values, torch.tensor(lost, dtype=dtype, device=device)])
    ((name, bins, not_finite),) = histograms({"weight": values}, BINS).to_cpu()
    finite = values[values.isfinite()].double().cpu()
    assert (name, not_finite) == ("weight", len(lost))
    assert bins is not None
    assert bins.counts.tolist() == counts
    assert (float(bins.edges[0]), float(bins.edges[-1])) == (0, BINS)
    assert bins.total == pytest.approx(float(finite.sum()))
    assert bins.total_of_squares == pytest.approx(float(finite.square().sum()))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("lost", [1, 2])
def test_histograms_in_deterministic_mode(lost: int, device: torch.device) -> None:
    values, counts = binned(torch.float32, device)
    values = torch.cat([values, torch.full((lost,), math.nan, device=device)])
    ((_, bins, not_finite),) = histograms({"weight": values}, BINS).to_cpu()
    assert bins is not None
    assert (bins.counts.tolist(), not_finite) == (counts, lost)


def test_histograms_of_constants_and_of_nothing(device: torch.device) -> None:
    tensors = {"constant": torch.full((5,), 2.0, device=device), "lost": torch.full((3,), math.nan, device=device)}
    tensors["empty"] = torch.empty(0, device=device)
    (constant, bins, _), (lost, nothing, not_finite) = histograms(tensors, BINS).to_cpu()
    assert (constant, lost, nothing, not_finite) == ("constant", "lost", None, 3)
    assert bins is not None
    assert int(bins.counts.sum()) == 5


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_norms_are_the_cpus(order: float, device: torch.device) -> None:
    tensors = {str(dtype): torch.linspace(-2, 3, 101, dtype=dtype, device=device) for dtype in DTYPES}
    for name, norm in parameter_norms(tensors, order).items():
        assert norm.device.type == device.type
        assert float(norm) == pytest.approx(float(torch.linalg.vector_norm(tensors[name].cpu().double(), order)), 1e-4)


@pytest.mark.usefixtures("no_synchronization")
def test_statistics_do_not_wait_for_the_device(device: torch.device) -> None:
    tensors = {str(index): torch.linspace(-1, 1, 100, device=device) for index in range(3)}
    counted, norms = histograms(tensors, BINS), parameter_norms(tensors)
    copies = [HostCopy(tensor) for tensor in (*counted.statistics, *norms.values())]
    assert len(copies) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16], ids=str)
def test_a_copy_arrives(dtype: torch.dtype, device: torch.device) -> None:
    tensor = torch.arange(12, device=device).reshape(3, 4).to(dtype)
    for arrived in (HostCopy(tensor).wait(), pickle.loads(pickle.dumps(HostCopy(tensor))).wait()):
        assert arrived.device.type == "cpu"
        assert arrived.dtype == dtype
        assert torch.equal(arrived, tensor.cpu())
    assert HostCopy(tensor).wait().is_pinned() == (device.type == "cuda")


@pytest.mark.gpu
def test_a_copy_is_not_waited_for_and_is_of_its_moment() -> None:
    tensor = torch.zeros(1000, device="cuda")
    HostCopy(tensor).wait()  # pinned memory is allocated once
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of the device's clock
    tensor.add_(1)
    started = time.perf_counter()
    copy = HostCopy(tensor)
    taken = time.perf_counter() - started
    tensor.add_(1)  # later on the same stream
    assert not torch.cuda.current_stream().query(), "the device was to be busy still"
    assert taken < 0.3
    assert torch.equal(copy.wait(), torch.ones(1000))


@pytest.mark.gpu
def test_a_copy_from_another_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        tensor = torch.full((1000,), 3.0, device="cuda")
        copy = HostCopy(tensor)
    assert torch.equal(copy.wait(), torch.full((1000,), 3.0))
