"""What a monitor hands to a sink: frozen values on the CPU that know nothing of models or loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Histogram", "Picture", "Record", "Scalar", "ScalarLayout", "Text"]


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture, ready to be encoded.

    Args:
        tag: Where it is shown, ``kind/what`` or ``kind/what/where``.
        image: (H, W, 3) uint8 on the CPU.

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
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.device.type != "cpu":
            raise ValueError(
                f"Picture {self.tag!r} takes a uint8 tensor (H, W, 3) on the CPU, got {image.dtype} "
                f"{tuple(image.shape)} on {image.device}"
            )


@dataclass(frozen=True, slots=True)
class Scalar:
    """One number.

    Args:
        tag: Where it is shown.
        value: The number; NaN and infinities are kept.

    Example:
        >>> Scalar("norms/weight/total", 12.5).value
        12.5
    """

    tag: str
    value: float


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counted values.

    Args:
        tag: Where it is shown.
        counts: (B,) float64 on the CPU: how many finite values fell into each bin.
        edges: (B + 1,) float64, increasing: bin i holds ``edges[i] <= value < edges[i + 1]``, the last bin
            its upper edge too.
        total: Sum of the finite values.
        total_of_squares: Sum of their squares.

    Raises:
        ValueError: If counts and edges do not fit together.

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
        """How many values were counted."""
        return float(self.counts.sum())


@dataclass(frozen=True, slots=True)
class Text:
    """A remark.

    Args:
        tag: Where it is shown.
        markdown: What it says.

    Example:
        >>> Text("cam/gradcam", "**averaged** weights").markdown
        '**averaged** weights'
    """

    tag: str
    markdown: str


@dataclass(frozen=True, slots=True)
class ScalarLayout:
    """Which scalars share a chart; a logger without such charts passes it over.

    Args:
        category: The heading above the charts.
        charts: A title for each chart, and the tags (regular expressions) of the curves in it.

    Example:
        >>> ScalarLayout("norms", {"weights": [r"norms/weight/.*"]}).category
        'norms'
    """

    category: str
    charts: Mapping[str, Sequence[str]]


Record = Picture | Scalar | Histogram | Text | ScalarLayout
