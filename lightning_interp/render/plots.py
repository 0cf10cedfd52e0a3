"""Numbers of many layers over a run, as one labelled picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, log

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_interp.render.colors import color_table
from lightning_interp.render.text import Color, Pixels, clean, draw_text, text_width, wrap

__all__ = ["history_heatmap"]

Values = npt.NDArray[np.float64]
_TEXT = 12
_TITLE = 14
_TO_MIDDLE = 4  # from the middle of a line of text down to its baseline
_ROW = 18
_MAX_ROWS = 120
_NAME_LENGTH = 44
_COLUMN = 14
_TOP, _BOTTOM, _BAR = 36, 46, 16
_TICK = 4
_BLACK: Color = (0, 0, 0)
_BELOW: Color = (0, 0, 0)
_NOT_FINITE: Color = (211, 211, 211)
_DECADES = 8  # so that a single dying layer leaves the other layers most of the colours


def history_heatmap(
    names: Sequence[str],
    steps: Sequence[int],
    values: Tensor,
    title: str,
    label: str,
) -> Tensor:
    """Draw one number of many layers over the steps at which it was logged.

    Args:
        names: L layer names, from top to bottom.
        steps: S steps, from left to right, all equally wide.
        values: (L, S) real. If none is negative, the colours are logarithmic over at most eight decades, with smaller
            values (such as 0) in black; cells that are not finite are light grey.
        title: Drawn above.
        label: The quantity, drawn beside the colour bar.

    Returns:
        (h, w, 3) uint8 on the CPU; its height grows with L up to 120 layers, beyond which only some are named.

    Raises:
        ValueError: If the shape of ``values`` does not match the names and steps, or is empty.

    Example:
        >>> import torch
        >>> picture = history_heatmap(["conv1", "fc"], [0, 10], torch.rand(2, 2), "Weights", "L2 norm")
        >>> picture.dtype, picture.shape[2]
        (torch.uint8, 3)
    """
    if values.shape != (len(names), len(steps)) or values.numel() == 0:
        raise ValueError(
            f"values must be (layers, steps) = ({len(names)}, {len(steps)}), both at least 1, got {tuple(values.shape)}"
        )
    table = values.detach().cpu().double().numpy()
    scale = _Scale.of(table)
    shown_names = [_short(name) for name in names]
    bar_labels = {share: f"{scale.value_at(share):.3g}" for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
    # Sizes in pixels, from the widths of the texts, so that none is clipped.
    left = max(*(text_width(name, _TEXT) + 14 for name in shown_names), text_width(f"{steps[0]}", _TEXT) // 2 + 2)
    width = min(max(len(steps) * _COLUMN, 300), 700)
    height = max(min(len(names), _MAX_ROWS) * _ROW, 90)
    bar = left + width + 14
    label_at = bar + _BAR + 20 + max(text_width(text, _TEXT) for text in bar_labels.values()) + _TEXT
    canvas = np.full((_TOP + height + _BOTTOM, max(label_at + 10, 480), 3), 255, np.uint8)

    draw_text(canvas, _one_row(title, canvas.shape[1] - 20, _TITLE), 10, 22, size=_TITLE, color=_BLACK)
    _draw_cells(canvas, scale.colors(table), left, width, height)
    _draw_names(canvas, shown_names, left, height)
    _draw_steps(canvas, steps, left, width, _TOP + height)
    gradient = scale.table()[(np.arange(height)[::-1] * 256 + 128) // height]
    _draw_cells(canvas, gradient[:, None], bar, _BAR, height)
    for share, text in bar_labels.items():
        row = _TOP + round((1 - share) * (height - 1))
        canvas[row, bar + _BAR + 1 : bar + _BAR + 1 + _TICK] = _BLACK
        draw_text(canvas, text, bar + _BAR + 8, row + _TO_MIDDLE, size=_TEXT, color=_BLACK)
    label = _one_row(label, height + _BOTTOM - 10, _TEXT)
    # A label that is longer than the heatmap reaches further down, as the title is above.
    middle = _TOP + (height if text_width(label, _TEXT) < height else height + _BOTTOM - 10) / 2
    draw_text(canvas, label, label_at, middle, size=_TEXT, color=_BLACK, align="center", upwards=True)
    return torch.from_numpy(canvas)


def _one_row(text: str, width: int, size: int) -> str:
    return "".join(wrap(text, width, size=size, max_rows=1))


def _draw_cells(canvas: Pixels, colors: Pixels, left: int, width: int, height: int) -> None:
    """Draw (rows, columns, 3) colours over a rectangle, in a black frame."""
    framed = canvas[_TOP - 1 : _TOP + height + 1, left - 1 : left + width + 1]
    framed[[0, -1]] = framed[:, [0, -1]] = _BLACK
    rows, columns = _nearest(colors.shape[0], height), _nearest(colors.shape[1], width)
    np.take(colors[:, columns], rows, axis=0, out=framed[1:-1, 1:-1], mode="clip")


def _nearest(cells: int, pixels: int) -> npt.NDArray[np.int64]:
    """Return the cell in which the middle of each pixel is."""
    return (2 * np.arange(pixels) + 1) * cells // (2 * pixels)


def _draw_names(canvas: Pixels, names: Sequence[str], left: int, height: int) -> None:
    """Draw the names beside their rows, as many as there is room for."""
    for index in range(0, len(names), ceil(len(names) / _MAX_ROWS)):
        baseline = _TOP + (index + 0.5) * height / len(names) + _TO_MIDDLE
        draw_text(canvas, names[index], left - 6, baseline, size=_TEXT, color=_BLACK, align="right")


def _draw_steps(canvas: Pixels, steps: Sequence[int], left: int, width: int, bottom: int) -> None:
    """Draw the steps below their columns, as many as there is room for."""
    labels = [f"{step}" for step in steps]
    column_width = width / len(steps)
    spacing = ceil((text_width(max(labels, key=len), _TEXT) + 14) / column_width)
    for column in _labelled_columns(len(steps), spacing):
        x = left + (column + 0.5) * column_width
        canvas[bottom + 1 : bottom + 1 + _TICK, int(x)] = _BLACK
        draw_text(canvas, labels[column], x, bottom + 17, size=_TEXT, color=_BLACK, align="center")
    draw_text(canvas, "step", left + width / 2, bottom + 36, size=_TEXT, color=_BLACK, align="center")


def _labelled_columns(count: int, spacing: int) -> list[int]:
    """Return columns at least ``spacing`` apart: the last, and as many as possible from the first on."""
    last = count - 1
    return [*(column for column in range(0, last, spacing) if last - column >= spacing), last]


def _short(name: str) -> str:
    """Shorten long names in the middle: the block's number and the kind of weight are at the ends."""
    name = clean(name)
    if len(name) <= _NAME_LENGTH:
        return name
    half = (_NAME_LENGTH - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


@dataclass(frozen=True)
class _Scale:
    """Values to colours, from ``low`` to ``high``, linear or logarithmic."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def of(cls, values: Values) -> _Scale:
        finite = values[np.isfinite(values)]
        if not len(finite):
            return cls(0.0, 1.0)
        low, high = float(finite.min()), float(finite.max())
        if low >= 0 and high > 0:
            low = max(float(finite[finite > 0].min()), high * 10.0**-_DECADES)
            return cls(low, high, True) if high / low > 1.001 else cls(low / 2, high * 2, True)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            margin = abs(low) / 2 or 0.5
            low, high = low - margin, high + margin
        return cls(low, high)

    def value_at(self, share: float) -> float:
        """Return the value at a share of the way from low to high."""
        if self.is_log:
            return exp(log(self.low) + share * (log(self.high) - log(self.low)))
        return self.low + share * (self.high - self.low)

    def colors(self, values: Values) -> Pixels:
        """Return a colour for each value: (..., 3) uint8."""
        finite = np.isfinite(values)
        clipped = np.clip(np.where(finite, values, self.low), self.low, self.high)
        if self.is_log:
            shares = np.log(clipped / self.low) / log(self.high / self.low)
        else:
            shares = (clipped - self.low) / (self.high - self.low)
        colors: Pixels = self.table()[np.minimum((shares * 256).astype(np.int64), 255)]
        if self.is_log:
            colors[values < self.low] = _BELOW
        colors[~finite] = _NOT_FINITE
        return colors

    @staticmethod
    def table() -> Pixels:
        """Return the 256 colours from low to high."""
        table: Pixels = color_table("viridis").numpy()
        return table
