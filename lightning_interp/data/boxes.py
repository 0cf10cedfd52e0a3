"""Reading and checking of the boxes and masks of objects in images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_interp.data.batches import cpu_copy
from lightning_interp.errors import ConfigurationError, describe

__all__ = ["check_boxes", "check_masks", "read_boxes", "read_masks"]

_TOLERANCE = 1e-3  # pixels that a box may exceed its image by: resizing boxes rounds


def read_boxes(boxes: Any, n: int) -> tuple[Tensor, ...]:
    """Read the boxes of N images from tensors, arrays or nested lists; their values are not checked.

    Args:
        boxes: x1, y1, x2, y2 in pixels: (N, 4), or N entries (M, 4) or (4,); None and empty entries stand for an image
            without a box.
        n: N.

    Returns:
        N tensors (M, 4) float32 on the CPU, copies.

    Raises:
        ConfigurationError: If the number of entries or their shape is another one.

    Example:
        >>> read_boxes([[0, 0, 2, 2], None], 2)
        (tensor([[0., 0., 2., 2.]]), tensor([], size=(0, 4)))
    """
    rows = []
    for image, entry in enumerate(_entries(boxes, n, (list, tuple, Tensor, np.ndarray))):
        try:
            values = torch.as_tensor([] if entry is None else entry)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _wrong_entry(entry, image, n) from error
        rows.append(_rows(values.reshape(0, 4) if values.numel() == 0 else values, image, n).to(torch.float32))
    return tuple(rows)


def check_boxes(
    boxes: Any, n: int, *, image_size: tuple[int, int] | None = None, allow_empty: bool = True
) -> tuple[Tensor, ...]:
    """Check the boxes of N images.

    Args:
        boxes: x1, y1, x2, y2 in pixels, maxima exclusive: a tensor (N, 4), or a list of N tensors (M, 4) or (4,).
        n: N.
        image_size: (height, width) of the images, within which the boxes must lie; None: any finite numbers.
        allow_empty: Whether an image may be without a box, and a box without area.

    Returns:
        N tensors (M, 4) float64 on the CPU, copies.

    Raises:
        ConfigurationError: If there are not N entries, an entry is no tensor of that shape, or a box is not finite,
            reversed, outside the image, or empty where that is not allowed.

    Example:
        >>> check_boxes(torch.tensor([[1, 2, 4, 8]]), 1, image_size=(8, 8), allow_empty=False)
        (tensor([[1., 2., 4., 8.]], dtype=torch.float64),)
    """
    checked = []
    for image, entry in enumerate(_entries(boxes, n, (list, tuple, Tensor))):
        rows = _rows(entry, image, n).to(torch.float64)
        if len(rows) == 0 and not allow_empty:
            raise ConfigurationError(f"image {image} has no box; leave images without an object out")
        _check_values(rows, image, image_size, allow_empty)
        checked.append(rows)
    return tuple(checked)


def _entries(boxes: Any, n: int, types: tuple[type[Any], ...]) -> list[Any]:
    is_sequence = isinstance(boxes, types) and getattr(boxes, "ndim", 1) > 0
    if not is_sequence or len(boxes) != n:
        raise ConfigurationError(f"{_expected_boxes(n)}; got {describe(boxes)}")
    return list(boxes)


def _rows(entry: Any, image: int, n: int) -> Tensor:
    """A copy of one image's boxes, (M, 4) in their dtype on the CPU."""
    rows = entry[None] if isinstance(entry, Tensor) and entry.ndim == 1 else entry
    if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != 4:
        raise _wrong_entry(entry, image, n)
    if rows.is_complex() or rows.dtype == torch.bool:
        raise _wrong_entry(entry, image, n)
    return cpu_copy(rows)


