"""Text in pictures: cleaned, wrapped, measured and drawn in one font on every machine."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["clean", "draw_text", "text_block", "text_width", "usable_width", "wrap"]

Pixels = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

TEXT_SIZE = 13
INK: Color = (20, 20, 20)
_MARGIN = 3
_MAX_LENGTH = 500
_MISSING = "\N{WHITE SQUARE}"
_BREAKABLE = "_-/"


@lru_cache(maxsize=1)
def _font_path() -> str:
    """Return the path of DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_path()).get_charmap())


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    r"""Return any text as one drawable line.

    Args:
        text: Such as a class name of a data set.

    Returns:
        The text without line breaks, control and invisible characters; characters that the font lacks become squares.

    Example:
        >>> clean("tabby\n cat\x00 \U0001f408")
        'tabby cat □'
    """
    shown = []
    for character in unicodedata.normalize("NFC", text[:_MAX_LENGTH]):
        category = unicodedata.category(character)
        if category in ("Cc", "Zs", "Zl", "Zp"):
            shown.append(" ")
        elif category != "Cf" and not "\ufe00" <= character <= "\ufe0f":  # joiners, variation selectors
            shown.append(character if ord(character) in _glyphs() else _MISSING)
    return " ".join("".join(shown).split())


@lru_cache(maxsize=4096)
def text_width(text: str, size: int = TEXT_SIZE) -> int:
    """Return the width of a line.

    Args:
        text: A cleaned line.
        size: Font size in pixels.

    Returns:
        Whole pixels.

    Example:
        >>> text_width("") == 0 < text_width("i") < text_width("w")
        True
    """
    return int(np.ceil(_font(size).getlength(text)))


def wrap(text: str, width: int, *, size: int = TEXT_SIZE, max_rows: int = 2) -> list[str]:
    """Break a line into rows of limited width, the last one shortened with an ellipsis if needed.

    Args:
        text: The line; it is cleaned first.
        width: Maximum width in pixels.
        size: Font size in pixels.
        max_rows: Maximum number of rows.

    Returns:
        The rows, none for a text without a visible character.

    Example:
        >>> wrap("a long line", 40)
        ['a long', 'line']
    """
    remaining = clean(text)
    rows: list[str] = []
    while remaining:
        if text_width(remaining, size) <= width:
            return [*rows, remaining]
        if len(rows) == max_rows - 1:
            return [*rows, _shorten(remaining, width, size)]
        fitting = _fitting_length(remaining, width, size)
        breaks = [at for at in range(1, fitting + 1) if _may_break(remaining, at)]
        at = breaks[-1] if breaks else fitting
        rows.append(remaining[:at].rstrip())
        remaining = remaining[at:].lstrip()
    return rows


def _fitting_length(text: str, width: int, size: int) -> int:
    """Return how many characters fit, at least one so that wrapping ends."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(text[:middle], size) <= width else (low, middle - 1)
    return low


def _may_break(text: str, at: int) -> bool:
    if text[at : at + 1] == " ":
        return True
    return text[at - 1] in _BREAKABLE and text[at - 2 : at - 1].isalpha()


def _shorten(text: str, width: int, size: int) -> str:
    """Shorten to one row, but keep a short last word: it is often the number that matters."""
    _, _, last = text.rpartition(" ")
    tail = f"… {last}" if len(last) <= 6 and last != text else "…"
    room = width - text_width(tail, size)
    return text[: _fitting_length(text, room, size)].rstrip() + tail if room > size else "…"


@lru_cache(maxsize=1024)  # layer names and labels come back in every picture, and FreeType is slow
def _inked(text: str, size: int, color: Color) -> tuple[Pixels, int, int]:
    """Return a line on white, with its left and upper edge relative to its start on the baseline."""
    left, top, right, bottom = map(int, _font(size).getbbox(text, anchor="ls"))
    image = Image.new("RGB", (max(right - left, 1), max(bottom - top, 1)), "white")
    ImageDraw.Draw(image).text((-left, -top), text, font=_font(size), fill=color, anchor="ls")
    return np.array(image), left, top


def draw_text(
    canvas: Pixels,
    text: str,
    x: float,
    baseline: float,
    *,
    size: int = TEXT_SIZE,
    color: Color = INK,
    align: Literal["left", "center", "right"] = "left",
    upwards: bool = False,
) -> None:
    """Draw a line onto white; whatever lies outside the picture is clipped.

    Args:
        canvas: (H, W, 3) uint8, changed in place.
        text: A cleaned line.
        x: Column of the line's left end, middle or right end, see ``align``.
        baseline: Row of the baseline.
        size: Font size in pixels.
        color: Red, green and blue, 0 to 255.
        align: Which point of the line is at ``x``.
        upwards: Whether the line runs from bottom to top; then ``x`` is the column of the baseline, and ``baseline``
            the row of the line's lower end, middle or upper end.

    Example:
        >>> canvas = np.full((20, 40, 3), 255, np.uint8)
        >>> draw_text(canvas, "tabby", 2, 15)
        >>> bool((canvas < 100).any())
        True
    """
    if not text:
        return
    line, left, top = _inked(text, size, color)
    shift = {"left": 0.0, "center": text_width(text, size) / 2, "right": float(text_width(text, size))}[align]
    if upwards:
        line = np.rot90(line)
        row, column = round(baseline + shift) - left - line.shape[0], round(x) + top
    else:
        row, column = round(baseline) + top, round(x - shift) + left
    part = canvas[max(row, 0) : max(row + line.shape[0], 0), max(column, 0) : max(column + line.shape[1], 0)]
    line = line[max(-row, 0) :, max(-column, 0) :][: part.shape[0], : part.shape[1]]
    np.minimum(part, line, out=part)


def text_block(
    rows: Sequence[str],
    width: int,
    *,
    size: int = TEXT_SIZE,
    min_rows: int = 0,
    mark: Color | None = None,
) -> Tensor:
    """Write rows on white.

    Args:
        rows: Cleaned and wrapped lines.
        width: Width of the block in pixels; `usable_width` of it is for text.
        size: Font size in pixels.
        min_rows: The height is that of at least as many rows.
        mark: A colour for the first character of the first row.

    Returns:
        (h, width, 3) uint8.

    Example:
        >>> text_block(["tabby"], 60).shape
        torch.Size([23, 60, 3])
    """
    pitch = size + 4
    block = np.full((max(len(rows), min_rows) * pitch + 2 * _MARGIN, width, 3), 255, np.uint8)
    for index, row in enumerate(rows):
        baseline = _MARGIN + index * pitch + size
        marked = 1 if index == 0 and mark is not None else 0
        if marked:
            draw_text(block, row[:1], _MARGIN, baseline, size=size, color=mark or INK)
        draw_text(block, row[marked:], _MARGIN + _font(size).getlength(row[:marked]), baseline, size=size)
    return torch.from_numpy(block)


def usable_width(width: int) -> int:
    """Return how much of a text block's width is for text.

    Args:
        width: Width of the block in pixels.

    Returns:
        Pixels for text, at least one.

    Example:
        >>> usable_width(100)
        94
    """
    return max(1, width - 2 * _MARGIN)
