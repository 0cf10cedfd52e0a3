"""Boxes and masks of the objects in batches and data sets."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from lightning_interp.data.batches import apply_unpack, unpack_batch
from lightning_interp.data.boxes import read_boxes, read_masks
from lightning_interp.data.datasets import inner_datasets
from lightning_interp.errors import ConfigurationError

__all__ = ["Annotations", "dataset_annotations", "unpack_annotated"]


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """Boxes and masks of the objects in N images.

    Args:
        boxes: N tensors (M, 4), x1, y1, x2, y2 in the images' pixels, M = 0 for an image without a box; or None.
        masks: (N, H, W) bool, or None.
        ignore: Pixels that count neither as object nor as background, (N, H, W) bool, or None.

    Example:
        >>> import torch
        >>> Annotations((torch.tensor([[1, 2, 5, 6]]),)).masks is None
        True
    """

    boxes: tuple[Tensor, ...] | None = None
    masks: Tensor | None = None
    ignore: Tensor | None = None


def unpack_annotated(
    batch: Any, unpack: Callable[[Any], Any] | None = None, *, strict: bool = True
) -> tuple[Tensor, Tensor | None, Annotations | None]:
    """Find the images, the class labels, and the boxes and masks in a batch.

    Args:
        batch: As ``unpack_batch`` takes it. Boxes and masks are read where it is a mapping with ``"boxes"`` or
            ``"masks"`` (and ``"ignore"`` beside these), or where its second element, the targets, is one.
        unpack: From the batch to any such structure.
        strict: Whether boxes or masks that cannot be read are an error; otherwise there are no annotations then.

    Returns:
        The images (N, C, H, W), the targets (N,) or None, and the annotations or None.

    Raises:
        ConfigurationError: If there are no images, or boxes or masks cannot be read and ``strict``.

    Example:
        >>> import torch
        >>> batch = {"images": torch.zeros(1, 3, 8, 8), "boxes": torch.tensor([[0, 0, 4, 4]])}
        >>> unpack_annotated(batch)[2].boxes
        (tensor([[0., 0., 4., 4.]]),)
    """
    unpacked = apply_unpack(batch, unpack)
    images, targets = unpack_batch(batch, None if unpack is None else lambda _: unpacked)
    entries: dict[str, Any] = {}
    second = unpacked[1] if isinstance(unpacked, (list, tuple)) and len(unpacked) > 1 else None
    for part in (second, unpacked):
        if isinstance(part, Mapping):
            entries |= {str(key).lower(): value for key, value in part.items()}
    try:
        annotations = _read(entries.get("boxes"), entries.get("masks"), images.shape, entries.get("ignore"))
    except ConfigurationError:
        if strict:
            raise
        annotations = None
    return images, targets, annotations


def dataset_annotations(dataset: Any, indices: Sequence[int], shape: Sequence[int]) -> Annotations | None:
    """Read the boxes and masks that a data set holds as attributes, without loading an image.

    Args:
        dataset: Read are its attributes ``boxes`` and ``masks``, with one entry for each item, also through Subset,
            ConcatDataset and wrappers that keep the length. An image without an object has an empty entry, or None.
        indices: Indices of N items.
        shape: (N, C, H, W) of the items' images.

    Returns:
        The annotations of these items, or None.

    Raises:
        ConfigurationError: If boxes or masks cannot be read.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.zeros(3, 3, 8, 8))
        >>> dataset.boxes = [[0, 0, 2, 2], [1, 1, 4, 4], [2, 2, 8, 8]]
        >>> dataset_annotations(dataset, [2], (1, 3, 8, 8)).boxes
        (tensor([[2., 2., 8., 8.]]),)
    """
    boxes, masks = (_attribute_entries(dataset, name, indices) for name in ("boxes", "masks"))
    return _read(boxes, masks, shape)


def _attribute_entries(dataset: Any, name: str, indices: Sequence[int]) -> list[Any] | None:
    """An attribute's entries for some items, or None where there is no such attribute."""
    if isinstance(dataset, Subset):
        return _attribute_entries(dataset.dataset, name, [int(dataset.indices[index]) for index in indices])
    if isinstance(dataset, ConcatDataset):
        return _concatenated_entries(dataset, name, indices)
    values = getattr(dataset, name, None)
    if isinstance(values, (list, tuple, Tensor, np.ndarray)) and len(values) == len(dataset):
        return [values[index] for index in indices]
    for inner in inner_datasets(dataset):
        if len(inner) == len(dataset) and (entries := _attribute_entries(inner, name, indices)) is not None:
            return entries
    return None


def _concatenated_entries(dataset: ConcatDataset[Any], name: str, indices: Sequence[int]) -> list[Any] | None:
    ends, entries = dataset.cumulative_sizes, []
    for index in indices:
        part = bisect_right(ends, index)
        entry = _attribute_entries(dataset.datasets[part], name, [index - (ends[part - 1] if part else 0)])
        if entry is None:
            return None
        entries += entry
    return entries


def _read(boxes: Any, masks: Any, shape: Sequence[int], ignore: Any = None) -> Annotations | None:
    if boxes is None and masks is None:
        return None
    mask_shape = (shape[0], shape[2], shape[3])
    return Annotations(
        None if boxes is None else read_boxes(boxes, shape[0]),
        None if masks is None else read_masks(masks, mask_shape),
        None if ignore is None or masks is None else read_masks(ignore, mask_shape),
    )
