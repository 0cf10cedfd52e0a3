"""Numbers of many layers over the run, as one labelled picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_interp.render.canvas import clean, font_path, loaded_font, text_width, wrap

if TYPE_CHECKING:
    from matplotlib.colors import Normalize

__all__ = ["history_heatmap"]

Table = np.ndarray[Any, np.dtype[np.float64]]
_DPI = 100
_TEXT = 12
_ROW = 18
_MOST_ROWS = 120
_NAME_LENGTH = 44
_COLUMN = 14
_TOP, _BOTTOM, _BAR = 36, 46, 16
_DECADES = 8  # a single dying layer must not wash out the colours of the others


def history_heatmap(
    names: Sequence[str],
    steps: Sequence[int],
    values: Tensor,
    title: str,
    label: str,
) -> Tensor:
    """Draw one number of many layers over the steps at which it was logged.

    Args:
        names: L layer names, drawn from top to bottom.
        steps: S steps, drawn from left to right, all equally wide.
        values: (L, S) real. Where none is negative the colours are logarithmic, over eight decades at most,
            what is smaller (such as 0) in black; non-finite cells are light grey.
        title: Stands above.
        label: What the numbers are, beside the colour bar.

    Returns:
        (h, w, 3) uint8 on the CPU; its height grows with L up to 120 layers, then only some are named.

    Raises:
        ValueError: If ``values`` doesn't fit the names and steps, or is empty.

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
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    table = values.detach().cpu().double().numpy()
    shown_names = [_short(name) for name in names]
    # Sizes in pixels, from the widths of the texts, so that no name is cut off.
    left = max(text_width(name, _TEXT) for name in shown_names) + 14
    inner_width = min(max(len(steps) * _COLUMN, 300), 700)
    inner_height = max(min(len(names), _MOST_ROWS) * _ROW, 90)
    norm = _norm(table)
    bar_ticks = _bar_ticks(norm)
    bar_names = [f"{value:.3g}" for value in bar_ticks]
    bar_left = left + inner_width + 14
    label_left = bar_left + _BAR + 18 + max(text_width(name, _TEXT) for name in bar_names)
    width = max(label_left + _TEXT + 12, 480)
    title = "".join(wrap(title, width - 20, size=_TEXT + 2, max_rows=1))
    height = _TOP + inner_height + _BOTTOM

    font = FontProperties(fname=font_path(), size=_TEXT * 72 / _DPI)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white", edgecolor="white")
    canvas = cast(Any, FigureCanvasAgg(figure))

    def box(x: float, w: float) -> tuple[float, float, float, float]:
        return x / width, _BOTTOM / height, w / width, inner_height / height

    axes = figure.add_axes(box(left, inner_width))
    picture = axes.imshow(
        _drawable(table, norm),
        cmap=colormaps["viridis"].with_extremes(bad="lightgrey", under="black"),
        norm=norm,
        aspect="auto",
        interpolation="nearest",
        origin="upper",
    )
    bar = figure.colorbar(picture, cax=figure.add_axes(box(bar_left, _BAR)))
    bar.ax.minorticks_off()
    bar.ax.set_yticks(bar_ticks, bar_names)
    figure.text(
        (label_left + _TEXT / 2) / width,
        (_BOTTOM + inner_height / 2) / height,
        "".join(wrap(label, height - 20, size=_TEXT, max_rows=1)),
        fontproperties=font,
        color="black",
        rotation=90,
        ha="center",
        va="center",
        parse_math=False,
    )

    axes.set_yticks([])  # matplotlib takes longer over a hundred names than over all the rest
    columns = range(0, len(steps), ceil(len(steps) * 70 / inner_width))
    axes.set_xticks(columns, [f"{steps[column]}" for column in columns])
    axes.set_xlabel("step", fontproperties=font, color="black", labelpad=2)
    figure.text(
        10 / width,
        1 - 11 / height,
        title,
        fontproperties=FontProperties(fname=font_path(), size=(_TEXT + 2) * 72 / _DPI),
        color="black",
        va="top",
        parse_math=False,
    )
    _plain(axes, font)
    _plain(bar.ax, font)
    canvas.draw()
    drawn = Image.fromarray(np.array(canvas.buffer_rgba())[..., :3])
    _write_names(drawn, shown_names, left, height - _BOTTOM - inner_height, inner_height)
    return torch.from_numpy(np.array(drawn))


def _write_names(picture: Image.Image, names: list[str], right: int, top: int, height: int) -> None:
    """Put each name beside its row, as many as there is room for."""
    draw = ImageDraw.Draw(picture)
    for index in range(0, len(names), ceil(len(names) / _MOST_ROWS)):
        middle = top + (index + 0.5) * height / len(names)
        draw.text((right - 6, middle), names[index], fill="black", font=loaded_font(_TEXT), anchor="rm")


def _short(name: str) -> str:
    """Long names lose their middle: the block's number and the kind of weight stand at the ends."""
    name = clean(name)
    if len(name) <= _NAME_LENGTH:
        return name
    half = (_NAME_LENGTH - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _norm(table: Table) -> Normalize:
    from matplotlib.colors import LogNorm, Normalize

    finite = table[np.isfinite(table)]
    if not len(finite):
        return Normalize(0.0, 1.0)
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and high > 0:
        low = max(float(finite[finite > 0].min()), high * 10.0**-_DECADES)
        return LogNorm(low, high) if high / low > 1.001 else LogNorm(low / 2, high * 2)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    return Normalize(low, high)


def _bar_ticks(norm: Normalize) -> list[float]:
    """Five numbers from end to end say more than the one power of ten that a narrow range holds."""
    ends = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    return [float(value) for value in np.asarray(norm.inverse(ends))]


def _drawable(table: Table, norm: Normalize) -> Table:
    from matplotlib.colors import LogNorm

    table = np.where(np.isfinite(table), table, np.nan)
    # A logarithm would leave zeros out, as it does what is not finite.
    return np.maximum(table, float(norm.vmin or 0.0) / 10) if isinstance(norm, LogNorm) else table


def _plain(axes: Any, font: Any) -> None:
    """Black on white in our own font, whatever style the user has set for plots."""
    axes.set_facecolor("white")
    axes.grid(False)
    axes.tick_params(which="both", colors="black")
    for spine in axes.spines.values():
        spine.set_edgecolor("black")
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_fontproperties(font)
        text.set_color("black")
        text.set_parse_math(False)
