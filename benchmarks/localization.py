"""Time of MaxBoxAccuracy for an image, and of a sweep over thresholds with OpenCV's contours (Choe et al. 2020).

    pip install -e ".[test]" && python benchmarks/localization.py

Both score the same maps with 1000 thresholds on one thread, alternating; the table holds medians as times and ratios.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import scipy
import torch
from torch import Tensor
from torchvision.ops import box_iou

from lightning_interp.localize import max_box_accuracy

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.box_sweep import all_contour_boxes, coarse_maps, contour_boxes, smooth_maps


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f"{machine()}\n")
    print(
        f"| maps, {args.size} x {args.size} | contour sweep, v1 | ours, v1 | sweep / ours, v1 "
        "| contour sweep, v2 | ours, v2 | sweep / ours, v2 |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind, maps in kinds(args.size).items():
        print(row(kind, maps, args.repeats), flush=True)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="height and width of the maps in pixels")
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of rounds, with different maps; the table holds medians"
    )
    return parser.parse_args(argv)


def machine() -> str:
    return (
        f"CPU, 1 thread, {platform.machine()}; Python {platform.python_version()}, torch {torch.__version__}, numpy "
        f"{np.__version__}, scipy {scipy.__version__}, opencv {cv2.__version__}"
    )


def kinds(size: int) -> dict[str, Tensor]:
    return {
        "like Grad-CAM: 13 x 13, rectified, resized bilinearly": coarse_maps(5, size),
        "smooth: a Gaussian field, sigma 20": smooth_maps(5, size, 20.0),
        "rough: a Gaussian field, sigma 2": smooth_maps(5, size, 2.0),
        "noise: independent pixels": smooth_maps(5, size, 0.0),
    }


def row(kind: str, maps: Tensor, repeats: int) -> str:
    size = maps.shape[-1]
    box = torch.tensor([[0.2, 0.3, 0.7, 0.9]]) * size

    def sweep_largest(score: Tensor) -> Tensor:
        return box_iou(torch.from_numpy(contour_boxes(score.numpy())).float(), box)[:, 0] >= 0.5

    def sweep_all(score: Tensor) -> list[bool]:
        sweep = all_contour_boxes(score.numpy())
        # One call for the boxes of all thresholds is faster than one for each threshold.
        overlaps = box_iou(torch.from_numpy(np.concatenate(sweep)).float(), box)[:, 0]
        return [bool((overlap >= 0.5).any()) for overlap in overlaps.split([len(boxes) for boxes in sweep])]

    functions: dict[str, Callable[[Tensor], object]] = {
        "sweep 1": sweep_largest,
        "ours 1": lambda score: max_box_accuracy(score[None], box),
        "sweep 2": sweep_all,
        "ours 2": lambda score: max_box_accuracy(score[None], box, version=2),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function(maps[round_ % len(maps)])
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    median = {name: 1000 * statistics.median(durations) for name, durations in times.items()}
    cells = [
        cell
        for version in ("1", "2")
        for cell in (
            f"{median[f'sweep {version}']:.0f} ms",
            f"{median[f'ours {version}']:.1f} ms",
            f"{median[f'sweep {version}'] / median[f'ours {version}']:.1f}",
        )
    ]
    return " | ".join([f"| {kind}", *cells]) + " |"


if __name__ == "__main__":
    main()
