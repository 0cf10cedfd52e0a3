"""Slow and obvious: one threshold after the other. Theirs, with OpenCV's contours; and ours, with labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, label
from torch import Tensor


def contour_boxes(score: NDArray[Any], n_thresholds: int = 1000) -> NDArray[np.int64]:
    """The box of the largest contour at each threshold, as in Choe et al. 2020: 8 bit, half-open here."""
    import cv2

    found = np.zeros((n_thresholds, 4), np.int64)
    image = (255 * score).astype(np.uint8)
    peak = int(image.max())
    for index in range(n_thresholds):
        _, above = cv2.threshold(image, index * peak // n_thresholds, 255, cv2.THRESH_BINARY)
        contours, _ = cv2.findContours(above, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        if contours:
            x, y, width, height = cv2.boundingRect(max(contours, key=cv2.contourArea))
            found[index] = x, y, x + width, y + height
    return found


def all_contour_boxes(score: NDArray[Any], n_thresholds: int = 1000) -> list[NDArray[np.int64]]:
    """The boxes of all contours at each threshold."""
    import cv2

    found = []
    image = (255 * score).astype(np.uint8)
    peak = int(image.max())
    for index in range(n_thresholds):
        _, above = cv2.threshold(image, index * peak // n_thresholds, 255, cv2.THRESH_BINARY)
        contours, _ = cv2.findContours(above, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        rects = [cv2.boundingRect(contour) for contour in contours]
        found.append(np.array([(x, y, x + w, y + h) for x, y, w, h in rects], np.int64).reshape(-1, 4))
    return found


def components_at(mask: NDArray[np.bool_]) -> list[tuple[list[int], int, int]]:
    """Box, twice the area, and pixels of each 8-connected component, each by itself, in reading order."""
    labels, count = label(mask, structure=np.ones((3, 3)))
    found = []
    for number in range(1, count + 1):
        own = labels == number
        squares = own[:-1, :-1].astype(int) + own[1:, :-1] + own[:-1, 1:] + own[1:, 1:]
        rows, columns = np.nonzero(own)
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        found.append((rows[0] * mask.shape[1] + columns[0], box, int(np.maximum(squares - 2, 0).sum()), int(own.sum())))
    return [(box, area, pixels) for _, box, area, pixels in sorted(found)]


def largest_at(mask: NDArray[np.bool_]) -> list[int]:
    """The box of the largest component: by area, then pixels, then reading order."""
    found = components_at(mask)
    return max(found, key=lambda each: each[1:])[0] if found else [0, 0, 0, 0]


def iou(one: Any, other: Any) -> float:
    """Of two half-open boxes."""
    (a, b, c, d), (e, f, g, h) = ([float(number) for number in box] for box in (one, other))
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    return shared / ((c - a) * (d - b) + (g - e) * (h - f) - shared)


def smooth_maps(n: int, size: int, sigma: float, seed: int = 0) -> Tensor:
    """Random fields, from 0 to 1, float32."""
    noise = np.random.default_rng(seed).standard_normal((n, size, size))
    fields = np.stack([gaussian_filter(each, sigma) for each in noise])
    low, high = fields.min((1, 2), keepdims=True), fields.max((1, 2), keepdims=True)
    return torch.from_numpy((fields - low) / (high - low)).float()


def coarse_maps(n: int, size: int, cells: int = 13, seed: int = 0) -> Tensor:
    """As Grad-CAM gives them: rectified, on a coarse grid, brought up bilinearly; one or two hot places each."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(cells, dtype=torch.float32)
    field = 0.25 * torch.randn(n, cells, cells, generator=generator)
    for strength in (1.0, 0.6):
        middle = cells * (0.2 + 0.6 * torch.rand(n, 2, generator=generator))
        spread = cells * (0.08 + 0.2 * torch.rand(n, 2, generator=generator))
        across = torch.exp(-(((axis - middle[:, :1]) / spread[:, :1]) ** 2))
        down = torch.exp(-(((axis - middle[:, 1:]) / spread[:, 1:]) ** 2))
        field += strength * down[:, :, None] * across[:, None]
    fine = torch.nn.functional.interpolate(field.clamp(min=0)[:, None], (size, size), mode="bilinear")[:, 0]
    return fine / fine.amax((1, 2), keepdim=True)
