"""What the training thread loses at a logged epoch to `default_monitors()`, beside what a user would write by hand.

    pip install -e ".[benchmarks]" && python benchmarks/overhead.py

Everything is measured in one process, in turn, inside a real `Trainer.fit`; the table holds medians as ratios.
"""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import make_grid

import lightning_interp as li
from lightning_interp.callbacks import StepMonitor
from lightning_interp.callbacks.run.coordinator import Coordinator
from lightning_interp.model.preserve import preserve_state
from lightning_interp.weights import Layers, parameter_norms

MODELS = ("resnet18", "resnet50", "vit_b_16")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    print(f"{machine()}\n")
    print(
        "| model | probe | forward of the probe | training step (32) | ours, stall | ours, with drawing | by hand "
        "| by hand / ours | ours / forward | ours / step | histograms: add_histogram / ours | norms: ours / fused call "
        "| peak memory added, ours | training step | writer's thread, processor time | lost by launch-bound steps "
        "while written |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for model in args.models:
        for images in args.probes:
            # A process each: peak memory is a mark that only rises.
            command = [sys.executable, __file__, "--one", model, str(images), str(args.repeats)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="torchvision models")
    parser.add_argument("--probes", nargs="+", type=int, default=[8, 32], help="numbers of images")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the medians are shown")
    return parser.parse_args(argv)


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{device}, {platform.machine()}; Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, pytorch-lightning {pl.__version__}"
    )


