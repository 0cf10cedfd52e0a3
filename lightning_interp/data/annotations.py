"""Where the objects are: the boxes and masks that batches and data sets hold."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from lightning_interp.data.batches import apply_unpack, unpack_batch, wrapped
from lightning_interp.errors import ConfigurationError, describe

__all__ = ["Annotations", "dataset_annotations", "unpack_annotated"]


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """Where the objects are in N images.

    Args:
        boxes: N tensors (M, 4), x1, y1, x2, y2 in the images' pixels, M = 0 where an image has none; or None.
        masks: (N, H, W) bool, or None.
        ignore: Pixels that count neither as object nor as background, (N, H, W) bool, or None.

    Example:
        >>> Annotations((torch.tensor([[1, 2, 5, 6]]),)).masks is None
        True
    """

    boxes: tuple[Tensor, ...] | None = None
    masks: Tensor | None = None
    ignore: Tensor | None = None


def unpack_annotated(
    batch: Any, unpack: Callable[[Any], Any] | None = None
) -> tuple[Tensor, Tensor | None, Annotations | None]:
    """Find the images, the class labels and where the objects are in a batch.

    Args:
        batch: As ``unpack_batch`` takes it. Boxes and masks are read where it is a mapping with ``"boxes"`` or
            ``"masks"`` (and ``"ignore"`` beside these), or where its second part, the targets, is one.
        unpack: From the batch to any such thing.

    Returns:
        The images (N, C, H, W), the targets (N,) or None, and what is said of the objects, or None.

    Raises:
        ConfigurationError: If there are no images, or boxes or masks cannot be read.

    Example:
        >>> batch = {"images": torch.zeros(1, 3, 8, 8), "boxes": torch.tensor([[0, 0, 4, 4]])}
        >>> unpack_annotated(batch)[2].boxes
        (tensor([[0., 0., 4., 4.]]),)
    """
    found = apply_unpack(batch, unpack)
    images, targets = unpack_batch(batch, None if unpack is None else lambda _: found)
    said: dict[str, Any] = {}
    second = found[1] if isinstance(found, (list, tuple)) and len(found) > 1 else None
    for part in (second, found):
        if isinstance(part, Mapping):
            said |= {str(name).lower(): value for name, value in part.items()}
    return images, targets, _annotations(said.get("boxes"), said.get("masks"), images.shape, said.get("ignore"))


def dataset_annotations(dataset: Any, indices: Sequence[int], shape: Sequence[int]) -> Annotations | None:
    """Read what a data set itself says about where the objects in its items are.

    Args:
        dataset: Read are its attributes ``boxes`` and ``masks``, with one entry for each item, also through Subset,
            ConcatDataset and wrappers that keep the length. An image without an object has an entry of no box, or None.
        indices: Which N items.
        shape: (N, C, H, W) of the items' images.

    Returns:
        What is said, or None.

    Raises:
        ConfigurationError: If boxes or masks cannot be read.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.zeros(3, 3, 8, 8))
        >>> dataset.boxes = [[0, 0, 2, 2], [1, 1, 4, 4], [2, 2, 8, 8]]
        >>> dataset_annotations(dataset, [2], (1, 3, 8, 8)).boxes
        (tensor([[2., 2., 8., 8.]]),)
    """
    boxes, masks = (_entries(dataset, name, indices) for name in ("boxes", "masks"))
    return _annotations(boxes, masks, shape)


def _entries(dataset: Any, name: str, indices: Sequence[int]) -> list[Any] | None:
    """An attribute's entries for some items, or None where there is no such attribute."""
    if isinstance(dataset, Subset):
        return _entries(dataset.dataset, name, [int(dataset.indices[index]) for index in indices])
    if isinstance(dataset, ConcatDataset):
        ends = dataset.cumulative_sizes
        places = [(bisect_right(ends, index), index) for index in indices]
        parts = [_entries(dataset.datasets[part], name, [i - (ends[part - 1] if part else 0)]) for part, i in places]
        known = [part for part in parts if part is not None]
        return [entry for part in known for entry in part] if len(known) == len(parts) else None
    values = getattr(dataset, name, None)
    if isinstance(values, (list, tuple, Tensor, np.ndarray)) and len(values) == len(dataset):
        return [values[index] for index in indices]
    inner = [each for each in wrapped(dataset) if len(each) == len(dataset)]
    return next((found for each in inner if (found := _entries(each, name, indices)) is not None), None)


def _annotations(boxes: Any, masks: Any, shape: Sequence[int], ignore: Any = None) -> Annotations | None:
    if boxes is None and masks is None:
        return None
    pixels = (shape[0], shape[2], shape[3])
    return Annotations(
        None if boxes is None else _read_boxes(boxes, shape[0]),
        None if masks is None else _read_masks(masks, pixels),
        None if ignore is None or masks is None else _read_masks(ignore, pixels),
    )


def _read_boxes(value: Any, n: int) -> tuple[Tensor, ...]:
    if not isinstance(value, (list, tuple, Tensor, np.ndarray)) or len(value) != n:
        raise ConfigurationError(f"{_expected_boxes(n)}; got {describe(value)}")
    return tuple(_box_rows(each, n) for each in value)


def _box_rows(value: Any, n: int) -> Tensor:
    """One image's boxes, (M, 4) on the CPU."""
    try:
        rows = torch.as_tensor([] if value is None else value).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{_expected_boxes(n)}; got {describe(value)} for an image") from error
    rows = rows.reshape(0, 4) if rows.numel() == 0 else rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise ConfigurationError(f"{_expected_boxes(n)}; got {describe(value)} for an image")
    return rows.as_subclass(Tensor).clone()


def _expected_boxes(n: int) -> str:
    return (
        "boxes are (x1, y1, x2, y2) in pixels of the images as the model gets them, a tensor (N, 4) or a list of "
        f"tensors (M, 4), one entry for each of the {n} images"
    )


def _read_masks(value: Any, shape: tuple[int, int, int]) -> Tensor:
    stacked = value
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, (Tensor, np.ndarray)) for each in value):
        sizes = {tuple(each.shape) for each in value}
        stacked = torch.stack([torch.as_tensor(each) for each in value]) if len(sizes) == 1 else value
    if isinstance(stacked, np.ndarray):
        stacked = torch.from_numpy(stacked)
    if isinstance(stacked, Tensor) and stacked.ndim == 4 and stacked.shape[1] == 1:
        stacked = stacked[:, 0]
    known = isinstance(stacked, Tensor) and stacked.dtype in (torch.bool, torch.uint8)
    if not isinstance(stacked, Tensor) or not known or tuple(stacked.shape) != shape:
        raise ConfigurationError(
            f"masks are bool or uint8 (0 outside the object), (N, H, W) = {shape} like the images as the model gets "
            f"them; got {describe(value)}. Resize them as the images were resized"
        )
    return stacked.detach().as_subclass(Tensor) > 0
