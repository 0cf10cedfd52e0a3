"""The fixed images of a run, with all that is known about them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_interp.data.batches import as_images, read_class_names, read_normalization
from lightning_interp.data.display import is_aligned, to_pictures, white_level
from lightning_interp.data.sampling import Sample, own_copy, read_batch, read_items, whole_numbers
from lightning_interp.errors import ConfigurationError, describe

__all__ = ["Probe"]

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
        >>> from lightning_interp.data.probe import Probe
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
        owned = own_copy(as_images(images))
        n, channels, height, width = owned.shape
        values = {
            "images": owned,
            "targets": None if targets is None else _check_targets(targets, n),
            "boxes": None if boxes is None else _check_boxes(boxes, n),
            "masks": None if masks is None else _check_masks(masks, (n, height, width)),
            "class_names": None if class_names is None else _check_names(class_names),
            **_check_normalization(mean, std, channels),
            "_white": white_level(owned),
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
            >>> from lightning_interp.data.probe import Probe
            >>> dataset = TensorDataset(torch.rand(6, 3, 8, 8), torch.tensor([0, 0, 0, 0, 1, 2]))
            >>> Probe.from_dataset(dataset, n=3).targets
            tensor([0, 1, 2])
        """
        sample = read_items(
            dataset, indices, n, unpack=unpack, collate_fn=collate_fn, transfer=transfer, annotated=annotated
        )
        given = mean is not None or std is not None
        if not given and (numbers := read_normalization(dataset)) is not None:
            # The hooks may have changed the channels, so the data set's numbers need not fit.
            mean, std = numbers if len(numbers[0]) in (1, sample.images.shape[1]) else (None, None)
        if class_names is None:
            class_names = read_class_names(dataset)
        probe = cls._of(sample, annotated, class_names=class_names, mean=mean, std=std)
        # Given numbers undo what the hooks did; the data set's undo what was done before them.
        return probe if given or sample.untransferred is None else probe._shown_as(sample.untransferred)

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
            >>> from lightning_interp.data.probe import Probe
            >>> len(Probe.from_batch([torch.rand(16, 1, 8, 8), torch.arange(16)], n=4))
            4
        """
        sample = read_batch(batch, n, unpack, annotated)
        return cls._of(sample, annotated, class_names=class_names, mean=mean, std=std)

    @classmethod
    def _of(cls, sample: Sample, annotated: bool, **known: Any) -> Probe:
        """A probe with boxes and masks, or without them where they are wrong and that is no error."""
        annotations = sample.annotations
        if annotations is not None:
            try:
                return cls(sample.images, sample.targets, boxes=annotations.boxes, masks=annotations.masks, **known)
            except ConfigurationError:
                if annotated:
                    raise
        return cls(sample.images, sample.targets, **known)

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
            >>> from lightning_interp.data.probe import Probe
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
            >>> from lightning_interp.data.probe import Probe
            >>> Probe(torch.rand(4, 3, 8, 8), [5, 6, 7, 8]).subset([3, 0]).targets
            tensor([8, 5])
        """
        everything = range(len(self))
        if isinstance(indices, slice):
            chosen = list(everything[indices])
        else:
            chosen = whole_numbers(indices, "indices")
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
            >>> from lightning_interp.data.probe import Probe
            >>> probe = Probe(torch.zeros(1, 3, 2, 2), mean=[1.0, 0.4, 0.0], std=[0.2, 0.2, 0.2])
            >>> probe.to_display()[0, 0, 0]
            tensor([255, 102,   0], dtype=torch.uint8)
        """
        if self._pictures is not None:
            return self._pictures.clone()
        return to_pictures(self.images, self._white, self.mean, self.std)

    def _shown_as(self, before: Tensor) -> Probe:
        """Show the images as they were before their channels were scaled; self if more or less was done."""
        same_size = len(before) == len(self) and before.shape[2:] == self.images.shape[2:]
        if not same_size or (before.shape == self.images.shape and torch.equal(before, self.images.to(before))):
            return self
        fits = self.mean is not None and len(self.mean) == before.shape[1]
        mean, std = (self.mean, self.std) if fits else (None, None)
        white = white_level(before)
        if (mean is None and white is None) or not is_aligned(before, self.images):
            return self
        shown = copy.copy(self)
        object.__setattr__(shown, "_pictures", to_pictures(before, white, mean, std))
        return shown


def _check_targets(targets: Any, n: int) -> Tensor:
    expected = f"targets must be one class for each of the {n} images, int64 ({n},) or a list of ints"
    if not isinstance(targets, Tensor):
        targets = torch.tensor(whole_numbers(targets, "targets"), dtype=torch.int64, device="cpu")
    if targets.shape != (n,) or targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise ConfigurationError(f"{expected}; got {describe(targets)}")
    if bool((targets < 0).any()):
        raise ConfigurationError(
            f"{expected}, counted from 0; got {int(targets.min())}. Leave targets out where they are unknown"
        )
    return own_copy(targets.to(torch.int64))


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
        own = own_copy(rows.to(torch.float32))
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
    return own_copy(masks)


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
