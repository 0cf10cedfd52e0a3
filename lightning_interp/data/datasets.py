"""Class labels, class names and normalisation of data sets, read without loading an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

__all__ = ["inner_datasets", "read_class_names", "read_labels", "read_normalization"]


def read_labels(dataset: Any) -> list[Any] | None:
    """Read a data set's class labels where that needs no image to be loaded.

    Args:
        dataset: Read are the attributes ``targets``, ``labels``, ``_labels``, ``y``, the pairs in
            ``samples``, ``imgs``, ``_samples``, a TensorDataset's labels, and all of these through Subset,
            ConcatDataset and wrappers that keep the length.

    Returns:
        A label for each item, all int or all str, or None where there are none.

    Example:
        >>> import torch
        >>> from torch.utils.data import Subset, TensorDataset
        >>> from lightning_interp.data.datasets import read_labels
        >>> read_labels(Subset(TensorDataset(torch.zeros(3, 1, 4, 4), torch.tensor([5, 6, 7])), [2, 0]))
        [7, 5]
    """
    if isinstance(dataset, Subset):
        labels = read_labels(dataset.dataset)
        return None if labels is None else [labels[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [read_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return _as_labels([label for part in known for label in part]) if len(known) == len(parts) else None
    for candidate in _label_candidates(dataset):
        labels = _as_labels(candidate)
        if labels is not None and len(labels) == len(dataset):
            return labels
    return None


def read_class_names(dataset: Any) -> tuple[str, ...] | None:
    """Read the names of a data set's classes from its ``classes``.

    Args:
        dataset: A data set; Subset, ConcatDataset (its first) and other wrappers are searched too.

    Returns:
        A name for each class (the first of several synonyms, as ImageNet has them), or None.

    Example:
        >>> from types import SimpleNamespace
        >>> from lightning_interp.data.datasets import read_class_names
        >>> read_class_names(SimpleNamespace(classes=["cat", "dog"]))
        ('cat', 'dog')
    """
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, (list, tuple)) and classes:
        names = [name[0] if isinstance(name, (list, tuple)) and name else name for name in classes]
        if all(isinstance(name, str) for name in names):
            return tuple(names)
    for inner in inner_datasets(dataset):
        if (inner_names := read_class_names(inner)) is not None:
            return inner_names
    return None


def read_normalization(dataset: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Find the ``Normalize`` in a data set's transforms.

    Args:
        dataset: A data set with ``transform`` or ``transforms`` (torchvision's of either version, or any
            with a Normalize that has ``mean`` and ``std``); wrappers are searched too.

    Returns:
        The mean and the standard deviation of each channel, or None.

    Example:
        >>> from types import SimpleNamespace
        >>> from torchvision.transforms import Compose, Normalize, ToTensor
        >>> from lightning_interp.data.datasets import read_normalization
        >>> read_normalization(SimpleNamespace(transform=Compose([ToTensor(), Normalize([0.5], [0.25])])))
        ((0.5,), (0.25,))
    """
    for transform in _transforms(dataset):
        # torchvision's presets (weights.transforms()) normalise by a function, within one object.
        if type(transform).__name__ in ("Normalize", "ImageClassification"):
            try:
                mean = tuple(float(value) for value in transform.mean)
                std = tuple(float(value) for value in transform.std)
            except (AttributeError, TypeError, ValueError):
                continue
            if len(mean) == len(std) and all(std):
                return mean, std
    for inner in inner_datasets(dataset):
        if (normalization := read_normalization(inner)) is not None:
            return normalization
    return None


def inner_datasets(dataset: Any) -> Sequence[Any]:
    """Return the data sets that a data set wraps.

    Args:
        dataset: Any data set.

    Returns:
        Those of a ConcatDataset, the one of a Subset or of another wrapper, or none.

    Example:
        >>> from torch.utils.data import Subset
        >>> inner_datasets(Subset([4, 5, 6], [0]))
        [[4, 5, 6]]
    """
    if isinstance(dataset, ConcatDataset):
        return list(dataset.datasets)
    inner = getattr(dataset, "dataset", None)
    # Other objects keep the *name* of their data under this attribute.
    return [inner] if isinstance(inner, Dataset) or isinstance(dataset, Subset) else []


def _label_candidates(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, TensorDataset):
        yield from dataset.tensors[1:]
    for name in ("targets", "labels", "_labels", "y"):
        yield getattr(dataset, name, None)
    for name in ("samples", "imgs", "_samples"):
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, (list, tuple)) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            yield [label for _, label in pairs]
    for inner in inner_datasets(dataset):
        yield read_labels(inner)


def _transforms(holder: Any, depth: int = 8) -> Iterator[Any]:
    """All transforms within an object; the depth bounds objects that return themselves for any attribute."""
    values = [getattr(holder, name, None) for name in ("transform", "transforms")]
    if isinstance(holder, torch.nn.Module):
        values += holder.children()
    for value in values:
        for transform in value if isinstance(value, (list, tuple)) else [value]:
            if transform is not None and depth:
                yield transform
                yield from _transforms(transform, depth - 1)


def _as_labels(value: Any) -> list[Any] | None:
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist() if value.ndim == 1 else None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    labels = [item.item() if isinstance(item, (Tensor, np.generic)) and item.ndim == 0 else item for item in value]
    are_integers, are_names = (all(isinstance(label, kind) for label in labels) for kind in (int, str))
    return labels if are_integers or are_names else None
