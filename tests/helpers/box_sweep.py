"""Slow, obvious references: one threshold after the other, with OpenCV's contours and with labelled components."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, label
from torch import Tensor

from lightning_interp.explain.maps import resize_maps


def contour_boxes(score: NDArray[Any], n_thresholds: int = 1000) -> NDArray[np.int64]:
    """The box of the largest contour at each threshold, as in Choe et al. 2020: 8 bit, half-open here."""
    import cv2

    boxes = np.zeros((n_thresholds, 4), np.int64)
    image = (255 * score).astype(np.uint8)
    peak = int(image.max())
    for index in range(n_thresholds):
        _, above = cv2.threshold(image, index * peak // n_thresholds, 255, cv2.THRESH_BINARY)
        contours, _ = cv2.findContours(above, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        if contours:
            x, y, width, height = cv2.boundingRect(max(contours, key=cv2.contourArea))
            boxes[index] = x, y, x + width, y + height
    return boxes


def all_contour_boxes(score: NDArray[Any], n_thresholds: int = 1000) -> list[NDArray[np.int64]]:
    """The boxes of all contours at each threshold."""
    import cv2

    boxes = []
    image = (255 * score).astype(np.uint8)
    peak = int(image.max())
    for index in range(n_thresholds):
        _, above = cv2.threshold(image, index * peak // n_thresholds, 255, cv2.THRESH_BINARY)
        contours, _ = cv2.findContours(above, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        rects = [cv2.boundingRect(contour) for contour in contours]
        boxes.append(np.array([(x, y, x + w, y + h) for x, y, w, h in rects], np.int64).reshape(-1, 4))
    return boxes


def components_at(mask: NDArray[np.bool_]) -> list[tuple[list[int], int, int]]:
    """Box, twice the area, and number of pixels of each 8-connected component, in reading order."""
    labels, count = label(mask, structure=np.ones((3, 3)))
    components = []
    for number in range(1, count + 1):
        component = labels == number
        squares = component[:-1, :-1].astype(int) + component[1:, :-1] + component[:-1, 1:] + component[1:, 1:]
        rows, columns = np.nonzero(component)
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        components.append(
            (rows[0] * mask.shape[1] + columns[0], box, int(np.maximum(squares - 2, 0).sum()), int(component.sum()))
        )
    return [(box, area, pixels) for _, box, area, pixels in sorted(components)]


def largest_at(mask: NDArray[np.bool_]) -> list[int]:
    """The box of the largest component: by area, then pixels, then reading order."""
    components = components_at(mask)
    return max(components, key=lambda component: component[1:])[0] if components else [0, 0, 0, 0]


def iou(one: Any, other: Any) -> float:
    """Intersection over union of two half-open boxes."""
    (a, b, c, d), (e, f, g, h) = ([float(number) for number in box] for box in (one, other))
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    return shared / ((c - a) * (d - b) + (g - e) * (h - f) - shared)


def smooth_maps(n: int, size: int, sigma: float, seed: int = 0) -> Tensor:
    """Random fields, from 0 to 1, float32."""
    noise = np.random.default_rng(seed).standard_normal((n, size, size))
    fields = np.stack([gaussian_filter(image, sigma) for image in noise])
    low, high = fields.min((1, 2), keepdims=True), fields.max((1, 2), keepdims=True)
    return torch.from_numpy((fields - low) / (high - low)).float()


def coarse_maps(n: int, size: int, cells: int = 13, seed: int = 0) -> Tensor:
    """Maps like those of Grad-CAM: rectified, on a coarse grid, resized bilinearly; one or two peaks in each."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(cells, dtype=torch.float32)
    field = 0.25 * torch.randn(n, cells, cells, generator=generator)
    for strength in (1.0, 0.6):
        middle = cells * (0.2 + 0.6 * torch.rand(n, 2, generator=generator))
        spread = cells * (0.08 + 0.2 * torch.rand(n, 2, generator=generator))
        across = torch.exp(-(((axis - middle[:, :1]) / spread[:, :1]) ** 2))
        down = torch.exp(-(((axis - middle[:, 1:]) / spread[:, 1:]) ** 2))
        field += strength * down[:, :, None] * across[:, None]
    fine = resize_maps(field.clamp(min=0), (size, size))
    return fine / fine.amax((1, 2), keepdim=True)
