"""What every picture is put together from: readable text on white, stacked strips, cells in a grid."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

__all__ = [
    "cells",
    "check_images",
    "clean",
    "font_path",
    "loaded_font",
    "stack",
    "text_block",
    "text_width",
    "usable_width",
    "wrap",
]

TEXT_SIZE = 13
INK = (20, 20, 20)
WHITE = 255
_MARGIN = 3
_LONGEST_TEXT = 500
_MISSING = "\N{WHITE SQUARE}"
_BREAKABLE = "_-/"


def check_images(images: Tensor, what: str) -> None:
    """Refuse anything but a stack of uint8 pictures.

    Args:
        images: Expected to be (N, H, W, 3) uint8, no side zero.
        what: How the message calls it.

    Raises:
        ValueError: If ``images`` is anything else.

    Example:
        >>> import torch
        >>> check_images(torch.zeros(2, 3, 8, 8), "images")
        Traceback (most recent call last):
        ...
        ValueError: images must be uint8 (N, H, W, 3) with N, H, W > 0, got torch.float32 (2, 3, 8, 8);...
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.numel() == 0:
        raise ValueError(
            f"{what} must be uint8 (N, H, W, 3) with N, H, W > 0, got {images.dtype} {tuple(images.shape)}; "
            "undo the normalisation, scale to 0..255 and move the channels last"
        )


@lru_cache(maxsize=1)
def font_path() -> str:
    """Where the DejaVu Sans that comes with matplotlib lies: the same letters on every machine.

    Returns:
        The path of the font file.

    Example:
        >>> font_path().endswith("DejaVuSans.ttf")
        True
    """
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=8)
def loaded_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all texts, ``size`` pixels high."""
    return ImageFont.truetype(font_path(), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font_path()).get_charmap())


def clean(text: str) -> str:
    r"""Make any text one drawable line.

    Args:
        text: Whatever a data set calls its classes.

    Returns:
        The text without line breaks, control and invisible characters; what the font lacks is a square.

    Example:
        >>> clean("tabby\n cat\x00 \U0001f408")
        'tabby cat □'
    """
    shown = []
    for character in unicodedata.normalize("NFC", text[:_LONGEST_TEXT]):
        category = unicodedata.category(character)
        if category in ("Cc", "Zs", "Zl", "Zp"):
            shown.append(" ")
        elif category != "Cf" and not "\ufe00" <= character <= "\ufe0f":  # joiners, variation selectors
            shown.append(character if ord(character) in _glyphs() else _MISSING)
    return " ".join("".join(shown).split())


def text_width(text: str, size: int = TEXT_SIZE) -> int:
    """Measure a line.

    Args:
        text: A cleaned line.
        size: Font size in pixels.

    Returns:
        Its width in whole pixels.

    Example:
        >>> text_width("") == 0 < text_width("i") < text_width("w")
        True
    """
    return int(np.ceil(loaded_font(size).getlength(text)))


def wrap(text: str, width: int, *, size: int = TEXT_SIZE, max_rows: int = 2) -> list[str]:
    """Break a line into rows that fit, the last one cut with an ellipsis where they don't suffice.

    Args:
        text: What to write; it is cleaned first.
        width: Pixels there are.
        size: Font size in pixels.
        max_rows: How many rows there may be.

    Returns:
        The rows, none for a text without a visible character.

    Example:
        >>> wrap("a long line", 40)
        ['a long', 'line']
    """
    rest = clean(text)
    rows: list[str] = []
    while rest:
        if text_width(rest, size) <= width:
            return [*rows, rest]
        if len(rows) == max_rows - 1:
            return [*rows, _cut(rest, width, size)]
        fitting = _fitting(rest, width, size)
        breaks = [at for at in range(1, fitting + 1) if _may_break(rest, at)]
        at = breaks[-1] if breaks else fitting
        rows.append(rest[:at].rstrip())
        rest = rest[at:].lstrip()
    return rows


def _fitting(text: str, width: int, size: int) -> int:
    """How many characters fit; one at least, so that wrapping gets on."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(text[:middle], size) <= width else (low, middle - 1)
    return low


