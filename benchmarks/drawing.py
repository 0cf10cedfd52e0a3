"""Processor time of drawing and writing one snapshot's records, beside matplotlib and `SummaryWriter.add_image`.

    pip install -e ".[benchmarks]" && python benchmarks/drawing.py

All on one thread, in one process and in turn; medians of the rounds. The snapshot is that of `default_monitors()` on a
ResNet-50: 8 images of 224 pixels, 64 filters, 161 histograms, three heatmaps of 56 layers by 20 steps, 300 scalars.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.cbook
import numpy as np
import torch
import torchvision
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_interp.render import (
    Caption,
    ColorScale,
    colorize,
    enlarge,
    filter_grid,
    history_heatmap,
    overlay,
    side_by_side,
    tile_grid,
)
from lightning_interp.sinks import Histogram, Picture, Scalar, TensorBoardSink

Draw = Callable[[], Tensor]
PICTURES = ("activation maps", "saliency", "filters", "heatmap")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    draws, matplotlib_heatmap = pictures()
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        writers = [SummaryWriter(f"{folder}/{name}") for name in ("ours", "other")]
        sink = TensorBoardSink(writers[0])
        for step in range(-1, rounds):
            measured = one_round(sink, writers[1], draws, matplotlib_heatmap, max(step, 0))
            for part, milliseconds in measured.items() if step >= 0 else ():
                times[part].append(milliseconds)
        for writer in writers:
            writer.close()
    report({part: statistics.median(values) for part, values in times.items()})


def one_round(
    sink: TensorBoardSink, writer: SummaryWriter, draws: dict[str, Draw], matplotlib_heatmap: Draw, step: int
) -> dict[str, float]:
    """Milliseconds of this thread for each part, each with its other way right behind it."""
    times: dict[str, float] = {}
    for name, draw in draws.items():
        times[f"draw {name}"], picture = timed(draw)
        record = Picture(name.replace(" ", "_"), picture)
        times[f"write {name}"], _ = timed(lambda record=record: sink.write(record, step))
        other = timed(lambda record=record: writer.add_image(record.tag, record.image.numpy(), step, dataformats="HWC"))
        times[f"add_image {name}"] = other[0]
    times["matplotlib heatmap"], _ = timed(matplotlib_heatmap)
    edges = torch.linspace(-1, 1, 65, dtype=torch.float64)
    counts = torch.arange(64, dtype=torch.float64)
    histograms = [Histogram(f"weights/{index}", counts, edges, 1.0, 2.0) for index in range(161)]
    scalars = [Scalar(f"norms/{index}", index / 3) for index in range(300)]
    for name, records in (("161 histograms", histograms), ("300 scalars", scalars)):
        times[name], _ = timed(lambda records=records: [sink.write(record, step) for record in records])
    times["flush"], _ = timed(sink.flush)
    writer.flush()
    return times


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.thread_time()
    result = call()
    return (time.thread_time() - start) * 1e3, result


def report(times: dict[str, float]) -> None:
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, matplotlib {matplotlib.__version__}; milliseconds of one thread's processor time\n"
    )
    print("| part | times | ours | other way | other / ours |\n|---|---|---|---|---|")
    total = other_total = 0.0
    rows = [(f"{verb} {name}", 3 if name == "heatmap" else 1) for name in PICTURES for verb in ("draw", "write")]
    for part, count in [*rows, ("161 histograms", 1), ("300 scalars", 1), ("flush", 1)]:
        name = part.partition(" ")[2]
        other = times.get(f"add_image {name}") if part.startswith("write") else None
        other = times["matplotlib heatmap"] if part == "draw heatmap" else other
        ratio = "| |" if other is None else f"{other:.1f} | {other / times[part]:.1f} |"
        print(f"| {part} | {count} | {times[part]:.1f} | {ratio}")
        total += count * times[part]
        other_total += count * (times[part] if other is None else other)
    print(f"| one snapshot | 1 | {total:.0f} | {other_total:.0f} | {other_total / total:.1f} |")


def pictures() -> tuple[dict[str, Draw], Draw]:
    """What draws each picture, and the heatmap by matplotlib."""
    generator = torch.Generator().manual_seed(0)
    images = photographs(8)

    def smooth(side: int) -> Tensor:
        noise = torch.rand(8, 1, side, side, generator=generator)
        return torch.nn.functional.interpolate(noise, (224, 224), mode="bilinear")[:, 0]

    maps = smooth(7)
    gradients = (torch.randn(8, 224, 224, generator=generator).abs() * smooth(14)).clamp(max=1)
    captions = [Caption(("tabby cat 93 %", "label: Egyptian cat"), index % 2 == 0) for index in range(8)]
    weights = torch.randn(64, 3, 7, 7, generator=generator)
    names = [f"layer{index // 14 + 1}.{index // 3 % 6}.conv{index % 3 + 1}" for index in range(56)]
    steps = [500 * index for index in range(20)]
    norms = torch.rand(56, 20, generator=generator).exp() * torch.logspace(0, -3, 56)[:, None]
    texts = ("weights, layers by logged steps", "L2 norm")
    draws: dict[str, Draw] = {
        "activation maps": lambda: tile_grid(
            overlay(enlarge(images), maps), captions, scale=ColorScale("jet", "0", "max", "gradcam")
        ),
        "saliency": lambda: tile_grid(
            side_by_side(enlarge(images), enlarge(colorize(gradients, "inferno"))),
            captions,
            scale=ColorScale("inferno", "0", "max", "saliency"),
        ),
        "filters": lambda: filter_grid(weights, name="conv1"),
        "heatmap": lambda: history_heatmap(names, steps, norms, *texts),
    }
    return draws, lambda: by_matplotlib(names, steps, norms, *texts)


def photographs(count: int) -> Tensor:
    """Crops of the photograph that comes with matplotlib."""
    with (
        matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file,
        Image.open(file) as photograph,
    ):
        pixels = torch.from_numpy(np.array(photograph.convert("RGB")))
    height, width = pixels.shape[0] - 224, pixels.shape[1] - 224
    corners = [(index * height // count, index * 3 % count * width // count) for index in range(count)]
    return torch.stack([pixels[top : top + 224, left : left + 224] for top, left in corners])


def by_matplotlib(names: Sequence[str], steps: Sequence[int], values: Tensor, title: str, label: str) -> Tensor:
    """The same picture as a figure, with the names drawn by PIL, since matplotlib takes four times as long for them."""
    figure = Figure(figsize=(5.8, 10.9), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.27, 0.04, 0.52, 0.92))
    norm = LogNorm(float(values.min()), float(values.max()))
    heatmap = axes.imshow(values.numpy(), cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(heatmap, cax=figure.add_axes((0.81, 0.04, 0.03, 0.92)), label=label)
    bar.ax.minorticks_off()
    axes.set_yticks([])
    axes.set_xticks(range(0, len(steps), 5), [f"{step}" for step in steps[::5]])
    axes.set_xlabel("step")
    figure.text(0.02, 0.98, title)
    canvas.draw()
    picture = Image.fromarray(np.array(canvas.buffer_rgba())[..., :3])
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for index, name in enumerate(names):
        draw.text((150, 45 + index * 18), name, fill="black", font=font, anchor="rm")
    return torch.from_numpy(np.array(picture))


if __name__ == "__main__":
    main()
