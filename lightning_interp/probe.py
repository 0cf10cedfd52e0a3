"""On what: the fixed images that are looked at again and again, and how they show themselves."""

from __future__ import annotations

import copy
import math
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from lightning_interp.annotations import Annotations, dataset_annotations, unpack_annotated
from lightning_interp.batches import (
    as_images,
    read_class_names,
    read_labels,
    read_normalization,
    unpack_batch,
)
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.guard import preserved_streams

__all__ = ["Probe", "spread_indices"]

ClassNames = Sequence[str] | Mapping[int, str]


@dataclass(frozen=True, slots=True, eq=False, init=False, repr=False)
class Probe:
    """Images that stay the same for the whole run, with all that is known about them.

    It owns copies of its tensors, on the CPU; its attributes cannot be set. Two probes are equal only if
    they are one and the same.

    Args:
        images: (N, C, H, W) as the model takes them, N at least 1; integers become float32, values unchanged.
            NaN and infinities are kept, and shown as 0.
        targets: The class of each image, int64 (N,) or a list of N ints; None where unknown.
        boxes: Where the objects are, in pixels (x1, y1, x2, y2): (N, 4), or a list of N tensors (M, 4).
        masks: Which pixels belong to the objects, (N, H, W) bool.
        class_names: The name of each class, in order, or a mapping from class to name.
        mean: What was subtracted from each channel: C numbers, or one for all. A mean above 1 says that the
            pixels reached to 255 rather than to 1.
        std: What each channel was then divided by: as many numbers.

    Attributes:
        images: (N, C, H, W) floating.
        targets: int64 (N,), or None.
        boxes: N tensors (M, 4) float32, or None.
        masks: (N, H, W) bool, or None.
        class_names: From class to name, or None.
        mean: C numbers, or None.
        std: C numbers, or None.

    Raises:
        ConfigurationError: If anything has another shape, length, type or range.

    Example:
        >>> import torch
        >>> from lightning_interp.probe import Probe
        >>> probe = Probe(torch.rand(2, 3, 8, 8), [1, 0], class_names=["cat", "dog"])
        >>> len(probe), probe.class_name(1), probe.to_display().shape
        (2, 'dog', torch.Size([2, 8, 8, 3]))
    """

    images: Tensor
    targets: Tensor | None
    boxes: tuple[Tensor, ...] | None
    masks: Tensor | None
    class_names: Mapping[int, str] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    # The value that is shown as white, None where each image is stretched to its own range: judged on all
    # images, so that a subset is shown as the whole is.
    _white: float | None
    # Pictures (N, H, W, 3) uint8 to be shown instead of the images.
    _pictures: Tensor | None

    def __init__(
        self,
        images: Tensor,
        targets: Tensor | Sequence[int] | None = None,
        *,
        boxes: Tensor | Sequence[Tensor] | None = None,
        masks: Tensor | None = None,
        class_names: ClassNames | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        owned = _owned(as_images(images))
        n, channels, height, width = owned.shape
        values = {
            "images": owned,
            "targets": None if targets is None else _check_targets(targets, n),
            "boxes": None if boxes is None else _check_boxes(boxes, n),
            "masks": None if masks is None else _check_masks(masks, (n, height, width)),
            "class_names": None if class_names is None else _check_names(class_names),
            **_check_normalization(mean, std, channels),
            "_white": _white_level(owned),
            "_pictures": None,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset[Any] | Sequence[Any],
        indices: Sequence[int] | None = None,
        n: int = 8,
        *,
        unpack: Callable[[Any], Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        transfer: Callable[[Any], Any] | None = None,
        class_names: ClassNames | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        annotated: bool = False,
    ) -> Probe:
        """Take images from a data set, the same ones each time, leaving the global random streams untouched.

        Random transforms draw from a fixed seed. Class names and normalisation are the data set's own where
        they are not given. Boxes and masks come along where the batch is a mapping that has them, or else where
        the data set has attributes ``boxes`` and ``masks`` with an entry for each item.

        Args:
            dataset: With ``__len__`` and ``__getitem__``.
            indices: Which items; None for ``spread_indices(dataset, n)``.
            n: How many, where ``indices`` is None; at most all are taken.
            unpack: From a collated batch to images or (images, targets), see ``unpack_batch``.
            collate_fn: From a list of items to a batch; None for PyTorch's default.
            transfer: From a collated batch to the batch that the model is given (a Lightning module's
                transfer hooks). Where it scales and shifts channels (normalisation on the device), the images
                are shown as they were before.
            class_names: As for ``Probe``.
            mean: As for ``Probe``, of the images after ``transfer``.
            std: As for ``Probe``, of the images after ``transfer``.
            annotated: Whether boxes and masks that cannot be read are an error; otherwise they are left out.

        Returns:
            The probe, on the CPU.

        Raises:
            ConfigurationError: If the data set cannot be indexed or is empty, if there are no such items, or
                if they cannot be collated and unpacked.

        Example:
            >>> import torch
            >>> from torch.utils.data import TensorDataset
            >>> from lightning_interp.probe import Probe
            >>> dataset = TensorDataset(torch.rand(6, 3, 8, 8), torch.tensor([0, 0, 0, 0, 1, 2]))
            >>> Probe.from_dataset(dataset, n=3).targets
            tensor([0, 1, 2])
        """
        source: Any = dataset
        kind = type(source).__name__
        chosen = spread_indices(source, n) if indices is None else _check_indices(source, indices)
        before: Tensor | None = None
        with _fixed_random_streams():
            batch = _collate([source[index] for index in chosen], collate_fn, kind)
            try:
                if transfer is not None:
                    # The hooks may change the batch into a form of its own, or in place.
                    with suppress(ConfigurationError):
                        before = _owned(unpack_batch(batch, unpack)[0])
                    batch = transfer(batch)
                images, targets, found = _unpacked(batch, unpack, annotated)
            except ConfigurationError as error:
                raise ConfigurationError(f"no probe can be made of the items of {kind}: {error}") from error
        if found is None:
            with suppress(*() if annotated else (ConfigurationError,)):
                found = dataset_annotations(source, chosen, images.shape)
        given = mean is not None or std is not None
        if not given and (numbers := read_normalization(source)) is not None:
            # The hooks may have changed the channels, so what was found need not fit.
            mean, std = numbers if len(numbers[0]) in (1, images.shape[1]) else (None, None)
        if class_names is None:
            class_names = read_class_names(source)
        known: dict[str, Any] = {"class_names": class_names, "mean": mean, "std": std}
        probe = cls._annotated(images, _labelled(targets), found, annotated, **known)
        # Given numbers undo what the hooks did; found ones undo what was done before them.
        return probe if given or before is None else probe._shown_as(before)

    @classmethod
    def from_batch(
        cls,
        batch: Any,
        *,
        n: int = 8,
        unpack: Callable[[Any], Any] | None = None,
        class_names: ClassNames | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        annotated: bool = False,
    ) -> Probe:
        """Copy the first images of a batch that passes by.

        Args:
            batch: As ``unpack_batch`` takes it, on any device.
            n: How many; at most all are taken.
            unpack: From the batch to images or (images, targets).
            class_names: As for ``Probe``.
            mean: As for ``Probe``.
            std: As for ``Probe``.
            annotated: Whether boxes and masks that cannot be read are an error; otherwise they are left out.

        Returns:
            The probe, on the CPU.

        Raises:
            ConfigurationError: If the batch cannot be unpacked.

        Example:
            >>> import torch
            >>> from lightning_interp.probe import Probe
            >>> len(Probe.from_batch([torch.rand(16, 1, 8, 8), torch.arange(16)], n=4))
            4
        """
        n = _check_count(n)
        images, targets, found = _unpacked(batch, unpack, annotated)
        labels = None if targets is None else _labelled(targets[:n])
        if found is not None:
            boxes, masks = found.boxes, found.masks
            found = Annotations(None if boxes is None else boxes[:n], None if masks is None else masks[:n])
        return cls._annotated(images[:n], labels, found, annotated, class_names=class_names, mean=mean, std=std)

    @classmethod
    def _annotated(
        cls, images: Tensor, labels: Tensor | None, found: Annotations | None, strict: bool, **known: Any
    ) -> Probe:
        """A probe with boxes and masks, or without where these are wrong and that is no error."""
        if found is None:
            return cls(images, labels, **known)
        try:
            return cls(images, labels, boxes=found.boxes, masks=found.masks, **known)
        except ConfigurationError:
            if strict:
                raise
            return cls(images, labels, **known)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        known = [name for name in ("targets", "boxes", "masks", "class_names") if getattr(self, name) is not None]
        size = " x ".join(str(length) for length in self.images.shape)
        return f"Probe({size}{''.join(f', {name}' for name in known)})"

    def class_name(self, index: int) -> str:
        """Name a class.

        Args:
            index: The class.

        Returns:
            Its name, or its number where it has none.

        Example:
            >>> import torch
            >>> from lightning_interp.probe import Probe
            >>> Probe(torch.rand(1, 3, 8, 8), class_names={3: "dog"}).class_name(4)
            '4'
        """
        return (self.class_names or {}).get(int(index), str(int(index)))

    def subset(self, indices: Sequence[int] | Tensor | slice) -> Probe:
        """Take some of the images along with all that is known about them.

        Args:
            indices: Positions in this probe, in the order wanted, or a slice. An empty choice is allowed: of
                a few images, a rank's share may be none.

        Returns:
            A probe of these, shown exactly as they are shown here.

        Raises:
            ConfigurationError: If there is no such position.

        Example:
            >>> import torch
            >>> from lightning_interp.probe import Probe
            >>> Probe(torch.rand(4, 3, 8, 8), [5, 6, 7, 8]).subset([3, 0]).targets
            tensor([8, 5])
        """
        everything = range(len(self))
        if isinstance(indices, slice):
            chosen = list(everything[indices])
        else:
            chosen = _whole_numbers(indices, "indices")
            if wrong := [index for index in chosen if not -len(self) <= index < len(self)]:
                raise ConfigurationError(f"a probe of {len(self)} images has no image {wrong[0]}")
            chosen = [everything[index] for index in chosen]
        part = copy.copy(self)
        # Within Lightning's validation, plain indexing would give tensors that no gradient can pass.
        with torch.inference_mode(False):
            rows = torch.tensor(chosen, dtype=torch.int64, device="cpu")
            for name in ("images", "targets", "masks", "_pictures"):
                value = getattr(self, name)
                object.__setattr__(part, name, None if value is None else value[rows])
        if self.boxes is not None:
            object.__setattr__(part, "boxes", tuple(self.boxes[index] for index in chosen))
        return part

    def to_display(self) -> Tensor:
        """Turn the images back into pictures.

        With ``mean`` and ``std`` known, ``images * std + mean`` is shown. Without, values within [0, 1] are
        shown as they are, whole numbers within [0, 255] are divided by 255, and of anything else each image
        is stretched from its smallest to its largest value. One channel is shown as grey, two as the grey of
        their mean, of more than three the first three as red, green and blue. NaN and infinities become 0.

        Returns:
            (N, H, W, 3) uint8 on the CPU.

        Example:
            >>> import torch
            >>> from lightning_interp.probe import Probe
            >>> probe = Probe(torch.zeros(1, 3, 2, 2), mean=[1.0, 0.4, 0.0], std=[0.2, 0.2, 0.2])
            >>> probe.to_display()[0, 0, 0]
            tensor([255, 102,   0], dtype=torch.uint8)
        """
        if self._pictures is not None:
            return self._pictures.clone()
        return _display(self.images, self._white, self.mean, self.std)

    def _shown_as(self, before: Tensor) -> Probe:
        """Show the images as they were before their channels were scaled; self if more or less was done."""
        same_size = len(before) == len(self) and before.shape[2:] == self.images.shape[2:]
        if not same_size or (before.shape == self.images.shape and torch.equal(before, self.images.to(before))):
            return self
        fits = self.mean is not None and len(self.mean) == before.shape[1]
        mean, std = (self.mean, self.std) if fits else (None, None)
        white = _white_level(before)
        if (mean is None and white is None) or not _aligned(before, self.images):
            return self
        shown = copy.copy(self)
        object.__setattr__(shown, "_pictures", _display(before, white, mean, std))
        return shown


def spread_indices(dataset: Any, n: int = 8) -> list[int]:
    """Choose items evenly over the classes, without drawing a random number or loading an image.

    Args:
        dataset: With ``__len__`` and ``__getitem__``. Where its labels cannot be read cheaply (see
            ``read_labels``), the items are spaced evenly over its length.
        n: How many; at most all are chosen.

    Returns:
        Distinct indices. The first of each class come first, then the second of each, classes in sorted
        order; with more classes than ``n``, classes are spaced evenly.

    Raises:
        ConfigurationError: If the data set cannot be indexed or is empty, or ``n`` is not a positive number.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_interp.probe import spread_indices
        >>> spread_indices(TensorDataset(torch.rand(6, 3, 8, 8), torch.tensor([0, 0, 0, 0, 1, 1])), 4)
        [0, 4, 1, 5]
    """
    length = _length(dataset)
    n = min(_check_count(n), length)
    labels = read_labels(dataset)
    if labels is None:
        return _evenly(length, n)
    members: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    classes = [members[label] for label in sorted(members)]
    if len(classes) > n:
        classes = [classes[position] for position in _evenly(len(classes), n)]
    # By place within the class, then by class: one round after the other.
    rounds = sorted((place, rank, index) for rank, own in enumerate(classes) for place, index in enumerate(own[:n]))
    return [index for _, _, index in rounds[:n]]


def _evenly(length: int, n: int) -> list[int]:
    return [position * length // n for position in range(n)]


@contextmanager
def _fixed_random_streams(seed: int = 0) -> Iterator[None]:
    """Let the global random streams start at a seed within, and go on after as if nothing had been drawn."""
    with preserved_streams():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        yield


def _owned(tensor: Tensor) -> Tensor:
    """A copy on the CPU, free of any graph and usable with gradients even if made under inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().as_subclass(Tensor).to("cpu", copy=True).contiguous()


def _unpacked(
    batch: Any, unpack: Callable[[Any], Any] | None, strict: bool
) -> tuple[Tensor, Tensor | None, Annotations | None]:
    """Boxes and masks that cannot be read are an error only where they are asked for."""
    try:
        return unpack_annotated(batch, unpack)
    except ConfigurationError:
        if strict:
            raise
        return *unpack_batch(batch, unpack), None


def _labelled(targets: Tensor | None) -> Tensor | None:
    """The targets, or None where some image is unlabelled, which data sets write as a negative class."""
    return None if targets is None or bool((targets < 0).any()) else targets


def _length(dataset: Any) -> int:
    kind = type(dataset).__name__
    lacking = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if isinstance(dataset, IterableDataset) or lacking:
        inner = getattr(dataset, "dataset", None)
        advice = f"Pass its data set, a {type(inner).__name__}, or a" if inner is not None else "Pass a"
        raise ConfigurationError(
            "a probe is taken from a data set with a length whose items can be asked for by index; got "
            f"{kind}, {'which lacks ' + ' and '.join(lacking) if lacking else 'which can only be iterated'}. "
            f"{advice} Probe built from a batch: Probe(*batch[:2])"
        )
    if len(dataset) == 0:
        raise ConfigurationError(f"a probe needs at least one image, got an empty {kind}")
    return len(dataset)


def _check_count(n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigurationError(f"n, the number of images, must be a whole number of at least 1, got {n!r}")
    return n


def _whole_numbers(values: Any, what: str) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise ConfigurationError(f"{what} must be a sequence of whole numbers, got {describe(values)}") from error


def _check_indices(dataset: Any, indices: Any) -> list[int]:
    length = _length(dataset)
    chosen = _whole_numbers(indices, "indices")
    if not chosen:
        raise ConfigurationError("indices must name at least one item, got none; leave it out for an even choice")
    if wrong := [index for index in chosen if not 0 <= index < length]:
        raise ConfigurationError(
            f"indices must lie within 0 and {length - 1} for this {type(dataset).__name__} of {length} "
            f"items, got {', '.join(map(str, wrong))}"
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


def _check_targets(targets: Any, n: int) -> Tensor:
    expected = f"targets must be one class for each of the {n} images, int64 ({n},) or a list of ints"
    if not isinstance(targets, Tensor):
        targets = torch.tensor(_whole_numbers(targets, "targets"), dtype=torch.int64, device="cpu")
    if targets.shape != (n,) or targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise ConfigurationError(f"{expected}; got {describe(targets)}")
    if bool((targets < 0).any()):
        raise ConfigurationError(
            f"{expected}, counted from 0; got {int(targets.min())}. Leave targets out where they are unknown"
        )
    return _owned(targets.to(torch.int64))


def _check_boxes(boxes: Any, n: int) -> tuple[Tensor, ...]:
    expected = f"boxes must be (x1, y1, x2, y2) in pixels, a tensor ({n}, 4) or a list of {n} tensors (M, 4)"
    if not isinstance(boxes, (Tensor, list, tuple)) or len(boxes) != n:
        raise ConfigurationError(f"{expected}; got {describe(boxes)}")
    checked: list[Tensor] = []
    for index, box in enumerate(boxes):
        # Of one tensor (N, 4) each row is an image's only box.
        rows = box[None] if isinstance(box, Tensor) and box.ndim == 1 else box
        if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != 4 or rows.is_complex():
            raise ConfigurationError(f"{expected}; got {describe(box)} for image {index}")
        own = _owned(rows.to(torch.float32))
        if not bool(own.isfinite().all() & (own[:, 2:] >= own[:, :2]).all()):
            raise ConfigurationError(
                f"{expected}, with x1 <= x2 and y1 <= y2; got {own.tolist()} for image {index}. Boxes given "
                "as (x, y, width, height) are turned by torchvision.ops.box_convert"
            )
        checked.append(own)
    return tuple(checked)


def _check_masks(masks: Any, shape: tuple[int, int, int]) -> Tensor:
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.shape != shape:
        raise ConfigurationError(
            f"masks must be bool, (N, H, W) = {shape} like the images; got {describe(masks)}. Of a tensor of "
            "classes, say which belong to the object, as in masks == 1"
        )
    return _owned(masks)


def _check_names(names: Any) -> dict[int, str]:
    named = names if isinstance(names, Mapping) else None
    if named is None and isinstance(names, (list, tuple)):
        named = dict(enumerate(names))
    if named is None or not all(isinstance(key, int) and isinstance(name, str) for key, name in named.items()):
        raise ConfigurationError(
            f"class_names must be a list of str or a mapping from int to str, got {describe(names)}"
        )
    return dict(named)


def _check_normalization(mean: Any, std: Any, channels: int) -> dict[str, tuple[float, ...] | None]:
    if mean is None and std is None:
        return {"mean": None, "std": None}
    if mean is None or std is None:
        raise ConfigurationError("mean and std are given together: each channel became (value - mean) / std")
    checked: dict[str, tuple[float, ...] | None] = {}
    for name, values in (("mean", mean), ("std", std)):
        try:
            numbers = tuple(float(value) for value in values)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{name} must be a sequence of {channels} numbers, got {values!r}") from error
        if len(numbers) not in (1, channels) or not all(map(math.isfinite, numbers)):
            raise ConfigurationError(f"{name} must be {channels} finite numbers, one a channel; got {numbers}")
        if name == "std" and min(numbers) <= 0:
            raise ConfigurationError(f"std must be above 0 in each channel, got {numbers}")
        checked[name] = numbers * channels if len(numbers) == 1 else numbers
    return checked


def _white_level(images: Tensor) -> float | None:
    """1 for values within [0, 1], 255 for whole numbers within [0, 255], None for anything else."""
    shown = images[:, :3]
    values = shown[shown.isfinite()]
    if values.numel() == 0:
        return 1.0
    low, high = values.aminmax()
    if low < 0 or high > 255:
        return None
    if high <= 1:
        return 1.0
    return 255.0 if bool((values == values.round()).all()) else None


def _display(images: Tensor, white: float | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Pictures (N, H, W, 3) uint8 of images (N, C, H, W), see ``Probe.to_display``."""
    values = images[:, :3].to(torch.float32)
    finite = values.isfinite()
    if mean is not None and std is not None:
        scale, shift = (torch.tensor(part[:3], device="cpu").reshape(-1, 1, 1) for part in (std, mean))
        values = (values * scale + shift) / (255 if max(mean) > 1 else 1)
    elif white is not None:
        values = values / white
    else:
        low = values.where(finite, math.inf).amin((1, 2, 3), keepdim=True)
        high = values.where(finite, -math.inf).amax((1, 2, 3), keepdim=True)
        values = (values - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    values = values.where(finite, 0).clamp(0, 1)
    if values.shape[1] < 3:
        values = values.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return (values * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _aligned(before: Tensor, after: Tensor) -> bool:
    """Whether each channel became a multiple of itself plus a constant, so that every pixel kept its place.

    A flip or a crop on the device keeps the size too, but maps would then lie on the wrong picture.
    """
    if before.shape[1] not in (1, after.shape[1]):
        return False
    first, second = (images.to(torch.float64).flatten(2).nan_to_num(0, 0, 0) for images in (before, after))
    first, second = (values - values.mean(2, keepdim=True) for values in (first, second))
    product, one, other = ((a * b).sum(2) for a, b in ((first, second), (first, first), (second, second)))
    # Half precision takes a little off 1; a channel that was constant must have stayed so.
    fits = product.square() >= 0.99 * one * other - 1e-12
    return bool(fits.all() & ((one > 1e-12) | (other <= 1e-12)).all())
