"""What batches hold, and what data sets say about themselves without loading an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_interp.errors import ConfigurationError, describe

__all__ = [
    "apply_unpack",
    "as_images",
    "describe",
    "read_class_names",
    "read_labels",
    "read_normalization",
    "unpack_batch",
    "wrapped",
]

IMAGE_NAMES = ("image", "images", "img", "imgs", "pixel_values", "x", "input", "inputs", "data")
TARGET_NAMES = ("label", "labels", "target", "targets", "y", "class", "classes", "category", "cls")


def unpack_batch(batch: Any, unpack: Callable[[Any], Any] | None = None) -> tuple[Tensor, Tensor | None]:
    """Find the images and the class labels in a batch.

    Args:
        batch: A tensor, ``(x, y)``, ``[x, y]``, a mapping such as ``{"image": ..., "label": ...}`` or an
            object with such attributes (the case of names does not matter). Of more than two positions the
            second holds the targets; of several views the first is taken. A list of (C, H, W) tensors of
            one size is stacked.
        unpack: Takes the batch and gives the images, ``(images, targets)`` or any other batch named above,
            where the batch is none of them itself.

    Returns:
        The images, (N, C, H, W) floating; integers become float32 with their values unchanged, so that a
        model that scales them itself does so as before. The targets, int64 (N,), or None where the batch
        names no single class for each image (no labels, several labels, numbers to be regressed). One-hot
        and soft labels give their largest class; of nested targets, the first with one integer for each
        image.

    Raises:
        ConfigurationError: If there are no images, if they are not (N, C, H, W), or if ``unpack`` fails.

    Example:
        >>> import torch
        >>> from lightning_interp.data.batches import unpack_batch
        >>> images, targets = unpack_batch({"image": torch.zeros(2, 3, 8, 8), "label": torch.tensor([4, 1])})
        >>> images.shape, targets
        (torch.Size([2, 3, 8, 8]), tensor([4, 1]))
    """
    found = apply_unpack(batch, unpack)
    source = "the batch" if unpack is None else "what unpack= gave"
    images, targets = _split(found)
    if images is None:
        raise ConfigurationError(
            f"found no images in {source}: expected a tensor (N, C, H, W), (images, targets) or one of the "
            f"keys or attributes {', '.join(IMAGE_NAMES)}; got {describe(found)}. Pass unpack=, a function "
            "from the batch to images or (images, targets)"
        )
    checked = as_images(images, f"the images in {source}, {describe(found)},")
    return checked, _read_targets(targets, len(checked))


def apply_unpack(batch: Any, unpack: Callable[[Any], Any] | None) -> Any:
    """Run a user's ``unpack`` on a batch.

    Args:
        batch: The batch.
        unpack: What takes it apart; None leaves it as it is.

    Returns:
        What it gave.

    Raises:
        ConfigurationError: If it fails.

    Example:
        >>> apply_unpack((1, 2, 3), lambda batch: batch[:2])
        (1, 2)
    """
    if unpack is None:
        return batch
    try:
        return unpack(batch)
    except Exception as error:
        raise ConfigurationError(
            f"unpack= failed on the batch {describe(batch)}: {type(error).__name__}: {error}. It takes "
            "the collated batch and gives images (N, C, H, W) or (images, targets)"
        ) from error


def as_images(value: Any, what: str = "images") -> Tensor:
    """Check that something is a batch of images.

    Args:
        value: (N, C, H, W) of numbers, or a list of N tensors (C, H, W) of one size.
        what: How an error calls it.

    Returns:
        (N, C, H, W) floating, a plain tensor on the same device; integers become float32, values unchanged.

    Raises:
        ConfigurationError: If it is anything else.

    Example:
        >>> import torch
        >>> from lightning_interp.data.batches import as_images
        >>> as_images(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).max()
        tensor(255.)
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        sizes = sorted({tuple(item.shape) for item in value})
        if len(sizes) > 1:
            raise ConfigurationError(
                f"{what} must have one size to be looked at together, got {', '.join(map(str, sizes))}. "
                "Resize them in the data set's transform, or pass a Probe built from images of one size"
            )
        value = torch.stack(list(value))
    if not isinstance(value, Tensor):
        raise ConfigurationError(f"{what} must be a tensor (N, C, H, W), got {describe(value)}")
    if value.ndim == 3:
        raise ConfigurationError(
            f"{what} must be (N, C, H, W), got {tuple(value.shape)}. Pass images[None] for a single image "
            "(C, H, W), images[:, None] for grey images (N, H, W)"
        )
    if value.ndim != 4 or value.is_complex():
        raise ConfigurationError(f"{what} must be real numbers (N, C, H, W), got {describe(value)}")
    if value.numel() == 0:
        raise ConfigurationError(
            f"{what} must hold at least one image with at least one pixel, got {tuple(value.shape)}"
        )
    # Subclasses such as torchvision's Image bring dispatch of their own, which explaining has no use for.
    plain = value.as_subclass(Tensor)
    return plain if plain.is_floating_point() else plain.to(torch.float32)


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
        >>> from lightning_interp.data.batches import read_labels
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
        dataset: A data set; Subset, ConcatDataset (its first) and other wrappers are looked through.

    Returns:
        A name for each class (the first of several synonyms, as ImageNet has them), or None.

    Example:
        >>> from types import SimpleNamespace
        >>> from lightning_interp.data.batches import read_class_names
        >>> read_class_names(SimpleNamespace(classes=["cat", "dog"]))
        ('cat', 'dog')
    """
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, (list, tuple)) and classes:
        names = [name[0] if isinstance(name, (list, tuple)) and name else name for name in classes]
        if all(isinstance(name, str) for name in names):
            return tuple(names)
    return next((found for inner in wrapped(dataset) if (found := read_class_names(inner))), None)


def read_normalization(dataset: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Find the ``Normalize`` in a data set's transforms.

    Args:
        dataset: A data set with ``transform`` or ``transforms`` (torchvision's of either version, or any
            with a Normalize that has ``mean`` and ``std``); wrappers are looked through.

    Returns:
        The mean and the standard deviation of each channel, or None.

    Example:
        >>> from types import SimpleNamespace
        >>> from torchvision.transforms import Compose, Normalize, ToTensor
        >>> from lightning_interp.data.batches import read_normalization
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
    return next((found for inner in wrapped(dataset) if (found := read_normalization(inner))), None)


def _label_candidates(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, TensorDataset):
        yield from dataset.tensors[1:]
    for name in ("targets", "labels", "_labels", "y"):
        yield getattr(dataset, name, None)
    for name in ("samples", "imgs", "_samples"):
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, (list, tuple)) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            yield [label for _, label in pairs]
    for inner in wrapped(dataset):
        yield read_labels(inner)


def wrapped(dataset: Any) -> Sequence[Any]:
    """Find the data sets within a data set.

    Args:
        dataset: Any.

    Returns:
        Those of a ConcatDataset, the one of a Subset or of another wrapper, or none.

    Example:
        >>> from torch.utils.data import Subset
        >>> wrapped(Subset([4, 5, 6], [0]))
        [[4, 5, 6]]
    """
    if isinstance(dataset, ConcatDataset):
        return list(dataset.datasets)
    inner = getattr(dataset, "dataset", None)
    # Other objects keep the *name* of their data under this attribute.
    return [inner] if isinstance(inner, Dataset) or isinstance(dataset, Subset) else []


def _transforms(holder: Any, depth: int = 8) -> Iterator[Any]:
    """All transforms that an object holds; the depth ends objects that claim to hold themselves."""
    held = [getattr(holder, name, None) for name in ("transform", "transforms")]
    if isinstance(holder, torch.nn.Module):
        held += holder.children()
    for inner in held:
        for transform in inner if isinstance(inner, (list, tuple)) else [inner]:
            if transform is not None and depth:
                yield transform
                yield from _transforms(transform, depth - 1)


def _as_labels(value: Any) -> list[Any] | None:
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist() if value.ndim == 1 else None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    labels = [item.item() if isinstance(item, (Tensor, np.generic)) and item.ndim == 0 else item for item in value]
    whole, named = (all(isinstance(label, kind) for label in labels) for kind in (int, str))
    return labels if whole or named else None


def _named(value: Any) -> dict[str, Any]:
    """What a batch calls by one of the known names, in lower case."""
    if isinstance(value, Mapping):
        return {str(key).lower(): item for key, item in value.items()}
    if isinstance(value, (Tensor, np.ndarray, str, bytes)):
        return {}
    if isinstance(value, (list, tuple)):
        fields = getattr(value, "_fields", ())
    else:
        fields = [name for name in dir(value) if not name.startswith("_")]
    known = {name: name.lower() for name in fields if name.lower() in IMAGE_NAMES + TARGET_NAMES}
    return {lower: getattr(value, name) for name, lower in known.items()}


def _split(batch: Any) -> tuple[Any, Any]:
    """The images as they stand in the batch (None: nowhere), and what may hold the targets."""
    if isinstance(batch, Tensor) or _is_image_list(batch):
        return batch, None
    named = _named(batch)
    for name in IMAGE_NAMES:
        value = named.get(name)
        if isinstance(value, Tensor) or _is_image_list(value, 1):
            return value, {key: item for key, item in named.items() if key in TARGET_NAMES}
    if isinstance(batch, (list, tuple)) and batch:
        images, inner = (batch[0], None) if _is_image_list(batch[0], 1) else _split(batch[0])
        return images, batch[1] if len(batch) > 1 else inner
    return None, None


def _is_image_list(value: Any, at_least: int = 2) -> bool:
    # At the top, a list of one 3-D tensor is more likely a data set of grey images (N, H, W) without labels.
    return (
        isinstance(value, (list, tuple))
        and len(value) >= at_least
        and all(isinstance(item, Tensor) and item.ndim == 3 for item in value)
    )


def _read_targets(value: Any, n: int) -> Tensor | None:
    if isinstance(value, Tensor):
        return _class_indices(value.detach().as_subclass(Tensor), n)
    if isinstance(value, (list, tuple)) and len(value) == n:
        if all(isinstance(item, int) for item in value):
            return torch.tensor(value, dtype=torch.int64, device="cpu")
        if all(isinstance(item, Tensor) and item.ndim == 0 for item in value):
            return _class_indices(torch.stack(list(value)), n)
        # One annotation for each image, as detectors have them: their labels are those of boxes.
        if all(isinstance(item, Mapping) for item in value):
            return None
    named = _named(value) if value is not None else {}
    nested = [named[name] for name in TARGET_NAMES if name in named]
    if not nested and isinstance(value, (list, tuple)):
        nested = list(value)
    return next((targets for item in nested if (targets := _read_targets(item, n)) is not None), None)


def _class_indices(targets: Tensor, n: int) -> Tensor | None:
    whole = not targets.is_floating_point() and not targets.is_complex()
    if whole and targets.shape in ((n,), (n, 1)):
        return targets.reshape(n).to(torch.int64)
    if targets.ndim == 2 and len(targets) == n and targets.shape[1] > 1 and not targets.is_complex():
        shares = targets.to(torch.float32)
        # Half precision leaves sums of soft labels a little off 1.
        if bool((shares >= 0).all() & ((shares.sum(1) - 1).abs() < 1e-2).all()):
            return shares.argmax(1)
    return None
