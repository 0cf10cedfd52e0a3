"""Tensors that differ from one tensor within a window each, and how operations with a kernel change the windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Windows", "align"]


@dataclass(frozen=True)
class Windows:
    """Tensors (P, C, H, W) that differ from a base within one window each.

    Args:
        base: (1, C, H, W).
        inside: (P, C, h, w) the values within the windows.
        tops: The windows' first rows.
        lefts: The windows' first columns.
    """

    base: Tensor
    inside: Tensor
    tops: list[int]
    lefts: list[int]

    def map(self, function: Callable[[Tensor], Tensor]) -> Windows:
        """Apply an element-wise function."""
        return Windows(function(self.base), function(self.inside), self.tops, self.lefts)

    def crop(
        self,
        tops: list[int],
        lefts: list[int],
        size: tuple[int, int],
        padding: Sequence[int] = (0, 0),
        value: float = 0,
    ) -> Tensor:
        """Return (P, C, *size), one crop of each tensor, at positions in the padded tensors."""
        pad_y, pad_x = padding
        base = pad(self.base, (pad_x, pad_x, pad_y, pad_y), value=value) if any(padding) else self.base
        (height, width), (h, w) = size, self.inside.shape[2:]
        crops = base.new_empty((len(tops), base.shape[1], height, width))
        for index, (top, left) in enumerate(zip(tops, lefts, strict=True)):
            crops[index] = base[0, :, top : top + height, left : left + width]
            # The window's position in the crop, beyond whose borders it may extend.
            y, x = self.tops[index] + pad_y - top, self.lefts[index] + pad_x - left
            visible = crops[index, :, max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)]
            if visible.numel():
                first_y, first_x = max(-y, 0), max(-x, 0)
                rows, columns = visible.shape[1:]
                visible.copy_(self.inside[index, :, first_y : first_y + rows, first_x : first_x + columns])
        return crops

    def full(self) -> Tensor:
        """Return the tensors (P, C, H, W)."""
        zeros = [0] * len(self.tops)
        height, width = self.base.shape[2:]
        return self.crop(zeros, zeros, (height, width))

    def slide(
        self,
        function: Callable[..., Tensor],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        value: float = 0,
    ) -> Windows:
        """Apply a function ``(tensor, padding)`` that slides a kernel over its input."""
        tops, height = _output_intervals(
            self.tops, self.inside.shape[2], self.base.shape[2], kernel[0], stride[0], padding[0]
        )
        lefts, width = _output_intervals(
            self.lefts, self.inside.shape[3], self.base.shape[3], kernel[1], stride[1], padding[1]
        )
        crops = self.crop(
            [top * stride[0] for top in tops],
            [left * stride[1] for left in lefts],
            ((height - 1) * stride[0] + kernel[0], (width - 1) * stride[1] + kernel[1]),
            padding,
            value,
        )
        return Windows(function(self.base, padding=tuple(padding)), function(crops, padding=0), tops, lefts)


def _output_intervals(
    starts: list[int], length: int, side: int, kernel: int, stride: int, padding: int
) -> tuple[list[int], int]:
    """Return where the outputs begin that depend on input intervals, and the largest number of them."""
    outputs = (side + 2 * padding - kernel) // stride + 1
    first = [max(0, -((kernel - 1 - padding - start) // stride)) for start in starts]
    last = [min(outputs - 1, (start + length - 1 + padding) // stride) for start in starts]
    longest = max(1, *(end - begin + 1 for begin, end in zip(first, last, strict=True)))
    return [min(begin, outputs - longest) for begin in first], longest


def align(operands: list[Windows]) -> list[Windows]:
    """Return the same tensors with windows of one size at the same positions."""
    positions = [(windows.tops, windows.lefts) for windows in operands]
    sizes = {windows.inside.shape[2:] for windows in operands}
    if all(position == positions[0] for position in positions) and len(sizes) == 1:
        return operands
    height, width = operands[0].base.shape[2:]
    tops, h = _enclosing_intervals([(windows.tops, windows.inside.shape[2]) for windows in operands], height)
    lefts, w = _enclosing_intervals([(windows.lefts, windows.inside.shape[3]) for windows in operands], width)
    return [Windows(windows.base, windows.crop(tops, lefts, (h, w)), tops, lefts) for windows in operands]


def _enclosing_intervals(intervals: list[tuple[list[int], int]], side: int) -> tuple[list[int], int]:
    """Return the starts and the common length of intervals that enclose several ones each."""
    starts = [min(group) for group in zip(*(starts for starts, _ in intervals), strict=True)]
    ends = [
        max(group)
        for group in zip(*([start + length for start in starts] for starts, length in intervals), strict=True)
    ]
    longest = max(end - start for start, end in zip(starts, ends, strict=True))
    return [min(start, side - longest) for start in starts], longest
