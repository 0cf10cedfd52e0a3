"""What monitors write to sinks: frozen values on the CPU, independent of models and loggers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Histogram", "Picture", "Record", "Scalar", "ScalarLayout", "Table", "Text"]

Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image, ready to be encoded.

    Args:
        tag: Its name in the logger, ``kind/what`` or ``kind/what/where``.
        image: (H, W, 3) uint8 on the CPU, H and W at least 1.

    Raises:
        ValueError: If ``image`` is anything else.

    Example:
        >>> Picture("cam/gradcam", torch.zeros(4, 6, 3, dtype=torch.uint8)).image.shape
        torch.Size([4, 6, 3])
    """

    tag: str
    image: Tensor

    def __post_init__(self) -> None:
        image = self.image
        is_image = image.dtype == torch.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.numel() > 0
        if not is_image or image.device.type != "cpu":
            raise ValueError(
                f"Picture {self.tag!r} takes a uint8 tensor (H, W, 3) on the CPU, got {image.dtype} "
                f"{tuple(image.shape)} on {image.device}"
            )


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number.

    Args:
        tag: Its name in the logger.
        value: The number; NaN and infinities are kept.

    Example:
        >>> Scalar("norms/weight/total", 12.5).value
        12.5
    """

    tag: str
    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Values counted in bins.

    Args:
        tag: Its name in the logger.
        counts: (B,) float64 on the CPU, the number of finite values in each bin.
        edges: (B + 1,) float64, increasing: bin i holds ``edges[i] <= value < edges[i + 1]``, the last bin
            its upper edge too.
        total: Sum of the finite values.
        total_of_squares: Sum of their squares.

    Raises:
        ValueError: If the shapes of counts and edges do not match.

    Example:
        >>> edges = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        >>> Histogram("weights/fc", torch.ones(2, dtype=torch.float64), edges, 2.0, 2.5).count
        2.0
    """

    tag: str
    counts: Tensor
    edges: Tensor
    total: float
    total_of_squares: float

    def __post_init__(self) -> None:
        if self.counts.ndim != 1 or len(self.counts) == 0 or self.edges.shape != (len(self.counts) + 1,):
            raise ValueError(
                f"Histogram {self.tag!r} takes counts (B,) and edges (B + 1,), got {tuple(self.counts.shape)} "
                f"and {tuple(self.edges.shape)}"
            )

    @property
    def count(self) -> float:
        """The number of counted values."""
        return float(self.counts.sum())


@dataclass(frozen=True, slots=True)
class Text:
    """Text.

    Args:
        tag: Its name in the logger.
        markdown: The text, in Markdown.

    Example:
        >>> Text("cam/gradcam", "**averaged** weights").markdown
        '**averaged** weights'
    """

    tag: str
    markdown: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under named columns.

    Args:
        tag: Its name in the logger.
        columns: The names of the columns, at least one, all different.
        rows: The rows, each with a cell for every column: ``str``, ``int``, ``float``, ``bool`` or None.

    Raises:
        ValueError: If a row has another length, a cell another type, or the columns are not such names.

    Example:
        >>> table = Table("trust/faithfulness", ("method", "AUC"), [("gradcam", 0.75), ("random", None)])
        >>> print(table.to_markdown())
        | method | AUC |
        | --- | ---: |
        | gradcam | 0.75 |
        | random |  |
    """

    tag: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        if isinstance(self.columns, str) or not self.columns or not all(isinstance(name, str) for name in self.columns):
            raise ValueError(f"Table {self.tag!r} takes the names of one or more columns, got {self.columns!r}")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"Table {self.tag!r} takes columns of different names, got {self.columns!r}")
        for index, row in enumerate(self.rows):
            if isinstance(row, str) or len(row) != len(self.columns):
                raise ValueError(f"Table {self.tag!r} takes rows of {len(self.columns)} cells, got {row!r} as {index}")
            for cell in row:
                if cell is not None and not isinstance(cell, (str, int, float)):
                    raise ValueError(
                        f"Table {self.tag!r} takes cells of str, int, float, bool or None, got "
                        f"{type(cell).__name__} in row {index}"
                    )
        # Tuples, since a table is written later and on another thread.
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(map(tuple, self.rows)))

    def to_markdown(self) -> str:
        """Return the table in Markdown: numbers to the right and with six significant digits, None as nothing."""
        rule = ["---:" if self._is_numeric(index) else "---" for index in range(len(self.columns))]
        lines = [map(_escape, self.columns), rule]
        lines += [[_escape(_to_text(cell)) for cell in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _is_numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in cells)


def _to_text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return "" if cell is None else str(cell)


def _escape(text: str) -> str:
    return re.sub(r"([\\|*`])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


@dataclass(frozen=True, slots=True)
class ScalarLayout:
    """Which scalars share a chart, for loggers with such charts.

    Args:
        category: The heading above the charts.
        charts: The title of each chart, with the tags (regular expressions) of its curves.

    Example:
        >>> ScalarLayout("norms", {"weights": [r"norms/weight/.*"]}).category
        'norms'
    """

    category: str
    charts: Mapping[str, Sequence[str]]


Record = Picture | Scalar | Histogram | Text | Table | ScalarLayout
