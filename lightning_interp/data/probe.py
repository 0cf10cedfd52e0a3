"""The fixed images of a run, with their targets, annotations and normalisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_interp.data.batches import as_images, as_integers, check_targets, cpu_copy
from lightning_interp.data.boxes import check_boxes, check_masks
from lightning_interp.data.datasets import read_class_names, read_normalization
from lightning_interp.data.display import is_channelwise_affine, to_pictures, white_level
from lightning_interp.data.sampling import Sample, read_batch, read_items
from lightning_interp.errors import ConfigurationError, describe

__all__ = ["Probe"]

ClassNames = Sequence[str] | Mapping[int, str]


@dataclass(frozen=True, slots=True, eq=False, init=False, repr=False)
class Probe:
    """Images that stay the same for the whole run, with their targets, annotations and normalisation.

    It holds copies of its tensors, on the CPU; its attributes cannot be set. Probes are compared by identity.

    Args:
        images: (N, C, H, W) as the model takes them, N at least 1; integers become float32, values unchanged.
            NaN and infinities are kept, and displayed as 0.
        targets: The class of each image, int64 (N,) or a list of N ints; None where unknown.
        boxes: Bounding boxes of the objects in pixels (x1, y1, x2, y2): (N, 4), or a list of N tensors (M, 4).
        masks: (N, H, W) bool, the objects' pixels.
        class_names: The name of each class, in order, or a mapping from class to name.
        mean: The mean subtracted from each channel: C numbers, or one for all. A mean above 1 means that pixel
            values reached 255 rather than 1.
        std: The standard deviation by which each channel was then divided: as many numbers.

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
    # The value displayed as white, None where each image is stretched to its range: taken from all images, so that
    # a subset is displayed as the whole probe is.
    _white: float | None
    # Pictures (N, H, W, 3) uint8 to display instead of the images.
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
        copied = cpu_copy(as_images(images))
        n, channels, height, width = copied.shape
        values = {
            "images": copied,
            "targets": None if targets is None else check_targets(targets, n),
            "boxes": None if boxes is None else tuple(rows.to(torch.float32) for rows in check_boxes(boxes, n)),
            "masks": None if masks is None else cpu_copy(check_masks(masks, (n, height, width))),
            "class_names": None if class_names is None else _check_class_names(class_names),
            **_check_normalization(mean, std, channels),
            "_white": white_level(copied),
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

        Random transforms draw from a fixed seed. Class names and normalisation default to the data set's. Boxes
        and masks are read where the batch is a mapping that holds them, or else where the data set has attributes
        ``boxes`` and ``masks`` with an entry for each item.

        Args:
            dataset: With ``__len__`` and ``__getitem__``.
            indices: Indices of the items; None for ``spread_indices(dataset, n)``.
            n: Number of items where ``indices`` is None; at most all are taken.
            unpack: From a collated batch to images or (images, targets), see ``unpack_batch``.
            collate_fn: From a list of items to a batch; None for PyTorch's default.
            transfer: From a collated batch to the batch that the model takes (a Lightning module's
                transfer hooks). Where it only scales and shifts channels (normalisation on the device), the
                images are displayed as they were before.
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
        is_given = mean is not None or std is not None
        if not is_given and (normalization := read_normalization(dataset)) is not None:
            # The hooks may have changed the channels, so the data set's numbers need not fit.
            mean, std = normalization if len(normalization[0]) in (1, sample.images.shape[1]) else (None, None)
        if class_names is None:
            class_names = read_class_names(dataset)
        probe = cls._from_sample(sample, annotated, class_names=class_names, mean=mean, std=std)
        # Given numbers invert the hooks; the data set's numbers invert what was applied before them.
        return probe if is_given or sample.untransferred is None else probe._displaying(sample.untransferred)

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
        """Copy the first images of a batch.

        Args:
            batch: As ``unpack_batch`` takes it, on any device.
            n: Number of images; at most all are taken.
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
        return cls._from_sample(sample, annotated, class_names=class_names, mean=mean, std=std)

    @classmethod
    def _from_sample(cls, sample: Sample, annotated: bool, **options: Any) -> Probe:
        """Make a probe; without ``annotated``, invalid boxes are left out together with the masks."""
        annotations = sample.annotations
        boxes, masks = (None, None) if annotations is None else (annotations.boxes, annotations.masks)
        if boxes is not None and not annotated:
            try:
                check_boxes(boxes, len(sample.images))
            except ConfigurationError:
                boxes = masks = None
        return cls(sample.images, sample.targets, boxes=boxes, masks=masks, **options)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        parts = [name for name in ("targets", "boxes", "masks", "class_names") if getattr(self, name) is not None]
        return f"Probe({', '.join([' x '.join(map(str, self.images.shape)), *parts])})"

    def class_name(self, index: int) -> str:
        """Return the name of a class.

        Args:
            index: The class.

        Returns:
            Its name, or its number where it has no name.

        Example:
            >>> import torch
            >>> from lightning_interp.data.probe import Probe
            >>> Probe(torch.rand(1, 3, 8, 8), class_names={3: "dog"}).class_name(4)
            '4'
        """
        return (self.class_names or {}).get(int(index), str(int(index)))

    def subset(self, indices: Sequence[int] | Tensor | slice) -> Probe:
        """Select images, with their targets and annotations.

        Args:
            indices: Indices within this probe, in any order, or a slice. An empty selection is allowed: of a few
                images, a rank's share may be empty.

        Returns:
            A probe of these images, displayed exactly as they are here.

        Raises:
            ConfigurationError: If there is no such index.

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
            chosen = as_integers(indices, "indices")
            if invalid := [index for index in chosen if not -len(self) <= index < len(self)]:
                raise ConfigurationError(f"a probe of {len(self)} images has no image {invalid[0]}")
            chosen = [everything[index] for index in chosen]
        part = copy.copy(self)
        # In Lightning's validation, plain indexing would create inference tensors, which take no gradient.
        with torch.inference_mode(False):
            rows = torch.tensor(chosen, dtype=torch.int64, device="cpu")
            for name in ("images", "targets", "masks", "_pictures"):
                value = getattr(self, name)
                object.__setattr__(part, name, None if value is None else value[rows])
        if self.boxes is not None:
            object.__setattr__(part, "boxes", tuple(self.boxes[index] for index in chosen))
        return part

    def to_display(self) -> Tensor:
        """Convert the images to pictures.

        With ``mean`` and ``std`` known, ``images * std + mean`` is displayed. Without, values within [0, 1] are
        displayed unchanged, integers within [0, 255] are divided by 255, and otherwise each image is stretched
        from its minimum to its maximum. One channel is displayed as grey, two as the grey of their mean, of
        more than three the first three as red, green and blue. NaN and infinities become 0.

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

    def _displaying(self, before: Tensor) -> Probe:
        """Display the images as they were before their channels were scaled; self if more or less was done."""
        has_same_size = len(before) == len(self) and before.shape[2:] == self.images.shape[2:]
        if not has_same_size or (before.shape == self.images.shape and torch.equal(before, self.images.to(before))):
            return self
        fits = self.mean is not None and len(self.mean) == before.shape[1]
        mean, std = (self.mean, self.std) if fits else (None, None)
        white = white_level(before)
        if (mean is None and white is None) or not is_channelwise_affine(before, self.images):
            return self
        probe = copy.copy(self)
        object.__setattr__(probe, "_pictures", to_pictures(before, white, mean, std))
        return probe


def _check_class_names(class_names: Any) -> dict[int, str]:
    mapping = dict(enumerate(class_names)) if isinstance(class_names, (list, tuple)) else class_names
    is_valid = isinstance(mapping, Mapping) and all(
        isinstance(index, int) and isinstance(name, str) for index, name in mapping.items()
    )
    if not is_valid:
        raise ConfigurationError(
            f"class_names must be a list of str or a mapping from int to str, got {describe(class_names)}"
        )
    return dict(mapping)


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
