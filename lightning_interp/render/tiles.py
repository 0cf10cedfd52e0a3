"""Grids of tiles of one size, each with a frame and a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.functional import resize

from lightning_interp.render.canvas import WHITE, cells, check_images, stack
from lightning_interp.render.colors import colorize
from lightning_interp.render.text import TEXT_SIZE, text_block, text_width, usable_width, wrap

__all__ = ["Caption", "ColorScale", "enlarge", "side_by_side", "tile_grid"]

RIGHT = (30, 150, 60)
WRONG = (210, 35, 35)
NEUTRAL = (150, 150, 150)
FRAME = 4
_GAP = 8
_SMALLEST_TILE = 128
_WIDEST_TILE = 1000
_TITLE_SIZE = 15
_NARROWEST = 320
_BAR_WIDTH = 240


@dataclass(frozen=True, slots=True)
class Caption:
    """The text below a tile, and the colour of its frame.

    Args:
        lines: From top to bottom; each is wrapped to at most two rows, and shortened if they do not suffice.
        correct: True for a green frame and a ✓, False for a red one and a ✗, None for a grey one.

    Raises:
        ValueError: If ``lines`` is a single string.

    Example:
        >>> Caption(("tabby 93 %", "label: tabby"), correct=True).lines[0]
        'tabby 93 %'
    """

    lines: tuple[str, ...] = ()
    correct: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.lines, str):
            raise ValueError(f"lines must be a tuple of strings, got {self.lines!r}; write (text,)")


@dataclass(frozen=True, slots=True)
class ColorScale:
    """The meaning of colours, drawn as a bar.

    Args:
        cmap: A name in ``matplotlib.colormaps``.
        low: The meaning of its lowest colour.
        high: The meaning of its highest colour.
        label: The quantity.

    Example:
        >>> ColorScale("jet", "0", "max of each image", "Grad-CAM").label
        'Grad-CAM'
    """

    cmap: str
    low: str
    high: str
    label: str


def enlarge(images: Tensor, min_width: int = 128, max_width: int = 320) -> Tensor:
    """Resize images to a size for viewing.

    Args:
        images: (N, H, W, 3) uint8.
        min_width: Narrower images grow by a whole factor, pixel for pixel, to at least this width.
        max_width: Wider images shrink to this width, antialiased; those higher than twice as much to that height. No
            image grows beyond it.

    Returns:
        (N, h, w, 3) uint8 on the CPU; the images themselves if their size is within these limits.

    Raises:
        ValueError: If ``images`` is no stack of images, or not ``0 < min_width <= max_width``.

    Example:
        >>> import torch
        >>> enlarge(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape
        torch.Size([2, 128, 128, 3])
        >>> enlarge(torch.zeros(2, 750, 1000, 3, dtype=torch.uint8)).shape
        torch.Size([2, 240, 320, 3])
    """
    check_images(images, "images")
    if not 0 < min_width <= max_width:
        raise ValueError(f"0 < min_width <= max_width is expected, got {min_width} and {max_width}")
    images = images.detach().cpu()
    height, width = images.shape[1:3]
    shrink = min(max_width / width, 2 * max_width / height)
    if shrink < 1:
        size = [max(1, round(height * shrink)), max(1, round(width * shrink))]
        return _resize(images, size)
    factor = min(ceil(min_width / width), max(1, 2 * max_width // height))
    return images.repeat_interleave(factor, 1).repeat_interleave(factor, 2) if factor > 1 else images


def _resize(images: Tensor, size: list[int]) -> Tensor:
    resized: Tensor = resize(images.permute(0, 3, 1, 2), size, antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous()


def side_by_side(left: Tensor, right: Tensor, *, gap: int = 4) -> Tensor:
    """Join the images of two stacks in pairs, such as each image and its map.

    Args:
        left: (N, H, W, 3) uint8.
        right: (N, H, V, 3) uint8.
        gap: White pixels between the two.

    Returns:
        (N, H, W + gap + V, 3) uint8 on the CPU.

    Raises:
        ValueError: If the stacks differ in number or height.

    Example:
        >>> import torch
        >>> images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
        >>> side_by_side(images, images).shape
        torch.Size([2, 32, 68, 3])
    """
    check_images(left, "left")
    check_images(right, "right")
    if left.shape[:2] != right.shape[:2]:
        raise ValueError(
            "left and right must be equal in number and height, got "
            f"{tuple(left.shape)} and {tuple(right.shape)}; resize one of them first"
        )
    return torch.cat([pad(left.detach().cpu(), (0, 0, 0, gap), value=WHITE), right.detach().cpu()], dim=2)


def tile_grid(
    tiles: Tensor,
    captions: Sequence[Caption],
    *,
    columns: int | None = None,
    title: str | None = None,
    scale: ColorScale | None = None,
) -> Tensor:
    """Lay tiles out in a grid, each with a frame and a caption.

    Args:
        tiles: (N, H, W, 3) uint8. Narrow ones are enlarged to 128 pixels, those wider than 1000 are shrunk.
        captions: One for each tile.
        columns: Tiles in a row; by default up to six, so that the picture is a bit wider than high.
        title: Drawn above the grid.
        scale: The meaning of the colours, drawn as a bar below the grid.

    Returns:
        (h, w, 3) uint8 on the CPU.

    Raises:
        ValueError: If there are no tiles, not one caption for each, or ``columns`` is not positive.
        ConfigurationError: If the colour map of ``scale`` is unknown.

    Example:
        >>> import torch
        >>> tiles = torch.zeros(8, 128, 128, 3, dtype=torch.uint8)
        >>> tile_grid(tiles, [Caption(("cat",), True)] * 8).shape
        torch.Size([342, 584, 3])
    """
    check_images(tiles, "tiles")
    if len(captions) != len(tiles):
        raise ValueError(f"one caption for each of the {len(tiles)} tiles is expected, got {len(captions)}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1 or None, got {columns}")
    tiles = enlarge(tiles, _SMALLEST_TILE, _WIDEST_TILE)
    missing = max(0, _SMALLEST_TILE - tiles.shape[2])  # only if a tile is many times as high as wide
    tiles = pad(tiles, (0, 0, missing // 2, missing - missing // 2), value=WHITE)
    grid = cells(_framed(tiles, captions), columns or _default_columns(tiles), _GAP, WHITE)
    strips = [grid]
    span = max(grid.shape[1], _NARROWEST)  # one small tile is too narrow for a title
    if title:
        rows = wrap(title, usable_width(span), size=_TITLE_SIZE, max_rows=3)
        strips.insert(0, text_block(rows, span, size=_TITLE_SIZE))
    if scale is not None:
        strips.append(_scale_bar(scale, span))
    return stack(strips)


def _framed(tiles: Tensor, captions: Sequence[Caption]) -> Tensor:
    count, height, width, _ = tiles.shape
    height, width = height + 2 * FRAME, width + 2 * FRAME
    rows = [_caption_rows(caption, usable_width(width)) for caption in captions]
    colors = [NEUTRAL if caption.correct is None else RIGHT if caption.correct else WRONG for caption in captions]
    blocks = [
        text_block(lines, width, min_rows=max(map(len, rows)), mark=None if caption.correct is None else color)
        for lines, caption, color in zip(rows, captions, colors, strict=True)
        if any(rows)
    ]
    framed = torch.empty((count, height + (blocks[0].shape[0] if blocks else 0), width, 3), dtype=torch.uint8)
    frame = torch.tensor(colors, dtype=torch.uint8)[:, None, None]
    framed[:, :FRAME] = framed[:, height - FRAME : height] = frame
    framed[:, FRAME : height - FRAME, :FRAME] = framed[:, FRAME : height - FRAME, -FRAME:] = frame
    framed[:, FRAME : height - FRAME, FRAME:-FRAME] = tiles
    if blocks:
        framed[:, height:] = torch.stack(blocks)
    return framed


def _caption_rows(caption: Caption, width: int) -> list[str]:
    lines = list(caption.lines)
    if caption.correct is not None:
        # For those who cannot tell the frame's colours apart.
        lines[:1] = [f"{'✓' if caption.correct else '✗'} {''.join(lines[:1])}"]
    return [row for line in lines for row in wrap(line, width)]


def _default_columns(tiles: Tensor) -> int:
    """Return the columns that fill a picture 1.6 times as wide as high most evenly."""
    count = len(tiles)
    aspect = 2.0 if tiles.shape[2] > 1.75 * tiles.shape[1] else 1.0

    def unevenness(columns: int) -> float:
        rows = ceil(count / columns)
        return abs(log(aspect * columns / rows / 1.6)) + 2.5 * (columns * rows - count) / count

    return min(range(1, min(6, count) + 1), key=unevenness)


def _scale_bar(scale: ColorScale, width: int) -> Tensor:
    """Draw the label, and below it the bar between the meanings of its ends."""
    low = "".join(wrap(scale.low, width // 4, max_rows=1))
    high = "".join(wrap(scale.high, width // 2 - 2 * _GAP, max_rows=1))
    start = text_width(low) + 2 * _GAP if low else _GAP // 2
    length = max(1, min(_BAR_WIDTH, width - start - text_width(high) - 2 * _GAP))
    bar = text_block([low], width)
    top = (bar.shape[0] - TEXT_SIZE) // 2
    values = torch.linspace(0, 1, length).expand(TEXT_SIZE, length)
    bar[top : top + TEXT_SIZE, start : start + length] = colorize(values, scale.cmap)
    end = start + length + _GAP // 2
    bar[:, end:] = text_block([high], width - end)
    label = wrap(scale.label, usable_width(width))
    return stack([text_block(label, width), bar]) if label else bar
