"""What the class score loses where parts of the image are hidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_interp.checks import check_integer, check_number, is_integer, is_number
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.explain._explainer import explainer
from lightning_interp.explain._windows import Windowed
from lightning_interp.explain.baselines import Baseline, baseline_images, streams
from lightning_interp.model.trace import Trace

__all__ = ["occlusion", "patch_boxes", "patch_starts", "rise", "spread"]

Length = int | float
Returns = Literal["map", "drop", "probability", "predicted"]

# Changed images in one pass of the model.
_ROWS = {"cpu": 16}
_MORE_ROWS = 64


@explainer()
def occlusion(
    trace: Trace,
    *,
    patch: Length | tuple[Length, Length] = 0.2,
    stride: Length | tuple[Length, Length] = 0.1,
    fill: Baseline | Sequence[float] = None,
    returns: Returns = "map",
) -> Tensor:
    r"""Occlusion: by how much the class score drops where a patch hides the image.

    .. math:: M(y, x) = \frac{1}{|P(y, x)|} \sum_{p \in P(y, x)} s(I) - s(I_{\setminus p})

    with :math:`P(y, x)` the patches that cover a pixel. The patches stand ``stride`` apart from the upper left corner
    on; the last of each row and column are flush with the border, so that every pixel is covered.

    Exact, and cheaper than running the model on every hidden image: on a CPU, the early layers compute only what a
    patch can change.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes. A callable given as ``targets`` scores
            each row of an output by itself.
        patch: The patch's side, or (height, width): an int is in pixels, a float a share of the image's side.
        stride: How far apart the patches stand, in the same way; at most ``patch``.
        fill: What is shown instead: None, each image's own channel means; a number, or C of them, one for each channel;
            a tensor that expands to (N, C, H, W); or ``"blur"`` and the others of :func:`integrated_gradients`'
            baselines.
        returns: ``"map"``, or what stands at each position of the patch, (N, rows, columns): ``"drop"`` of the score,
            ``"probability"`` of the target's class, or ``"predicted"``, the class (int64). Where the positions are
            is told by :func:`patch_starts`.

    Returns:
        (N, H, W) float32, signed; or (N, rows, columns).

    Raises:
        ConfigurationError: If an option is out of range, or the probability of a callable's score is asked for.

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
    places = [(top, left) for top in tops for left in lefts]
    looks = _occluded(trace, _filling(trace, fill), places, size, returns)
    found = torch.cat(list(looks)).view(len(trace.images), len(tops), len(lefts))
    if returns in ("map", "drop"):
        found = trace.scores.detach()[:, None, None] - found
    return spread(found, patch_boxes((height, width), patch, stride), (height, width)) if returns == "map" else found


