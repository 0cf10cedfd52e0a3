"""Which items of its data set a loader's batches hold."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from lightning_interp.callbacks.run.trainer import is_indexable

__all__ = ["SampleIndices"]


class SampleIndices:
    """The indices of a loader's batches, where its sampler is known.

    Args:
        loader: A loader that goes through its data set in order, or as torch's DistributedSampler does.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> SampleIndices(DataLoader([5, 6, 7, 8, 9], batch_size=2)).batch(2, 1)
        ([4], [True])
    """

    def __init__(self, loader: Any) -> None:
        dataset: Any = getattr(loader, "dataset", None)
        self.dataset = dataset
        batches = getattr(loader, "batch_sampler", None)
        sampler: Any = getattr(batches, "sampler", None)
        self._size = getattr(batches, "batch_size", 0)
        self._indices: list[int] | None = None
        self._counts: list[bool] = []
        if type(batches) is not BatchSampler or not is_indexable(dataset):
            return
        length = len(dataset)
        if type(sampler) is SequentialSampler:
            self._indices = list(range(len(sampler)))
            self._counts = [True] * len(sampler)
        elif type(sampler) is DistributedSampler:
            self._indices = list(sampler)
            # Positions behind the last item fill the shards up with items that other ranks have already.
            positions = range(sampler.rank, sampler.total_size, sampler.num_replicas)
            self._counts = [position < length for position in positions]

    def batch(self, batch_idx: int, count: int) -> tuple[list[int], list[bool]] | None:
        """The indices of a batch of so many items, and which of them no other rank has; None where unknown."""
        if self._indices is None:
            return None
        part = slice(batch_idx * self._size, (batch_idx + 1) * self._size)
        return (self._indices[part], self._counts[part]) if len(self._indices[part]) == count else None
