"""Images and class targets of batches: reading and checking."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_interp.errors import ConfigurationError, describe

__all__ = ["apply_unpack", "as_images", "as_integers", "check_targets", "cpu_copy", "unpack_batch"]

IMAGE_NAMES = ("image", "images", "img", "imgs", "pixel_values", "x", "input", "inputs", "data")
TARGET_NAMES = ("label", "labels", "target", "targets", "y", "class", "classes", "category", "cls")


def unpack_batch(batch: Any, unpack: Callable[[Any], Any] | None = None) -> tuple[Tensor, Tensor | None]:
    """Find the images and the class labels in a batch.

    Args:
        batch: A tensor, ``(x, y)``, ``[x, y]``, a mapping such as ``{"image": ..., "label": ...}`` or an
            object with such attributes (case-insensitive). Of more than two elements the
            second holds the targets; of several views the first is taken. A list of (C, H, W) tensors of
            one size is stacked.
        unpack: From the batch to the images, ``(images, targets)`` or any other structure named above,
            for batches of another structure.

    Returns:
        The images, (N, C, H, W) floating; integers become float32 with their values unchanged, so that a
        model that scales them itself does so as before. The targets, int64 (N,), or None where the batch
        holds no single class for each image (no labels, several labels, regression targets). One-hot
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
    unpacked = apply_unpack(batch, unpack)
    source = "the batch" if unpack is None else "what unpack= gave"
    images, targets = _split(unpacked)
    if images is None:
        raise ConfigurationError(
            f"found no images in {source}: expected a tensor (N, C, H, W), (images, targets) or one of the "
            f"keys or attributes {', '.join(IMAGE_NAMES)}; got {describe(unpacked)}. Pass unpack=, a function "
            "from the batch to images or (images, targets)"
        )
    checked = as_images(images, f"the images in {source}, {describe(unpacked)},")
    return checked, _read_targets(targets, len(checked))


def apply_unpack(batch: Any, unpack: Callable[[Any], Any] | None) -> Any:
    """Apply a user's ``unpack`` to a batch.

    Args:
        batch: The batch.
        unpack: The function; None returns the batch itself.

    Returns:
        The function's result.

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


def as_images(value: Any, name: str = "images") -> Tensor:
    """Check images, and convert integers to floating point.

    Args:
        value: (N, C, H, W) of numbers, or a list of N tensors (C, H, W) of one size.
        name: Their name in messages.

    Returns:
        (N, C, H, W) floating, a plain tensor on the same device; integers become float32, values unchanged.

    Raises:
        ConfigurationError: If they are anything else.

    Example:
        >>> import torch
        >>> from lightning_interp.data.batches import as_images
        >>> as_images(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).max()
        tensor(255.)
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(image, Tensor) for image in value):
        sizes = sorted({tuple(image.shape) for image in value})
        if len(sizes) > 1:
            raise ConfigurationError(
                f"{name} must have one size to be stacked, got {', '.join(map(str, sizes))}. "
                "Resize them in the data set's transform, or pass a Probe built from images of one size"
            )
        value = torch.stack(list(value))
    if not isinstance(value, Tensor):
        raise ConfigurationError(f"{name} must be a tensor (N, C, H, W), got {describe(value)}")
    if value.ndim == 3:
        raise ConfigurationError(
            f"{name} must be (N, C, H, W), got {tuple(value.shape)}. Pass images[None] for a single image "
            "(C, H, W), images[:, None] for grey images (N, H, W)"
        )
    if value.ndim != 4 or value.is_complex():
        raise ConfigurationError(f"{name} must be real numbers (N, C, H, W), got {describe(value)}")
    if value.numel() == 0:
        raise ConfigurationError(
            f"{name} must hold at least one image with at least one pixel, got {tuple(value.shape)}"
        )
    # Subclasses such as torchvision's Image dispatch operators themselves, which explaining does not need.
    plain = value.as_subclass(Tensor)
    return plain if plain.is_floating_point() else plain.to(torch.float32)


def check_targets(targets: Any, n: int) -> Tensor:
    """Check the class targets of N images.

    Args:
        targets: Integers from 0: a tensor (N,), or a sequence of N.
        n: N.

    Returns:
        int64 (N,) on the CPU, a copy.

    Raises:
        ConfigurationError: If they are of another number or type, or negative.

    Example:
        >>> check_targets([2, 0], 2)
        tensor([2, 0])
    """
    expected = f"targets must be one class for each of the {n} images, int64 ({n},) or a list of ints"
    if not isinstance(targets, Tensor):
        targets = torch.tensor(as_integers(targets, "targets"), dtype=torch.int64, device="cpu")
    if targets.shape != (n,) or targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise ConfigurationError(f"{expected}; got {describe(targets)}")
    if bool((targets < 0).any()):
        raise ConfigurationError(
            f"{expected}, counted from 0; got {int(targets.min())}. Leave targets out where they are unknown"
        )
    return cpu_copy(targets.to(torch.int64))


def as_integers(values: Any, name: str) -> list[int]:
    """Convert a sequence of integers of any type to a list of ``int``.

    Args:
        values: A list, tensor, array or other iterable.
        name: The argument's name in messages.

    Raises:
        ConfigurationError: If they are not all integers.

    Example:
        >>> as_integers(np.array([3, 1]), "indices")
        [3, 1]
    """
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise ConfigurationError(f"{name} must be a sequence of whole numbers, got {describe(values)}") from error


def cpu_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, without its graph; the copy takes gradients even if made in inference mode.

    Example:
        >>> with torch.inference_mode():
        ...     copied = cpu_copy(torch.ones(2))
        >>> copied.requires_grad_()
        tensor([1., 1.], requires_grad=True)
    """
    with torch.inference_mode(False):
        return tensor.detach().as_subclass(Tensor).to("cpu", copy=True).contiguous()


def _named_values(value: Any) -> dict[str, Any]:
    """The keys or attributes with a known name, in lower case, and their values."""
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
    """The images as the batch holds them, or None, and the structure that may hold the targets."""
    if isinstance(batch, Tensor) or _is_image_list(batch):
        return batch, None
    named = _named_values(batch)
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
    """Class indices (N,) of targets in any known structure, or None."""
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
    named = _named_values(value) if value is not None else {}
    nested = [named[name] for name in TARGET_NAMES if name in named]
    if not nested and isinstance(value, (list, tuple)):
        nested = list(value)
    return next((targets for item in nested if (targets := _read_targets(item, n)) is not None), None)


def _class_indices(targets: Tensor, n: int) -> Tensor | None:
    is_integral = not targets.is_floating_point() and not targets.is_complex()
    if is_integral and targets.shape in ((n,), (n, 1)):
        return targets.reshape(n).to(torch.int64)
    if targets.ndim == 2 and len(targets) == n and targets.shape[1] > 1 and not targets.is_complex():
        shares = targets.to(torch.float32)
        # In half precision the sums of soft labels differ a little from 1.
        if bool((shares >= 0).all() & ((shares.sum(1) - 1).abs() < 1e-2).all()):
            return shares.argmax(1)
    return None