def patch_starts(
    size: tuple[int, int],
    patch: Length | tuple[Length, Length] = 0.2,
    stride: Length | tuple[Length, Length] = 0.1,
) -> tuple[list[int], list[int]]:
    """Where the patches of :func:`occlusion` begin.

    Args:
        size: (H, W) of the image.
        patch: As :func:`occlusion` takes it.
        stride: As :func:`occlusion` takes it.

    Returns:
        The first rows, and the first columns; patches stand at all combinations.

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
    """The patches of :func:`occlusion`.

    Args:
        size: (H, W) of the image.
        patch: As :func:`occlusion` takes it.
        stride: As :func:`occlusion` takes it.

    Returns:
        (rows * columns, 4) int64, x1, y1, x2, y2 in pixels, maxima exclusive, row by row.

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
    """What stands at each patch, averaged over the patches that cover a pixel.

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
    total = torch.zeros(len(drops), *size, device=drops.device, dtype=torch.float32)
    covering = torch.zeros(size, device=drops.device, dtype=torch.float32)
    for drop, (left, top, right, bottom) in zip(drops.flatten(1).T, boxes.tolist(), strict=True):
        total[:, top:bottom, left:right] += drop[:, None, None]
        covering[top:bottom, left:right] += 1
    return total / covering


@explainer(has_zero=False)
def rise(
    trace: Trace,
    *,
    n_masks: int = 1000,
    grid: int = 7,
    p: float = 0.5,
    score: Literal["logit", "probability"] = "logit",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""RISE: random masks, weighted by the class score of the image that shines through.

    .. math:: M(y, x) = \frac{\sum_{i=1}^n s(I \odot m_i) \, m_i(y, x)}{\sum_{i=1}^n m_i(y, x)}

    with masks :math:`m_i` of ``grid`` times ``grid`` cells that are open with probability :math:`p`, enlarged
    bilinearly and shifted at random by less than a cell. What a mask hides is zero: the mean colour, of normalised
    images. The paper divides by :math:`n p`, what the masks sum to on average, which is good for probabilities; logits
    have an offset, under which a map of few masks would show where these happen to be open.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes. A callable given as ``targets`` scores
            each row of an output by itself.
        n_masks: How many masks; the paper takes 4000 to 8000.
        grid: Cells of a mask along each side.
        p: The share of open cells.
        score: ``"logit"``, or ``"probability"``, as in the paper.
        generator: Where the masks come from, on the CPU; each image has its own. None: the same at every call.

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If an option is out of range, or the probability of a callable's score is asked for.

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
    images = trace.images
    size, rows = images.shape[-2:], _rows(trace)
    maps = torch.zeros(len(images), *size, device=images.device)
    shown = torch.zeros_like(maps)
    own = streams(trace, generator)
    with _progress(len(images) * n_masks, "rise") as progress:
        for number, stream in enumerate(own):
            cells, shifts = _drawn(n_masks, grid, p, size, stream)
            for start in range(0, n_masks, rows):
                some = slice(start, start + rows)
                masks = _masks(cells[some].to(images.device), shifts[some], size)
                image = images[number] * masks[:, None].to(images.dtype)
                seen = _seen(trace, image, number, "drop" if score == "logit" else "probability")
                maps[number] += torch.einsum("n,nhw->hw", seen.to(masks), masks)
                shown[number] += masks.sum(0)
                progress.update(len(masks))
    return maps / shown.clamp(min=torch.finfo(shown.dtype).tiny)


def _drawn(
    n: int, grid: int, p: float, size: Sequence[int], stream: torch.Generator
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The random masks of an image: (n, grid, grid) the cells, open ones being one, and their shifts."""
    cells = (torch.rand(n, grid, grid, generator=stream, device="cpu") < p).float()
    tops, lefts = (torch.randint(-(-side // grid), (n,), generator=stream, device="cpu").tolist() for side in size)
    return cells, list(zip(tops, lefts, strict=True))


def _masks(cells: Tensor, shifts: list[tuple[int, int]], size: Sequence[int]) -> Tensor:
    """(n, H, W) masks between 0 and 1: cells enlarged and shifted."""
    height, width = size
    grid = cells.shape[-1]
    enlarged = [-(-side // grid) * (grid + 1) for side in size]  # by a cell more than is seen, for the shift
    large = interpolate(cells[:, None], enlarged, mode="bilinear", align_corners=False)
    shifted = [
        mask[top : top + height, left : left + width] for mask, (top, left) in zip(large[:, 0], shifts, strict=True)
    ]
    return torch.stack(shifted)


def _filling(trace: Trace, fill: Baseline | Sequence[float]) -> Tensor:
    """(N, C, H, W) what is shown where the images are hidden."""
    channels = trace.images.shape[1]
    if isinstance(fill, (list, tuple)):
        if len(fill) != channels or not all(map(is_number, fill)):
            raise ConfigurationError(
                f"fill takes a number, {channels} of them (one for each channel), a tensor, None, or the name of a "
                f"baseline, got {describe(fill)}"
            )
        fill = torch.tensor([float(each) for each in fill])
    if isinstance(fill, (Tensor, np.ndarray)) and fill.ndim == 1:
        fill = torch.as_tensor(fill).view(-1, 1, 1)
    return baseline_images(trace, "mean" if fill is None else fill)[0]


def _occluded(
    trace: Trace, filling: Tensor, places: list[tuple[int, int]], size: tuple[int, int], returns: Returns
) -> Iterator[Tensor]:
    """What is asked for, at each place, one image after another."""
    passes = -(-len(places) // _rows(trace))
    step = -(-len(places) // passes)  # passes of about the same size
    with _progress(len(trace.images) * len(places), "occlusion") as progress:
        for number, image in enumerate(trace.images):
            for start in range(0, len(places), step):
                some = places[start : start + step]
                inside = torch.stack(
                    [filling[number, :, top : top + size[0], left : left + size[1]] for top, left in some]
                )
                tops, lefts = ([place[axis] for place in some] for axis in (0, 1))
                copies = Windowed(image[None], inside, tops, lefts)
                # Elsewhere, the many small steps of windows take longer than whole images.
                local = image.device.type == "cpu"
                yield _seen(trace, copies if local else copies.full(), number, returns)
                progress.update(len(some))


def _seen(trace: Trace, images: Tensor, number: int, returns: Returns) -> Tensor:
    """What the model says to changed copies of one image, (M,)."""
    if isinstance(images, Windowed):
        try:
            return _said(trace, images, number, returns)
        except RuntimeError:  # a part of the model asks for numbers past torch's functions; its own faults return
            images = images.full()
    return _said(trace, images, number, returns)


def _said(trace: Trace, images: Tensor, number: int, returns: Returns) -> Tensor:
    rows = torch.full((len(images),), number, device=images.device)
    with trace.on_images(images, rows, input_gradients=False) as look:
        if returns in ("map", "drop"):
            return _plain(look.scores).float()
        logits = _plain(look.logits).float()
        if returns == "predicted":
            return _plain(look.resolve_targets(None))  # type: ignore[arg-type]
        targets = look.targets
        if callable(targets):
            raise ConfigurationError(
                "a callable's score has no probability; pass classes as targets, or ask for the score itself"
            )
        if logits.shape[1] == 1:
            return (logits[:, 0] * (2 * targets - 1)).sigmoid()
        return logits.softmax(1).gather(1, targets[:, None])[:, 0]


def _plain(tensor: Tensor) -> Tensor:
    return (tensor.full() if isinstance(tensor, Windowed) else tensor).detach()


def _pixels(name: str, value: Any, axis: int, side: int) -> int:
    """A length along one side of the image."""
    given = value[axis] if isinstance(value, (tuple, list)) and len(value) == 2 else value
    if is_integer(given) and 1 <= given <= side:
        return int(given)
    if is_number(given) and not is_integer(given) and 0 < given <= 1:
        return max(1, round(given * side))
    raise ConfigurationError(
        f"{name} takes pixels (an int from 1 to the image's {side}) or a share of the side (a float above 0, at most "
        f"1), or a pair of these, got {value!r}"
    )


def _rows(trace: Trace) -> int:
    return _ROWS.get(trace.images.device.type, _MORE_ROWS)


def _progress(total: int, name: str) -> Any:
    """A bar, where it takes more than a few seconds and somebody watches."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, unit="image", delay=3, leave=False, disable=None)
