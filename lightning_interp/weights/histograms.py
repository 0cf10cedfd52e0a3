"""Histograms of many tensors, counted on their devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_interp.checks import check_integer
from lightning_interp.model.sharding import full_tensor

__all__ = ["BinCounts", "Histograms", "histograms"]

_STATISTICS = 4  # minimum, maximum, sum, sum of squares; the counts follow


class BinCounts(NamedTuple):
    """One histogram, on the CPU.

    Args:
        counts: (B,) float64: the number of finite values in each bin.
        edges: (B + 1,) float64, increasing.
        total: Sum of the finite values.
        total_of_squares: Sum of their squares.
    """

    counts: Tensor
    edges: Tensor
    total: float
    total_of_squares: float


@dataclass(frozen=True, slots=True, eq=False)
class Histograms:
    """Histograms of named tensors, on their devices.

    Args:
        names: The tensors' names.
        statistics: For each tensor (4 + bins,): minimum, maximum, sum, sum of squares, counts.
        not_finite: For each tensor (): the number of its values that are not finite, which are not counted.
    """

    names: tuple[str, ...]
    statistics: tuple[Tensor, ...]
    not_finite: tuple[Tensor, ...]

    def to_cpu(self) -> Iterator[tuple[str, BinCounts | None, int]]:
        """Copy all to the CPU, in one transfer a device.

        Yields:
            A name, its histogram, or None where no value is finite, and the number of values that are not finite.
        """
        pairs = zip(self.statistics, self.not_finite, strict=True)
        rows = _to_cpu([torch.cat([statistics, not_finite[None]]) for statistics, not_finite in pairs])
        for name, row in zip(self.names, rows, strict=True):
            low, high, total, squares = row[:_STATISTICS].tolist()
            counts, not_finite = row[_STATISTICS:-1], int(row[-1])
            if counts.sum() == 0:
                yield name, None, not_finite
                continue
            if low == high:
                # Equal values have a range of zero width: they are put in the middle of a bin.
                counts = torch.zeros_like(counts).index_fill_(0, torch.tensor(len(counts) // 2), float(counts.sum()))
                width = max(abs(low), 1.0) * 1e-3
                low, high = low - width * (len(counts) // 2 + 0.5), low + width * (len(counts) - len(counts) // 2 - 0.5)
            edges = torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)
            yield name, BinCounts(counts, edges, total, squares), not_finite


@torch.no_grad()
def histograms(tensors: Mapping[str, Tensor], bins: int = 64) -> Histograms:
    """Count the values of each tensor in equal bins between its minimum and maximum, on its device.

    Args:
        tensors: Named tensors of any shape and real dtype, on any devices; empty ones are left out. Sharded ones are
            gathered, one at a time: a collective, which every process must call for the same tensors.
        bins: Number of bins, at least 1.

    Returns:
        The histograms, without synchronising with a device; values that are not finite are counted separately.

    Raises:
        ConfigurationError: If ``bins`` is no positive integer.

    Example:
        >>> counted = histograms({"weight": torch.tensor([0.0, 1.0, 1.0, float("nan")])}, bins=2)
        >>> [(name, bins.counts.tolist(), not_finite) for name, bins, not_finite in counted.to_cpu()]
        [('weight', [1.0, 2.0], 1)]
    """
    bins = check_integer("bins", bins)
    non_empty = {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel() > 0}
    statistics, not_finite = [], []
    for tensor in non_empty.values():
        values = full_tensor(tensor).reshape(-1)
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        row, count = _count(values, bins)
        statistics.append(row)
        not_finite.append(count)
    return Histograms(tuple(non_empty), tuple(statistics), tuple(not_finite))


def _count(values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    if not values.is_cuda:
        low, high = (float(bound) for bound in torch.aminmax(values))
        if low < high and high - low <= torch.finfo(values.dtype).max:
            statistics = [low, high, float(values.sum()), float(values.dot(values))]
            if all(map(math.isfinite, statistics)):  # sums of a dtype's largest values overflow in that dtype
                counts = torch.histc(values, bins, low, high).double()
                return torch.cat([counts.new_tensor(statistics), counts]), counts.new_zeros(())
    return _count_any(values, bins)


def _count_any(values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Count values that may be constant or not finite; on a GPU all, since reading the bounds would synchronise."""
    is_finite = torch.isfinite(values)
    low = torch.where(is_finite, values, torch.inf).amin()
    high = torch.where(is_finite, values, -torch.inf).amax()
    finite = torch.where(is_finite, values, torch.nan)
    # Halved, because the span of a dtype's largest values overflows in that dtype.
    span = high / 2 - low / 2
    counts = _histogram_of_fractions((finite / 2 - low / 2) / torch.where(span > 0, span, 1), bins)
    total, squares = finite.nansum(dtype=torch.float64), finite.double().square().nansum()
    statistics = torch.stack([low.double(), high.double(), total, squares])
    return torch.cat([statistics, counts]), (~is_finite).sum().double()


def _histogram_of_fractions(fractions: Tensor, bins: int) -> Tensor:
    """Count values of 0 to 1, and leave NaN out; ``histc`` has no deterministic kernel on a GPU."""
    if not torch.are_deterministic_algorithms_enabled():
        return torch.histc(fractions, bins, 0, 1).double()
    indices = (fractions * bins).clamp(max=bins - 1).nan_to_num(bins).long()
    return torch.bincount(indices, minlength=bins + 1)[:bins].double()


def _to_cpu(rows: list[Tensor]) -> list[Tensor]:
    by_device: dict[torch.device, list[int]] = {}
    for index, row in enumerate(rows):
        by_device.setdefault(row.device, []).append(index)
    copies: dict[int, Tensor] = {}
    for indices in by_device.values():
        copies.update(zip(indices, torch.stack([rows[index] for index in indices]).cpu(), strict=True))
    return [copies[index] for index in range(len(rows))]
