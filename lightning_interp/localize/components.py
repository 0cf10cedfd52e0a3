"""The component tree: the connected components of a map at every threshold, in one pass.

A component above a threshold only grows as the threshold falls, until it merges with another. So all components at
all thresholds form a tree with at most one node a pixel. Every pixel is assigned to a hill, the set of pixels from
which steepest ascent leads to one peak; hills are few, and only their merging at saddles needs a loop in Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter  # type: ignore[attr-defined]

__all__ = ["ComponentTree", "component_tree"]

Ints = NDArray[np.int64]
Numbers = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class ComponentTree:
    """All 8-connected components of ``levels >= level``, for each level from 1 to ``n_levels``.

    Args:
        boxes: (M, 4) int64, the components' x1, y1, x2, y2 in pixels, maxima exclusive.
        half_areas: (M,) int64, twice their areas: a square of four neighbouring pixels counts 2 where all four
            belong to the component, 1 where three do.
        counts: (M,) int64, their numbers of pixels.
        firsts: (M,) int64, the index of their first pixel in reading order.
        lowest: (M,) int64, the lowest level at which the component consists of these pixels.
        highest: (M,) int64, the highest such level.
        n_levels: Number of levels.
    """

    boxes: Ints
    half_areas: Ints
    counts: Ints
    firsts: Ints
    lowest: Ints
    highest: Ints
    n_levels: int

    def max_per_level(self, values: Numbers, default: float) -> Numbers:
        """Return the maximum over the components of each level.

        Args:
            values: (M,), one for each component.
            default: The value of a level without components; no value may be lower.

        Returns:
            (n_levels,), for the levels 1 to ``n_levels``.

        Example:
            >>> import numpy as np
            >>> tree = component_tree(np.array([[1, 0, 3]]), 3)
            >>> tree.max_per_level(tree.counts, 0)
            array([1, 1, 1])
        """
        # A span of levels is covered by two blocks of 2**k levels; the maxima of blocks then go to their halves.
        size = np.log2(self.highest - self.lowest + 1).astype(np.int64)
        table = np.full((int(size.max(initial=0)) + 1, self.n_levels), default, dtype=values.dtype)
        np.maximum.at(table, (size, self.lowest - 1), values)
        np.maximum.at(table, (size, self.highest - (1 << size)), values)
        for row in range(len(table) - 1, 0, -1):
            half = 1 << (row - 1)
            np.maximum(table[row - 1], table[row], out=table[row - 1])
            np.maximum(table[row - 1, half:], table[row, :-half], out=table[row - 1, half:])
        maxima: Numbers = table[0]
        return maxima

    def largest_boxes(self) -> Ints:
        """Return the box of the largest component of each level.

        The largest is the one of the greatest area; of several, the one with most pixels; of several, the first in
        reading order.

        Returns:
            (n_levels, 4) int64, for the levels 1 to ``n_levels``; 0, 0, 0, 0 for a level without components.

        Example:
            >>> import numpy as np
            >>> component_tree(np.array([[1, 0, 3]]), 3).largest_boxes().tolist()
            [[0, 0, 1, 1], [2, 0, 3, 1], [2, 0, 3, 1]]
        """
        order = np.lexsort((-self.firsts, self.counts, self.half_areas))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        boxes = np.concatenate([self.boxes[order], np.zeros((1, 4), np.int64)])  # the last row has index -1, too
        largest: Ints = boxes[self.max_per_level(rank, -1)]
        return largest


def component_tree(levels: NDArray[np.integer[Any]], n_levels: int) -> ComponentTree:
    """Find the 8-connected components of ``levels >= level`` for all levels at once.

    Args:
        levels: (H, W) integers from 0, which is in no component, to ``n_levels``.
        n_levels: Number of levels.

    Returns:
        The tree's nodes, one for each component and span of levels over which it does not change.

    Example:
        >>> import numpy as np
        >>> tree = component_tree(np.array([[2, 1, 2], [0, 0, 0]]), 2)
        >>> for box, lowest, highest in zip(tree.boxes.tolist(), tree.lowest, tree.highest):
        ...     print(box, int(lowest), int(highest))
        [2, 0, 3, 1] 2 2
        [0, 0, 3, 1] 1 1
        [0, 0, 1, 1] 2 2

    Reference:
        Najman and Couprie, "Building the component tree in quasi-linear time", IEEE TIP 2006.
    """
    # Pixels of one level are ordered by their index, so that no two are equal and no plateau ends an ascent.
    keys = levels.astype(np.int64) * levels.size + np.arange(levels.size).reshape(levels.shape)
    hills, n_hills = _hills(keys, levels.astype(np.int64).ravel())
    parents, merge_levels = _merge(n_hills, *_saddles(hills.reshape(levels.shape), levels))
    inside = np.flatnonzero(levels)
    level = levels.ravel()[inside].astype(np.int64)
    root = _root(hills[inside], level, parents, merge_levels)

    # A node is a hill's component at a level at which it gains pixels: codes sort nodes by hill, then down the levels.
    codes = root * (n_levels + 1) + (n_levels - level)
    order = np.argsort(codes)
    pixels, codes = inside[order], codes[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    nodes = codes[starts]
    root, level = nodes // (n_levels + 1), n_levels - nodes % (n_levels + 1)
    sums = [np.add.reduceat(numbers, starts) for numbers in (_half_areas(keys)[pixels], np.ones_like(pixels))]
    columns = pixels % levels.shape[1]
    bounds = [np.minimum.reduceat(numbers, starts) for numbers in (pixels, columns, -pixels, -columns)]

    # The node below a node: its hill's next one, or, for the hill's last, one of the hill that it merges with.
    below = np.arange(1, len(nodes) + 1)
    last = np.flatnonzero(np.diff(root, append=-1))
    below[last] = -1
    last = last[merge_levels[root[last]] > 0]
    merge_level = merge_levels[root[last]]
    merged = _root(root[last], merge_level, parents, merge_levels)
    below[last] = np.searchsorted(nodes, merged * (n_levels + 1) + (n_levels - merge_level))
    half_areas, counts, first, left, bottom, right = _accumulate(sums, bounds, below, np.argsort(-level, kind="stable"))
    width = levels.shape[1]
    return ComponentTree(
        boxes=np.stack([left, first // width, 1 - right, -bottom // width + 1], axis=1),
        half_areas=half_areas,
        counts=counts,
        firsts=first,
        lowest=np.where(below < 0, 1, level[below] + 1) if len(nodes) else level,
        highest=level,
        n_levels=n_levels,
    )


def _hills(keys: Ints, levels: Ints) -> tuple[Ints, int]:
    """Number the peaks from the highest down; assign each pixel the peak at which its steepest ascent ends."""
    up = maximum_filter(keys, size=3, mode="nearest").ravel() % keys.size
    while not np.array_equal(up, further := up[up]):
        up = further
    peaks = np.flatnonzero((up == np.arange(keys.size)) & (levels > 0))
    peaks = peaks[np.argsort(-keys.ravel()[peaks])]
    number = np.zeros(keys.size, np.int64)
    number[peaks] = np.arange(len(peaks))
    return number[up], len(peaks)


def _saddles(hills: Ints, levels: NDArray[np.integer[Any]]) -> tuple[Ints, Ints, Ints]:
    """Pairs of neighbouring hills, each with the highest level at which they touch, from the highest level down."""
    firsts, seconds, heights = [], [], []
    for one, other in _neighbours():
        borders = np.nonzero(hills[one] != hills[other])
        height = np.minimum(levels[one][borders], levels[other][borders])
        a, b = hills[one][borders][height > 0], hills[other][borders][height > 0]
        firsts.append(np.minimum(a, b))
        seconds.append(np.maximum(a, b))
        heights.append(height[height > 0].astype(np.int64))
    first, second, height = np.concatenate(firsts), np.concatenate(seconds), np.concatenate(heights)
    order = np.lexsort((-height, second, first))
    first, second, height = first[order], second[order], height[order]
    is_first = (np.diff(first, prepend=-1) != 0) | (np.diff(second, prepend=-1) != 0)
    first, second, height = first[is_first], second[is_first], height[is_first]
    order = np.argsort(-height, kind="stable")
    return first[order], second[order], height[order]


def _neighbours() -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Slices of pixels and of their neighbours: right, below, below to the right, below to the left."""
    full, start, end = slice(None), slice(None, -1), slice(1, None)
    return [
        ((full, start), (full, end)),
        ((start, full), (end, full)),
        ((start, start), (end, end)),
        ((start, end), (end, start)),
    ]


