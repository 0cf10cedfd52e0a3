"""Choosing and reading the items of a data set that become a probe, without side effects."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from lightning_interp.checks import check_integer
from lightning_interp.data.annotations import Annotations, dataset_annotations, unpack_annotated
from lightning_interp.data.batches import as_integers, cpu_copy, unpack_batch
from lightning_interp.data.datasets import read_labels
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.model.preserve import isolate_rng

__all__ = ["Sample", "read_batch", "read_items", "spread_indices"]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Images with their targets and annotations.

    Args:
        images: (N, C, H, W) as the model takes them.
        targets: int64 (N,), or None where an image has no class.
        annotations: Boxes and masks of the objects, or None.
        untransferred: The images before the module's transfer hooks, on the CPU, or None.
    """

    images: Tensor
    targets: Tensor | None
    annotations: Annotations | None
    untransferred: Tensor | None = None


def read_items(
    dataset: Any,
    indices: Sequence[int] | None = None,
    n: int = 8,
    *,
    unpack: Callable[[Any], Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    transfer: Callable[[Any], Any] | None = None,
    annotated: bool = False,
) -> Sample:
    """Read items of a data set with fixed seeds, leaving the global random streams untouched.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        indices: Indices of the items; None for ``spread_indices(dataset, n)``.
        n: Number of items where ``indices`` is None; at most all are taken.
        unpack: From a collated batch to images or (images, targets), see ``unpack_batch``.
        collate_fn: From a list of items to a batch; None for PyTorch's default.
        transfer: From a collated batch to the batch that the model takes.
        annotated: Whether boxes and masks that cannot be read are an error; otherwise they are left out.

    Returns:
        The items.

    Raises:
        ConfigurationError: If the data set cannot be indexed or is empty, if there are no such items, or if they
            cannot be collated and unpacked.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> read_items(TensorDataset(torch.rand(6, 3, 8, 8), torch.arange(6)), n=3).targets
        tensor([0, 2, 4])
    """
    kind = type(dataset).__name__
    chosen = spread_indices(dataset, n) if indices is None else _check_indices(dataset, indices)
    untransferred: Tensor | None = None
    with _fixed_seed():
        batch = _collate([dataset[index] for index in chosen], collate_fn, kind)
        try:
            if transfer is not None:
                # The hooks may change the batch's structure, or the batch in place.
                with suppress(ConfigurationError):
                    untransferred = cpu_copy(unpack_batch(batch, unpack)[0])
                batch = transfer(batch)
            images, targets, annotations = unpack_annotated(batch, unpack, strict=annotated)
        except ConfigurationError as error:
            raise ConfigurationError(f"no probe can be made of the items of {kind}: {error}") from error
    if annotations is None:
        with suppress(*() if annotated else (ConfigurationError,)):
            annotations = dataset_annotations(dataset, chosen, images.shape)
    return Sample(images, _without_unlabelled(targets), annotations, untransferred)


def read_batch(batch: Any, n: int, unpack: Callable[[Any], Any] | None = None, annotated: bool = False) -> Sample:
    """Read the first images of a batch.

    Args:
        batch: As ``unpack_batch`` takes it.
        n: Number of images; at most all are taken.
        unpack: From the batch to images or (images, targets).
        annotated: Whether boxes and masks that cannot be read are an error; otherwise they are left out.

    Returns:
        The images, with their targets and annotations.

    Raises:
        ConfigurationError: If the batch cannot be unpacked.

    Example:
        >>> read_batch([torch.rand(16, 1, 8, 8), torch.arange(16)], 4).targets
        tensor([0, 1, 2, 3])
    """
    n = check_integer("n", n)
    images, targets, annotations = unpack_annotated(batch, unpack, strict=annotated)
    if annotations is not None:
        boxes, masks = annotations.boxes, annotations.masks
        annotations = Annotations(None if boxes is None else boxes[:n], None if masks is None else masks[:n])
    return Sample(images[:n], None if targets is None else _without_unlabelled(targets[:n]), annotations)


def spread_indices(dataset: Any, n: int = 8) -> list[int]:
    """Choose items evenly over the classes, without drawing a random number or loading an image.

    Args:
        dataset: With ``__len__`` and ``__getitem__``. Where its labels cannot be read cheaply (see
            ``read_labels``), the items are spaced evenly over its length.
        n: Number of items; at most all are chosen.

    Returns:
        Distinct indices: the first item of each class, then the second of each, and so on, classes in sorted
        order; with more classes than ``n``, classes are spaced evenly.

    Raises:
        ConfigurationError: If the data set cannot be indexed or is empty, or ``n`` is not a positive number.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_interp.data.sampling import spread_indices
        >>> spread_indices(TensorDataset(torch.rand(6, 3, 8, 8), torch.tensor([0, 0, 0, 0, 1, 1])), 4)
        [0, 4, 1, 5]
    """
    length = _length(dataset)
    n = min(check_integer("n", n), length)
    labels = read_labels(dataset)
    if labels is None:
        return _evenly(length, n)
    members: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    classes = [members[label] for label in sorted(members)]
    if len(classes) > n:
        classes = [classes[position] for position in _evenly(len(classes), n)]
    # By position within the class, then by class.
    ordered = sorted(
        (position, class_number, index)
        for class_number, items in enumerate(classes)
        for position, index in enumerate(items[:n])
    )
    return [index for _, _, index in ordered[:n]]


def _evenly(length: int, n: int) -> list[int]:
    return [position * length // n for position in range(n)]


@contextmanager
def _fixed_seed(seed: int = 0) -> Iterator[None]:
    """Seed the global random streams within the context, and restore them after it."""
    with isolate_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        yield


def _without_unlabelled(targets: Tensor | None) -> Tensor | None:
    """The targets, or None where some image is unlabelled, which data sets write as a negative class."""
    return None if targets is None or bool((targets < 0).any()) else targets


def _length(dataset: Any) -> int:
    kind = type(dataset).__name__
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if isinstance(dataset, IterableDataset) or missing:
        inner = getattr(dataset, "dataset", None)
        advice = f"Pass its data set, a {type(inner).__name__}, or a" if inner is not None else "Pass a"
        raise ConfigurationError(
            "a probe is taken from a data set with a length whose items are accessed by index; got "
            f"{kind}, {'which lacks ' + ' and '.join(missing) if missing else 'which can only be iterated'}. "
            f"{advice} Probe built from a batch: Probe(*batch[:2])"
        )
    if len(dataset) == 0:
        raise ConfigurationError(f"a probe needs at least one image, got an empty {kind}")
    return len(dataset)


def _check_indices(dataset: Any, indices: Any) -> list[int]:
    length = _length(dataset)
    chosen = as_integers(indices, "indices")
    if not chosen:
        raise ConfigurationError("indices must name at least one item, got none; leave it out for an even choice")
    if invalid := [index for index in chosen if not 0 <= index < length]:
        raise ConfigurationError(
            f"indices must lie within 0 and {length - 1} for this {type(dataset).__name__} of {length} "
            f"items, got {', '.join(map(str, invalid))}"
        )
    return chosen


def _collate(items: list[Any], collate_fn: Callable[[list[Any]], Any] | None, kind: str) -> Any:
    try:
        return default_collate(items) if collate_fn is None else collate_fn(items)
    except Exception as error:
        kinds = list(dict.fromkeys(describe(item) for item in items))
        raise ConfigurationError(
            f"the items of {kind} cannot be collated into a batch: {'; '.join(kinds)} "
            f"({type(error).__name__}: {error}). Give the data set a transform that ends in tensors of one "
            "size (Resize), pass collate_fn=, or pass a Probe built from images of one size"
        ) from error
