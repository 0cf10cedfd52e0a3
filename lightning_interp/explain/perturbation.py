"""Perturbation methods: the change of the class score when parts of the image are replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_interp.checks import check_integer, check_number, is_integer, is_number
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.explain._explainer import explainer
from lightning_interp.explain._windowed import Windowed, call_with_windows
from lightning_interp.explain.baselines import Baseline, baseline_images, image_generators
from lightning_interp.explain.maps import resize_maps
from lightning_interp.model.chunks import rows_per_pass
from lightning_interp.model.trace import Trace

__all__ = ["occlusion", "patch_boxes", "patch_starts", "rise", "spread"]

Length = int | float
Returns = Literal["map", "drop", "probability", "predicted"]


@explainer(family="perturbation", perturbed=True, signed=True)
def occlusion(
    trace: Trace,
    *,
    patch: Length | tuple[Length, Length] = 0.2,
    stride: Length | tuple[Length, Length] = 0.1,
    fill: Baseline | Sequence[float] = None,
    returns: Returns = "map",
) -> Tensor:
    r"""Occlusion: the drop of the class score when a patch covers part of the image.

    .. math:: M(y, x) = \frac{1}{|P(y, x)|} \sum_{p \in P(y, x)} s(I) - s(I_{\setminus p})

    with :math:`P(y, x)` the patches that cover a pixel. Patches are placed at multiples of ``stride`` from the upper
    left corner; the last of each row and column align with the border, so that every pixel is covered.

    Exact, and cheaper than running the model on every occluded image: on a CPU, the early layers are evaluated only
    within the region that a patch can change.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call. A callable given as ``targets`` must
            score each row of an output independently.
        patch: The patch's side, or (height, width): an int in pixels, a float as a share of the image's side.
        stride: The distance between patches, in the same units; at most ``patch``.
        fill: The values under the patch: None, each image's channel means; a number, or C of them, one for each
            channel; a tensor that expands to (N, C, H, W); or the name of a baseline of :func:`integrated_gradients`,
            such as ``"blur"``.
        returns: ``"map"``, or a value for each position of the patch, (N, rows, columns): ``"drop"`` of the score,
            ``"probability"`` of the target's class, or ``"predicted"``, the class (int64). :func:`patch_starts`
            returns the positions.

    Returns:
        (N, H, W) float32, signed; or (N, rows, columns).

    Raises:
        ConfigurationError: If an option is out of range, or a probability is requested for a callable's score.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> images = torch.rand(2, 3, 20, 20)
        >>> occlusion(model, images, targets=1).shape
        torch.Size([2, 20, 20])
        >>> occlusion(model, images, targets=1, patch=8, stride=4, returns="probability").shape
        torch.Size([2, 4, 4])

    Reference:
        Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014.
    """
    if returns not in ("map", "drop", "probability", "predicted"):
        raise ConfigurationError(f"returns takes 'map', 'drop', 'probability' or 'predicted', got {returns!r}")
    height, width = trace.images.shape[-2:]
    size = (_pixels("patch", patch, 0, height), _pixels("patch", patch, 1, width))
    tops, lefts = patch_starts((height, width), patch, stride)
    corners = [(top, left) for top in tops for left in lefts]
    chunks = _occluded_values(trace, _fill_images(trace, fill), corners, size, returns)
    values = torch.cat(list(chunks)).view(len(trace.images), len(tops), len(lefts))
    if returns in ("map", "drop"):
        values = trace.scores.detach()[:, None, None] - values
    if returns != "map":
        return values
    return spread(values, patch_boxes((height, width), patch, stride), (height, width))


def patch_starts(
    size: tuple[int, int],
    patch: Length | tuple[Length, Length] = 0.2,
    stride: Length | tuple[Length, Length] = 0.1,
) -> tuple[list[int], list[int]]:
    """Return the positions of the patches of :func:`occlusion`.

    Args:
        size: (H, W) of the image.
        patch: As :func:`occlusion` takes it.
        stride: As :func:`occlusion` takes it.

    Returns:
        The patches' first rows, and their first columns; there is a patch for each combination.

    Raises:
        ConfigurationError: If the patch is larger than the image, or the stride than the patch.

    Example:
        >>> patch_starts((10, 20), patch=4, stride=(4, 0.2))
        ([0, 4, 6], [0, 4, 8, 12, 16])
    """
    starts = []
    for axis, side in enumerate(size):
        length, step = _pixels("patch", patch, axis, side), _pixels("stride", stride, axis, side)
        if step > length:
            raise ConfigurationError(
                f"stride takes at most the patch, so that every pixel is covered; got {step} pixels for a patch of "
                f"{length}"
            )
        starts.append([*range(0, side - length, step), side - length])
    return starts[0], starts[1]


def patch_boxes(
    size: tuple[int, int],
    patch: Length | tuple[Length, Length] = 0.2,
    stride: Length | tuple[Length, Length] = 0.1,
) -> Tensor:
    """Return the boxes of the patches of :func:`occlusion`.

    Args:
        size: (H, W) of the image.
        patch: As :func:`occlusion` takes it.
        stride: As :func:`occlusion` takes it.

    Returns:
        (rows * columns, 4) int64, x1, y1, x2, y2 in pixels, maxima exclusive, in row-major order.

    Raises:
        ConfigurationError: If the patch is larger than the image, or the stride than the patch.

    Example:
        >>> patch_boxes((4, 6), patch=4, stride=2)
        tensor([[0, 0, 4, 4],
                [2, 0, 6, 4]])
    """
    tops, lefts = patch_starts(size, patch, stride)
    height, width = (_pixels("patch", patch, axis, side) for axis, side in enumerate(size))
    return torch.tensor([(left, top, left + width, top + height) for top in tops for left in lefts])


def spread(drops: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Average the values of all patches that cover a pixel.

    Args:
        drops: (N, rows, columns).
        boxes: (rows * columns, 4), as :func:`patch_boxes` gives them.
        size: (H, W) of the images.

    Returns:
        (N, H, W) float32.

    Example:
        >>> spread(torch.tensor([[[1.0, 3.0]]]), patch_boxes((4, 6), patch=4, stride=2), (4, 6))[0, 0]
        tensor([1., 1., 2., 2., 3., 3.])
    """
    totals = torch.zeros(len(drops), *size, device=drops.device, dtype=torch.float32)
    counts = torch.zeros(size, device=drops.device, dtype=torch.float32)
    for drop, (left, top, right, bottom) in zip(drops.flatten(1).T, boxes.tolist(), strict=True):
        totals[:, top:bottom, left:right] += drop[:, None, None]
        counts[top:bottom, left:right] += 1
    return totals / counts