class Classifier(pl.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = getattr(torchvision.models, name)(num_classes=1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Measurement(pl.Callback):
    """Times everything in turn, at the end of the first epoch, where a snapshot would be taken."""

    def __init__(self, name: str, probe: int, repeats: int) -> None:
        self.name, self.probe, self.repeats = name, probe, repeats
        self.row = ""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Classifier) -> None:
        (coordinator,) = [callback for callback in trainer.callbacks if isinstance(callback, Coordinator)]
        output = coordinator.output
        images = torch.randn(self.probe, 3, 224, 224, device=module.device)
        batch = (
            torch.randn(32, 3, 224, 224, device=module.device),
            torch.zeros(32, dtype=torch.long, device=module.device),
        )
        optimizer = trainer.optimizers[0]
        hand = ByHand(module, trainer.logger.experiment)
        histograms, layers = li.WeightHistogramMonitor(), Layers.of(module)
        small = LaunchBound()
        marks: list[float] = []
        parameters = dict(module.named_parameters())

        def forward() -> None:
            with preserve_state(module), torch.no_grad():
                module(images)

        def step() -> None:
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()

        def ours() -> None:
            # All that stands between the user and the next batch: the captured step and the snapshot.
            for monitor in coordinator.monitors:
                if isinstance(monitor, StepMonitor):
                    with torch.no_grad():
                        monitor.before_optimizer_step(parameters)
                        monitor.after_optimizer_step()
            output.writer.submit(lambda: marks.append(time.thread_time()))
            coordinator.snapshots.take(module, coordinator.monitors, step=1)
            output.writer.submit(lambda: marks.append(time.thread_time()))

        def drained() -> None:
            output.writer.close()

        def add_histograms() -> None:
            for name, parameter in parameters.items():
                trainer.logger.experiment.add_histogram(f"by_hand/{name}", parameter, 1)
            trainer.logger.experiment.flush()  # what waits in the queue is not the next one's to pay

        def our_histograms() -> None:
            with torch.no_grad():
                for record in histograms.records(histograms.capture(module, 1), 1):
                    for sink in output.sinks:
                        sink.write(record, 1)
            trainer.logger.experiment.flush()

        def fused_norm() -> None:
            float(torch.nn.utils.get_total_norm(list(parameters.values())))

        def our_norms() -> None:
            with torch.no_grad():
                layers.combine(parameter_norms(parameters)).cpu()

        works: dict[str, Callable[[], None]] = {
            "forward": forward,
            "step": step,
            "ours": ours,
            "drained": drained,
            "hand": lambda: hand(images),
            "add_histogram": add_histograms,
            "our_histograms": our_histograms,
            "fused_norm": fused_norm,
            "our_norms": our_norms,
        }
        peaks = {name: peak_memory_added(works[name]) for name in ("ours", "step")}
        drained()
        marks.clear()
        count, elapsed = small.train(lambda: False, 400)
        alone = elapsed / count
        times: dict[str, list[float]] = {name: [] for name in works}
        for round_ in range(self.repeats + 1):
            for name, work in works.items():
                taken = timed(work)
                if round_:  # the first round warms up
                    times[name].append(taken)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        writer = statistics.median(end - start for start, end in zip(marks[::2], marks[1::2], strict=True))
        is_written = threading.Event()
        ours()
        output.writer.submit(is_written.set)
        count, elapsed = small.train(is_written.is_set)
        drained()
        self.row = " | ".join(
            [
                f"| {self.name} | {self.probe}",
                f"{1000 * median['forward']:.0f} ms",
                f"{1000 * median['step']:.0f} ms",
                f"{1000 * median['ours']:.0f} ms",
                f"{1000 * (median['ours'] + median['drained']):.0f} ms",
                f"{1000 * median['hand']:.0f} ms",
                f"{median['hand'] / median['ours']:.1f}",
                f"{median['ours'] / median['forward']:.2f}",
                f"{median['ours'] / median['step']:.2f}",
                f"{median['add_histogram'] / median['our_histograms']:.1f}",
                f"{median['our_norms'] / median['fused_norm']:.2f}",
                f"{peaks['ours']:.0f} MiB",
                f"{peaks['step']:.0f} MiB",
                f"{1000 * writer:.0f} ms",
                f"{1000 * (elapsed - count * alone):.0f} of {1000 * elapsed:.0f} ms |",
            ]
        )


class LaunchBound:
    """A training step of many small operations, whose time is that of Python and of launching them."""

    def __init__(self) -> None:
        self.module = nn.Sequential(*(layer for _ in range(32) for layer in (nn.Linear(8, 8), nn.ReLU())))
        self.optimizer = torch.optim.SGD(self.module.parameters(), 1e-3)

    def train(self, is_done: Callable[[], bool], most: int = 100_000) -> tuple[int, float]:
        """Train until something is done; return the number of steps and the seconds that they took."""
        images, count, begin = torch.rand(1, 8), 0, time.perf_counter()
        while count < most and not is_done():
            self.optimizer.zero_grad()
            self.module(images).sum().backward()
            self.optimizer.step()
            count += 1
        return count, time.perf_counter() - begin


class ByHand:
    """What a user would otherwise write: pytorch-grad-cam, captum, make_grid, add_histogram, .norm().item()."""

    def __init__(self, module: Classifier, writer: Any) -> None:
        from pytorch_grad_cam import GradCAM

        self.module, self.writer = module, writer
        network = module.network
        if hasattr(network, "layer4"):
            self.cam = GradCAM(module, [network.layer4])
        else:
            self.cam = GradCAM(module, [network.encoder.layers[-1].ln_1], reshape_transform=as_grid)

    def __call__(self, images: Tensor) -> None:
        from captum.attr import Saliency
        from pytorch_grad_cam.utils.image import show_cam_on_image

        self.module.eval()
        predicted = self.module(images).argmax(1)
        heat = self.cam(images, targets=None)
        shown = images.sub(images.amin()).div(images.amax() - images.amin()).permute(0, 2, 3, 1).cpu().numpy()
        tiles = [show_cam_on_image(image, each, use_rgb=True) for image, each in zip(shown, heat, strict=True)]
        grid = make_grid(torch.stack([torch.from_numpy(tile).permute(2, 0, 1) for tile in tiles]))
        self.writer.add_image("by_hand/gradcam", grid, 1)
        maps = Saliency(self.module).attribute(images.clone(), predicted).amax(1, keepdim=True)
        self.writer.add_image("by_hand/saliency", make_grid(maps.cpu(), normalize=True, scale_each=True), 1)
        first = next(each for each in self.module.modules() if isinstance(each, nn.Conv2d))
        self.writer.add_image(
            "by_hand/filters", make_grid(first.weight.detach().cpu(), normalize=True, scale_each=True), 1
        )
        for name, parameter in self.module.named_parameters():
            self.writer.add_histogram(f"by_hand/{name}", parameter, 1)
            self.writer.add_scalar(f"by_hand/norm/{name}", parameter.norm().item(), 1)
            if parameter.grad is not None:
                self.writer.add_scalar(f"by_hand/gradient/{name}", parameter.grad.norm().item(), 1)
        self.writer.flush()
        self.module.train()


def as_grid(tokens: Tensor) -> Tensor:
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def timed(work: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_added(work: Callable[[], None]) -> float:
    """MiB above what was held before: the device's peak, or on the CPU the process's, from where it stood."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident()
    reset_peak()
    work()
    return max(peak_resident() - before, 0.0)


def resident() -> float:
    return status("VmRSS")


def peak_resident() -> float:
    return status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> float:
    if not Path("/proc/self/status").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(field))
    return int(line.split()[1]) / 2**10


def measure(name: str, probe: int, repeats: int) -> str:
    pl.seed_everything(0)
    warnings.filterwarnings("ignore")
    data = TensorDataset(torch.randn(probe, 3, 224, 224), torch.zeros(probe, dtype=torch.long))
    monitors = li.default_monitors(probe=probe, on_error="raise", at_start=False)
    measurement = Measurement(name, probe, repeats)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            limit_train_batches=1,
            callbacks=[*monitors, measurement],
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Classifier(name), DataLoader(data, batch_size=probe))
    return measurement.row


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    else:
        main()
