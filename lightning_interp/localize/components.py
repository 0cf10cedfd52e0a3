"""The component tree: the connected components of a map at every threshold, in one pass.

A component above a threshold only grows as the threshold falls, until it meets another. So all components at all
thresholds form a tree with at most one node a pixel. Every pixel belongs to the hill on which it lies; hills are few,
and only their meeting at saddles needs a loop in Python.
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
        counts: (M,) int64, how many pixels they have.
        firsts: (M,) int64, where their first pixel stands in reading order.
        lowest: (M,) int64, the lowest level at which they are exactly this.
        highest: (M,) int64, the highest.
        n_levels: How many levels there are.
    """

    boxes: Ints
    half_areas: Ints
    counts: Ints
    firsts: Ints
    lowest: Ints
    highest: Ints
    n_levels: int

    def best(self, values: Numbers, nothing: float) -> Numbers:
        """Find the highest value among the components that are there at each level.

        Args:
            values: (M,), one for each component.
            nothing: The value of a level without components; no value may be lower.

        Returns:
            (n_levels,), for the levels 1 to ``n_levels``.

        Example:
            >>> import numpy as np
            >>> tree = component_tree(np.array([[1, 0, 3]]), 3)
            >>> tree.best(tree.counts, 0)
            array([1, 1, 1])
        """
        # A span of levels is covered by two blocks of 2**k; blocks are then handed down to their halves.
        size = np.log2(self.highest - self.lowest + 1).astype(np.int64)
        table = np.full((int(size.max(initial=0)) + 1, self.n_levels), nothing, dtype=values.dtype)
        np.maximum.at(table, (size, self.lowest - 1), values)
        np.maximum.at(table, (size, self.highest - (1 << size)), values)
        for row in range(len(table) - 1, 0, -1):
            half = 1 << (row - 1)
            np.maximum(table[row - 1], table[row], out=table[row - 1])
            np.maximum(table[row - 1, half:], table[row, :-half], out=table[row - 1, half:])
        found: Numbers = table[0]
        return found

    def largest_boxes(self) -> Ints:
        """Find the box of the largest component at each level.

        The largest is the one of the greatest area; of several, the one with most pixels; of several, the first in
        reading order.

        Returns:
            (n_levels, 4) int64, for the levels 1 to ``n_levels``; 0, 0, 0, 0 where there is none.

        Example:
            >>> import numpy as np
            >>> component_tree(np.array([[1, 0, 3]]), 3).largest_boxes().tolist()
            [[0, 0, 1, 1], [2, 0, 3, 1], [2, 0, 3, 1]]
        """
        order = np.lexsort((-self.firsts, self.counts, self.half_areas))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        boxes = np.concatenate([self.boxes[order], np.zeros((1, 4), np.int64)])  # rank -1 finds the last
        found: Ints = boxes[self.best(rank, -1)]
        return found