def _merge(n_hills: int, firsts: Ints, seconds: Ints, heights: Ints) -> tuple[Ints, Ints]:
    """Merge hills from the highest saddle down: the parent of the lower of two is the higher, from that level on."""
    link = list(range(n_hills))
    parents = np.arange(n_hills)
    merge_levels = np.zeros(n_hills, np.int64)
    for a, b, height in zip(firsts.tolist(), seconds.tolist(), heights.tolist(), strict=True):
        while link[a] != a:
            link[a] = a = link[link[a]]
        while link[b] != b:
            link[b] = b = link[link[b]]
        if a != b:
            higher, lower = (a, b) if a < b else (b, a)
            link[lower] = parents[lower] = higher
            merge_levels[lower] = height
    return parents, merge_levels


def _root(hills: Ints, levels: Ints, parents: Ints, merge_levels: Ints) -> Ints:
    """The hills that these have been merged into at the levels, each at least 1."""
    roots: Ints = hills.copy()
    pending = np.arange(len(hills))
    while pending.size:
        pending = pending[merge_levels[roots[pending]] >= levels[pending]]
        roots[pending] = parents[roots[pending]]
    return roots


def _half_areas(keys: Ints) -> Ints:
    """For each pixel the number of half squares that it completes, as the third or fourth of four neighbours."""
    upper = keys[:-1, :-1], keys[:-1, 1:]
    lower = keys[1:, :-1], keys[1:, 1:]
    low, high = (np.minimum(*upper), np.minimum(*lower)), (np.maximum(*upper), np.maximum(*lower))
    third = np.minimum(np.maximum(*low), np.minimum(*high))
    fourth = np.minimum(*low)
    halves: Ints = np.bincount(np.concatenate([third, fourth]).ravel() % keys.size, minlength=keys.size)
    return halves


def _accumulate(sums: list[Ints], bounds: list[Ints], below: Ints, order: Ints) -> list[Ints]:
    """Add each node's sums and bounds to those of the node below it, from the highest level down."""
    totals, minima = [column.tolist() for column in sums], [column.tolist() for column in bounds]
    steps = [(node, lower) for node, lower in zip(order.tolist(), below[order].tolist(), strict=True) if lower >= 0]
    for total in totals:
        for node, lower in steps:
            total[lower] += total[node]
    for minimum in minima:
        for node, lower in steps:
            if minimum[node] < minimum[lower]:
                minimum[lower] = minimum[node]
    return [np.array(column, dtype=np.int64) for column in (*totals, *minima)]