@explainer(family="perturbation", perturbed=True, has_zero=False)
def rise(
    trace: Trace,
    *,
    n_masks: int = 1000,
    grid: int = 7,
    p: float = 0.5,
    score: Literal["logit", "probability"] = "logit",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""RISE: random masks, weighted by the class scores of the masked images.

    .. math:: M(y, x) = \frac{\sum_{i=1}^n s(I \odot m_i) \, m_i(y, x)}{\sum_{i=1}^n m_i(y, x)}

    with masks :math:`m_i` of ``grid`` times ``grid`` cells that are one with probability :math:`p`, else zero, resized
    bilinearly and shifted at random by less than a cell. Masked pixels are zero: the mean colour of normalised images.
    The paper divides by :math:`n p`, the expected sum of the masks, which suits probabilities; the offset of logits
    would add the masks' sampling noise to the map.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call. A callable given as ``targets`` must
            score each row of an output independently.
        n_masks: Number of masks; the paper uses 4000 to 8000.
        grid: Number of cells of a mask along each side.
        p: The expected share of cells that are one.
        score: ``"logit"``, or ``"probability"``, as in the paper.
        generator: Draws the masks, on the CPU, different ones for each image; None: the same in every call.

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If an option is out of range, or a probability is requested for a callable's score.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> rise(model, torch.rand(2, 3, 20, 20), n_masks=16, grid=4).shape
        torch.Size([2, 20, 20])

    Reference:
        Petsiuk et al., RISE: Randomized Input Sampling for Explanation of Black-box Models, BMVC 2018.
    """
    n_masks, grid = check_integer("n_masks", n_masks), check_integer("grid", grid)
    p = check_number("p", p, "a share of open cells above 0, at most 1", lambda share: 0 < share <= 1)
    if score not in ("logit", "probability"):
        raise ConfigurationError(f"score takes 'logit' or 'probability', got {score!r}")
    images, size = trace.images, trace.images.shape[-2:]
    totals = torch.zeros(len(images), *size, device=images.device)
    mask_sums = torch.zeros_like(totals)
    returns: Returns = "drop" if score == "logit" else "probability"
    rows = _rows(trace)
    with _progress_bar(len(images) * n_masks, "rise") as progress:
        for row, generator_of_image in enumerate(image_generators(trace, generator)):
            cells, shifts = _draw_masks(n_masks, grid, p, size, generator_of_image)
            for start in range(0, n_masks, rows):
                chunk = slice(start, start + rows)
                masks = _masks(cells[chunk].to(images.device), shifts[chunk], size)
                masked = images[row] * masks[:, None].to(images.dtype)
                scores = _values(trace, masked, row, returns)
                totals[row] += torch.einsum("n,nhw->hw", scores.to(masks), masks)
                mask_sums[row] += masks.sum(0)
                progress.update(len(masks))
    return totals / mask_sums.clamp(min=torch.finfo(mask_sums.dtype).tiny)


def _draw_masks(
    n: int, grid: int, p: float, size: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Draw the random masks of an image: (n, grid, grid) cells that are one or zero, and n shifts in pixels."""
    cells = (torch.rand(n, grid, grid, generator=generator, device="cpu") < p).float()
    tops, lefts = (torch.randint(-(-side // grid), (n,), generator=generator, device="cpu").tolist() for side in size)
    return cells, list(zip(tops, lefts, strict=True))


def _masks(cells: Tensor, shifts: list[tuple[int, int]], size: Sequence[int]) -> Tensor:
    """Return (n, H, W) masks between 0 and 1: cells resized and shifted."""
    height, width = size
    grid = cells.shape[-1]
    large = resize_maps(cells, [-(-side // grid) * (grid + 1) for side in size])  # larger by one cell, for the shift
    return torch.stack(
        [mask[top : top + height, left : left + width] for mask, (top, left) in zip(large, shifts, strict=True)]
    )


def _fill_images(trace: Trace, fill: Baseline | Sequence[float]) -> Tensor:
    """Return (N, C, H, W) the values under the patches."""
    channels = trace.images.shape[1]
    if isinstance(fill, (list, tuple)):
        if len(fill) != channels or not all(map(is_number, fill)):
            raise ConfigurationError(
                f"fill takes a number, {channels} of them (one for each channel), a tensor, None, or the name of a "
                f"baseline, got {describe(fill)}"
            )
        fill = torch.tensor([float(value) for value in fill])
    if isinstance(fill, (Tensor, np.ndarray)) and fill.ndim == 1:
        fill = torch.as_tensor(fill).view(-1, 1, 1)
    return baseline_images(trace, "mean" if fill is None else fill)[0]


def _occluded_values(
    trace: Trace, fill: Tensor, corners: list[tuple[int, int]], size: tuple[int, int], returns: Returns
) -> Iterator[Tensor]:
    """Yield the requested values for all positions of the patch, image by image."""
    passes = -(-len(corners) // _rows(trace))
    step = -(-len(corners) // passes)  # passes of about the same size
    height, width = size
    with _progress_bar(len(trace.images) * len(corners), "occlusion") as progress:
        for row, image in enumerate(trace.images):
            for start in range(0, len(corners), step):
                chunk = corners[start : start + step]
                patches = torch.stack([fill[row, :, top : top + height, left : left + width] for top, left in chunk])
                tops, lefts = ([corner[axis] for corner in chunk] for axis in (0, 1))
                copies = Windowed(image[None], patches, tops, lefts)
                # On other devices, the many small operations on windows take longer than those on whole images.
                images = copies if image.device.type == "cpu" else copies.full()
                yield _values(trace, images, row, returns)
                progress.update(len(chunk))


def _values(trace: Trace, images: Tensor, row: int, returns: Returns) -> Tensor:
    """Return (M,) the requested values of perturbed copies of one image."""
    run = partial(_values_of_pass, trace, row, returns)
    return call_with_windows(run, images) if isinstance(images, Windowed) else run(images)


def _values_of_pass(trace: Trace, row: int, returns: Returns, images: Tensor) -> Tensor:
    rows = torch.full((len(images),), row, device=images.device)
    with trace.on_images(images, rows, input_gradients=False) as perturbed:
        if returns in ("map", "drop"):
            return _as_plain(perturbed.scores).float()
        logits = _as_plain(perturbed.logits).float()
        if returns == "predicted":
            return _as_plain(perturbed.resolve_targets(None))  # type: ignore[arg-type]
        targets = perturbed.targets
        if callable(targets):
            raise ConfigurationError(
                "a callable's score has no probability; pass classes as targets, or ask for the score itself"
            )
        if logits.shape[1] == 1:
            return (logits[:, 0] * (2 * targets - 1)).sigmoid()
        return logits.softmax(1).gather(1, targets[:, None])[:, 0]


def _as_plain(tensor: Tensor) -> Tensor:
    return (tensor.full() if isinstance(tensor, Windowed) else tensor).detach()


def _pixels(name: str, value: Any, axis: int, side: int) -> int:
    """Return a length along one side of the image in pixels."""
    length = value[axis] if isinstance(value, (tuple, list)) and len(value) == 2 else value
    if is_integer(length) and 1 <= length <= side:
        return int(length)
    if is_number(length) and not is_integer(length) and 0 < length <= 1:
        return max(1, round(length * side))
    raise ConfigurationError(
        f"{name} takes pixels (an int from 1 to the image's {side}) or a share of the side (a float above 0, at most "
        f"1), or a pair of these, got {value!r}"
    )


def _rows(trace: Trace) -> int:
    """Return the number of perturbed images in one pass."""
    return rows_per_pass(trace.images.device, cpu=16, other=64)


def _progress_bar(total: int, name: str) -> Any:
    """Return a progress bar that is shown after a few seconds, on a terminal only."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, unit="image", delay=3, leave=False, disable=None)