def component_tree(levels: NDArray[np.integer[Any]], n_levels: int) -> ComponentTree:
    """Find the 8-connected components of ``levels >= level`` for all levels at once.

    Args:
        levels: (H, W) integers from 0, which is in no component, to ``n_levels``.
        n_levels: How many levels there are.

    Returns:
        The tree's nodes, one for each component and span of levels through which it does not change.

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
    # Pixels of one level are told apart by their place, so that no two are equal and every plateau has a way up.
    keys = levels.astype(np.int64) * levels.size + np.arange(levels.size).reshape(levels.shape)
    hills, n_hills = _hills(keys, levels.astype(np.int64).ravel())
    parents, deaths = _merge(n_hills, *_saddles(hills.reshape(levels.shape), levels))
    inside = np.flatnonzero(levels)
    level = levels.ravel()[inside].astype(np.int64)
    root = _root(hills[inside], level, parents, deaths)

    # A node is a hill's component at a level where pixels join it: codes sort them by hill, then down the levels.
    codes = root * (n_levels + 1) + (n_levels - level)
    order = np.argsort(codes)
    pixels, codes = inside[order], codes[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    nodes = codes[starts]
    root, level = nodes // (n_levels + 1), n_levels - nodes % (n_levels + 1)
    sums = [np.add.reduceat(each, starts) for each in (_half_areas(keys)[pixels], np.ones_like(pixels))]
    columns = pixels % levels.shape[1]
    bounds = [np.minimum.reduceat(each, starts) for each in (pixels, columns, -pixels, -columns)]

    # What stands below a node: its hill's next node, or, where the hill ends, the one of the hill that it meets there.
    below = np.arange(1, len(nodes) + 1)
    last = np.flatnonzero(np.diff(root, append=-1))
    below[last] = -1
    last = last[deaths[root[last]] > 0]
    death = deaths[root[last]]
    met = _root(root[last], death, parents, deaths)
    below[last] = np.searchsorted(nodes, met * (n_levels + 1) + (n_levels - death))
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
    """Number the peaks from the highest down; give each pixel the one at which its steepest way up ends."""
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
        apart = np.nonzero(hills[one] != hills[other])
        height = np.minimum(levels[one][apart], levels[other][apart])
        a, b = hills[one][apart][height > 0], hills[other][apart][height > 0]
        firsts.append(np.minimum(a, b))
        seconds.append(np.maximum(a, b))
        heights.append(height[height > 0].astype(np.int64))
    first, second, height = np.concatenate(firsts), np.concatenate(seconds), np.concatenate(heights)
    order = np.lexsort((-height, second, first))
    first, second, height = first[order], second[order], height[order]
    new = (np.diff(first, prepend=-1) != 0) | (np.diff(second, prepend=-1) != 0)
    first, second, height = first[new], second[new], height[new]
    order = np.argsort(-height, kind="stable")
    return first[order], second[order], height[order]


def _neighbours() -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Right, below, below to the right, below to the left."""
    every, start, end = slice(None), slice(None, -1), slice(1, None)
    return [
        ((every, start), (every, end)),
        ((start, every), (end, every)),
        ((start, start), (end, end)),
        ((start, end), (end, start)),
    ]


def _merge(n_hills: int, firsts: Ints, seconds: Ints, heights: Ints) -> tuple[Ints, Ints]:
    """Let hills meet from the highest saddle down: the lower of two ends there, at that level, in the higher."""
    link = list(range(n_hills))
    parents = np.arange(n_hills)
    deaths = np.zeros(n_hills, np.int64)
    for a, b, height in zip(firsts.tolist(), seconds.tolist(), heights.tolist(), strict=True):
        while link[a] != a:
            link[a] = a = link[link[a]]
        while link[b] != b:
            link[b] = b = link[link[b]]
        if a != b:
            higher, lower = (a, b) if a < b else (b, a)
            link[lower] = parents[lower] = higher
            deaths[lower] = height
    return parents, deaths


def _root(hills: Ints, levels: Ints, parents: Ints, deaths: Ints) -> Ints:
    """The hills that these have become part of at the levels, each at least 1."""
    found: Ints = hills.copy()
    moving = np.arange(len(hills))
    while moving.size:
        moving = moving[deaths[found[moving]] >= levels[moving]]
        found[moving] = parents[found[moving]]
    return found


def _half_areas(keys: Ints) -> Ints:
    """For each pixel the half squares that it completes: as the third or the fourth pixel of four neighbours."""
    upper = keys[:-1, :-1], keys[:-1, 1:]
    lower = keys[1:, :-1], keys[1:, 1:]
    low, high = (np.minimum(*upper), np.minimum(*lower)), (np.maximum(*upper), np.maximum(*lower))
    third = np.minimum(np.maximum(*low), np.minimum(*high))
    fourth = np.minimum(*low)
    halves: Ints = np.bincount(np.concatenate([third, fourth]).ravel() % keys.size, minlength=keys.size)
    return halves


def _accumulate(sums: list[Ints], bounds: list[Ints], below: Ints, order: Ints) -> list[Ints]:
    """Hand each node's sums and bounds down to the node below it, from the highest level down."""
    totals, extremes = [each.tolist() for each in sums], [each.tolist() for each in bounds]
    steps = [(node, under) for node, under in zip(order.tolist(), below[order].tolist(), strict=True) if under >= 0]
    for total in totals:
        for node, under in steps:
            total[under] += total[node]
    for extreme in extremes:
        for node, under in steps:
            if extreme[node] < extreme[under]:
                extreme[under] = extreme[node]
    return [np.array(each, dtype=np.int64) for each in (*totals, *extremes)]