def _may_break(text: str, at: int) -> bool:
    if text[at : at + 1] == " ":
        return True
    return text[at - 1] in _BREAKABLE and text[at - 2 : at - 1].isalpha()


def _cut(text: str, width: int, size: int) -> str:
    """Shorten to one row, but keep a short last word: it is often the number that matters."""
    _, _, last = text.rpartition(" ")
    tail = f"… {last}" if len(last) <= 6 and last != text else "…"
    room = width - text_width(tail, size)
    return text[: _fitting(text, room, size)].rstrip() + tail if room > size else "…"


def text_block(
    rows: Sequence[str],
    width: int,
    *,
    size: int = TEXT_SIZE,
    min_rows: int = 0,
    mark: tuple[int, int, int] | None = None,
) -> Tensor:
    """Write rows on white.

    Args:
        rows: Cleaned and wrapped lines.
        width: Width of the block in pixels; `usable_width` of it is for text.
        size: Font size in pixels.
        min_rows: Room is made for as many rows.
        mark: A colour for the first character of the first row.

    Returns:
        (h, width, 3) uint8.

    Example:
        >>> text_block(["tabby"], 60).shape
        torch.Size([23, 60, 3])
    """
    pitch = size + 4
    block = Image.new("RGB", (width, max(len(rows), min_rows) * pitch + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(block)
    for index, row in enumerate(rows):
        baseline = _MARGIN + index * pitch + size
        draw.text((_MARGIN, baseline), row, font=loaded_font(size), fill=INK, anchor="ls")
        if index == 0 and mark is not None:
            draw.text((_MARGIN, baseline), row[:1], font=loaded_font(size), fill=mark, anchor="ls")
    return torch.from_numpy(np.array(block))


def usable_width(width: int) -> int:
    """How much of a text block's width is for text.

    Args:
        width: Width of the block in pixels.

    Returns:
        Pixels for text, one at least.

    Example:
        >>> usable_width(100)
        94
    """
    return max(1, width - 2 * _MARGIN)


def stack(strips: Sequence[Tensor]) -> Tensor:
    """Put strips below each other, left-aligned on white.

    Args:
        strips: (h, w, 3) uint8 each; sizes may differ.

    Returns:
        (sum of h, largest w, 3) uint8.

    Example:
        >>> import torch
        >>> stack([torch.zeros(2, 5, 3, dtype=torch.uint8), torch.zeros(1, 3, 3, dtype=torch.uint8)]).shape
        torch.Size([3, 5, 3])
    """
    width = max(strip.shape[1] for strip in strips)
    padded = [torch.nn.functional.pad(strip, (0, 0, 0, width - strip.shape[1]), value=WHITE) for strip in strips]
    return torch.cat(padded)


def cells(pictures: Tensor, columns: int, gap: int, background: int) -> Tensor:
    """Lay pictures out in rows, with a gap around each.

    Args:
        pictures: (N, H, W, 3) uint8.
        columns: How many stand beside each other.
        gap: Pixels between two, and around all.
        background: Grey value of the gap.

    Returns:
        (h, w, 3) uint8.

    Example:
        >>> import torch
        >>> cells(torch.zeros(3, 4, 6, 3, dtype=torch.uint8), 2, 1, 255).shape
        torch.Size([11, 15, 3])
    """
    channels_first = pictures.permute(0, 3, 1, 2)
    if len(pictures) == 1:  # make_grid draws no gap around a single picture
        grid = torch.nn.functional.pad(channels_first[0], (gap,) * 4, value=background)
    else:
        grid = make_grid(channels_first, nrow=columns, padding=gap, pad_value=background)
    return grid.permute(1, 2, 0).contiguous()
