"""Histograms of many tensors, counted where they live."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_interp.model.sharding import full_tensor

__all__ = ["BinCounts", "Histograms", "histograms"]

_STATISTICS = 4  # lowest, highest, sum, sum of squares; the counts follow


class BinCounts(NamedTuple):
    """One histogram, on the CPU.

    Args:
        counts: (B,) float64: how many finite values fell into each bin.
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
    """Histograms of named tensors, still on their devices.

    Args:
        names: The tensors' names.
        statistics: For each tensor (4 + bins,): lowest and highest value, sum, sum of squares, counts.
        not_finite: For each tensor (): how many of its values were left out.
    """

    names: tuple[str, ...]
    statistics: tuple[Tensor, ...]
    not_finite: tuple[Tensor, ...]

    def to_cpu(self) -> Iterator[tuple[str, BinCounts | None, int]]:
        """Bring all to the CPU, in one transfer a device.

        Yields:
            A name, its histogram, or None where no value is finite, and how many values are not finite.
        """
        rows = _to_cpu(
            [torch.cat([row, lost[None]]) for row, lost in zip(self.statistics, self.not_finite, strict=True)]
        )
        for name, row in zip(self.names, rows, strict=True):
            low, high, total, squares = row[:_STATISTICS].tolist()
            counts, lost = row[_STATISTICS:-1], int(row[-1])
            if counts.sum() == 0:
                yield name, None, lost
                continue
            if low == high:
                # A constant has no width of its own: it stands in the middle of a bin.
                counts = torch.zeros_like(counts).index_fill_(0, torch.tensor(len(counts) // 2), float(counts.sum()))
                width = max(abs(low), 1.0) * 1e-3
                low, high = low - width * (len(counts) // 2 + 0.5), low + width * (len(counts) - len(counts) // 2 - 0.5)
            edges = torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)
            yield name, BinCounts(counts, edges, total, squares), lost


@torch.no_grad()
def histograms(tensors: Mapping[str, Tensor], bins: int = 64) -> Histograms:
    """Count the values of each tensor into equal bins between its lowest and highest, on its device.

    Args:
        tensors: Named tensors of any shape and real dtype, on any devices; empty ones are left out. Sharded ones are
            put together, one at a time: every process must ask for the same.
        bins: How many bins, at least 1.

    Returns:
        The histograms, without waiting for a device; values that are not finite are counted apart.

    Raises:
        ValueError: If ``bins`` is not positive.

    Example:
        >>> counted = histograms({"weight": torch.tensor([0.0, 1.0, 1.0, float("nan")])}, bins=2)
        >>> [(name, bins.counts.tolist(), not_finite) for name, bins, not_finite in counted.to_cpu()]
        [('weight', [1.0, 2.0], 1)]
    """
    if bins < 1:
        raise ValueError(f"bins takes a positive integer, got {bins}")
    kept = {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel() > 0}
    rows, lost = [], []
    for tensor in kept.values():
        values = full_tensor(tensor).reshape(-1)
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        row, missing = _count(values, bins)
        rows.append(row)
        lost.append(missing)
    return Histograms(tuple(kept), tuple(rows), tuple(lost))


def _count(values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    if not values.is_cuda:
        low, high = (float(bound) for bound in torch.aminmax(values))
        if low < high and high - low <= torch.finfo(values.dtype).max:
            found = [low, high, float(values.sum()), float(values.dot(values))]
            if all(map(math.isfinite, found)):  # sums of the largest values are not, in their own type
                counts = torch.histc(values, bins, low, high).double()
                return torch.cat([counts.new_tensor(found), counts]), counts.new_zeros(())
    return _count_carefully(values, bins)


def _count_carefully(values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """What is constant or not finite; and all on a GPU, where asking for the bounds first would wait for it."""
    finite = torch.isfinite(values)
    low = torch.where(finite, values, torch.inf).amin()
    high = torch.where(finite, values, -torch.inf).amax()
    kept = torch.where(finite, values, torch.nan)
    # Halved, because the span of a type's largest values is infinite in that type.
    span = high / 2 - low / 2
    counts = _histogram_of_fractions((kept / 2 - low / 2) / torch.where(span > 0, span, 1), bins)
    total, squares = kept.nansum(dtype=torch.float64), kept.double().square().nansum()
    return torch.cat([torch.stack([low.double(), high.double(), total, squares]), counts]), (~finite).sum().double()


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
    found: dict[int, Tensor] = {}
    for indices in by_device.values():
        found.update(zip(indices, torch.stack([rows[index] for index in indices]).cpu(), strict=True))
    return [found[index] for index in range(len(rows))]