def _check_values(rows: Tensor, image: int, image_size: tuple[int, int] | None, allow_empty: bool) -> None:
    low, high = rows[:, :2], rows[:, 2:]
    _require(
        rows.isfinite().all(1) & (high >= low).all(1),
        rows,
        image,
        "is no finite (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2. Boxes given as (x, y, width, height) are converted "
        "by torchvision.ops.box_convert",
    )
    if image_size is not None:
        height, width = image_size
        limit = torch.tensor([width, height], dtype=torch.float64, device="cpu") + _TOLERANCE
        _require(
            (low >= -_TOLERANCE).all(1) & (high <= limit).all(1),
            rows,
            image,
            f"reaches outside its image of {width} x {height} pixels (width x height); boxes are given in pixels of "
            "the images as the model takes them: scale them as the images were scaled",
        )
    if not allow_empty:
        _require(
            (high > low).all(1),
            rows,
            image,
            "is empty; x1, y1, x2, y2 with x1 < x2 and y1 < y2 are expected, maxima exclusive",
        )


def _require(is_valid: Tensor, rows: Tensor, image: int, message: str) -> None:
    """Raise the message about the first row that is not valid."""
    if not bool(is_valid.all()):
        row = rows[int((~is_valid).nonzero()[0])]
        numbers = ", ".join(f"{number:g}" for number in row.tolist())
        raise ConfigurationError(f"box ({numbers}) of image {image} {message}")


def _expected_boxes(n: int) -> str:
    return (
        "boxes must be (x1, y1, x2, y2) in pixels of the images as the model takes them, a tensor "
        f"({n}, 4) or a list of {n} tensors (M, 4)"
    )


def _wrong_entry(entry: Any, image: int, n: int) -> ConfigurationError:
    return ConfigurationError(f"{_expected_boxes(n)}; got {describe(entry)} for image {image}")


def read_masks(masks: Any, shape: tuple[int, int, int]) -> Tensor:
    """Read masks from a tensor, an array or a sequence of them.

    Args:
        masks: (N, H, W) or (N, 1, H, W), bool or uint8, where 0 is background; or a sequence of N such masks.
        shape: (N, H, W).

    Returns:
        (N, H, W) bool.

    Raises:
        ConfigurationError: If the dtype or the shape is another one.

    Example:
        >>> read_masks(np.array([[[0, 255]]], dtype=np.uint8), (1, 1, 2))
        tensor([[[False,  True]]])
    """
    stacked = masks
    if isinstance(masks, (list, tuple)) and masks and all(isinstance(mask, (Tensor, np.ndarray)) for mask in masks):
        sizes = {tuple(mask.shape) for mask in masks}
        stacked = torch.stack([torch.as_tensor(mask) for mask in masks]) if len(sizes) == 1 else masks
    if isinstance(stacked, np.ndarray):
        stacked = torch.from_numpy(stacked)
    if isinstance(stacked, Tensor) and stacked.ndim == 4 and stacked.shape[1] == 1:
        stacked = stacked[:, 0]
    is_readable = isinstance(stacked, Tensor) and stacked.dtype in (torch.bool, torch.uint8)
    if not is_readable or tuple(stacked.shape) != shape:
        raise _wrong_masks("masks", "bool or uint8 (0 outside the object)", shape, masks)
    plain: Tensor = stacked.detach().as_subclass(Tensor)
    return plain > 0


def check_masks(masks: Any, shape: tuple[int, int, int], name: str = "masks", *, allow_empty: bool = True) -> Tensor:
    """Check masks.

    Args:
        masks: (N, H, W) bool.
        shape: (N, H, W).
        name: The argument's name in messages.
        allow_empty: Whether a mask may be without an object.

    Returns:
        (N, H, W) bool on the masks' device.

    Raises:
        ConfigurationError: If the dtype or the shape is another one, or a mask is empty where that is not allowed.

    Example:
        >>> check_masks(torch.ones(1, 8, 8, dtype=torch.bool), (1, 8, 8)).shape
        torch.Size([1, 8, 8])
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or tuple(masks.shape) != shape:
        raise _wrong_masks(name, "a bool tensor", shape, masks)
    if not allow_empty and not bool((has_object := masks.flatten(1).any(1)).all()):
        image = int((~has_object).nonzero()[0])
        raise ConfigurationError(f"the mask of image {image} is empty; leave images without an object out")
    return masks.detach()


def _wrong_masks(name: str, kind: str, shape: tuple[int, int, int], masks: Any) -> ConfigurationError:
    return ConfigurationError(
        f"{name} must be {kind}, (N, H, W) = {shape} like the images; got {describe(masks)}. Resize them as the images "
        "were resized, and of masks of numbers say which belong to the object, as in masks == 1"
    )
