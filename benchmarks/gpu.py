"""What monitors cost on a GPU, as ratios to a forward pass, a training step and the same pictures made by hand.

    pip install -e ".[benchmarks]" && python benchmarks/gpu.py

``--device cpu --small`` runs the same on a CPU within a minute. Only public means are used: the stall is the time
between a callback before the monitors and one behind them, in every hook of an epoch with a snapshot.
"""

from __future__ import annotations

import argparse
import gc
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from lightning_interp import explain, weights

COLUMNS = (
    *("model", "probe", "forward", "step", "stall", "device busy", "by hand", "by hand / stall", "stall / forward"),
    *("stall / step", "add_histogram / histogram stall", "norms / fused call", "gradcam / forward"),
    *("saliency / forward", "memory added", "step's memory"),
)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    models: Sequence[str]
    probes: Sequence[int]
    device: torch.device
    rounds: int
    size: int
    batch: int
    minutes: float


def main(argv: Sequence[str] | None = None) -> None:
    plan = parse_args(argv)
    for name in ("pytorch_lightning", "lightning_fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    started = time.monotonic()
    print(f"{machine(plan.device)}; {plan.size} px, batches of {plan.batch}, medians of {plan.rounds}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for model in plan.models:
        for probe in plan.probes:
            if time.monotonic() - started > 60 * plan.minutes:
                print(f"| {model} | {probe} | left out after {plan.minutes:g} minutes |")
                continue
            print(f"| {' | '.join(row(plan, model, probe))} |", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s in all")


def parse_args(argv: Sequence[str] | None) -> Plan:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "vit_b_16"], help="of torchvision")
    parser.add_argument("--probes", nargs="+", type=int, default=[8, 32], help="numbers of images")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--rounds", type=int, default=7, help="the medians are shown")
    parser.add_argument("--minutes", type=float, default=7.0, help="no further row is begun after so long")
    parser.add_argument("--small", action="store_true", help="one model, few images, two rounds")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu --small tries the script without one")
    if args.small:
        return Plan(["resnet18"], [4], device, rounds=2, size=64, batch=4, minutes=args.minutes)
    return Plan(args.models, args.probes, device, args.rounds, size=224, batch=32, minutes=args.minutes)


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{name}, {platform.machine()}; Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, pytorch-lightning {pl.__version__}"
    )


def row(plan: Plan, model: str, probe: int) -> list[str]:
    """Measure one model with one number of images."""
    pl.seed_everything(0)
    module = Classifier(model)
    options: dict[str, Any] = {"at_start": False, "on_error": "raise"}
    nothing = snapshot_costs(plan, module, [], probe)
    ours = snapshot_costs(plan, module, li.default_monitors(probe=probe, **options), probe)
    counted = snapshot_costs(plan, module, [li.WeightHistogramMonitor(**options)], probe)
    stall = ours.host - nothing.host

    module.to(plan.device).train()
    images = torch.randn(probe, 3, plan.size, plan.size, device=plan.device)
    with tempfile.TemporaryDirectory() as folder:
        writer = TensorBoardLogger(folder).experiment
        works = {
            "forward": lambda: forward(module, images),
            "gradcam": lambda: explain.gradcam(module, images, layer=cam_layer(module)),
            "saliency": lambda: explain.saliency(module, images),
            "norms": lambda: norms(module),
            "fused": lambda: float(nn.utils.get_total_norm(list(module.parameters()))),
            "step": training_step(module, plan),
            # Last, since OpenCV's threads stay busy for a while.
            "add_histogram": lambda: add_histograms(module, writer),
            "hand": ByHand(module, writer, images).write,
        }
        taken = {name: typical_time(work, plan) for name, work in works.items()}
        step_memory = memory_added(works["step"], plan.device)
    return [
        model,
        str(probe),
        *(milliseconds(taken[name]) for name in ("forward", "step")),
        milliseconds(stall),
        milliseconds(ours.device - nothing.device),
        milliseconds(taken["hand"]),
        f"{taken['hand'] / stall:.1f}",
        f"{stall / taken['forward']:.2f}",
        f"{stall / taken['step']:.2f}",
        f"{taken['add_histogram'] / max(counted.host - nothing.host, 1e-6):.1f}",
        f"{taken['norms'] / taken['fused']:.2f}",
        f"{taken['gradcam'] / taken['forward']:.2f}",
        f"{taken['saliency'] / taken['forward']:.2f}",
        f"{ours.memory:.0f} MiB",
        f"{step_memory:.0f} MiB",
    ]


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


# ---- Inside a training.


@dataclass(frozen=True)
class Costs:
    """Medians over epochs: seconds until the hooks returned, until the device was idle again, and MiB added."""

    host: float
    device: float
    memory: float


class Clock:
    """Adds up what passes between the callbacks before the monitors and behind them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.epochs: list[dict[str, float]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.epochs.append({"host": 0.0, "device": 0.0, "memory": 0.0})

    def start(self) -> None:
        synchronize(self.device)
        self.held = reset_peak(self.device)
        self.started = time.perf_counter()

    def stop(self) -> None:
        host = time.perf_counter() - self.started
        synchronize(self.device)
        epoch = self.epochs[-1]
        epoch["host"] += host
        epoch["device"] += time.perf_counter() - self.started
        epoch["memory"] = max(epoch["memory"], peak(self.device) - self.held)


class Before(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.clock.start()

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.start()

    def on_validation_end(self, *args: Any) -> None:
        self.clock.start()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.clock.start()


class Behind(pl.Callback):
    def __init__(self, clock: Clock, folder: Path) -> None:
        self.clock = clock
        self.folder = folder

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.clock.stop()

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.stop()

    def on_validation_end(self, *args: Any) -> None:
        self.clock.stop()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.clock.stop()
        self.clock.begin_epoch()
        settle(self.folder)


def settle(folder: Path) -> None:
    """Wait until the background thread has written: an epoch is longer than what is drawn of it."""
    size, deadline = -1, time.monotonic() + 20
    while size != (size := sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())):
        time.sleep(0.5)
        if time.monotonic() > deadline:
            return


def snapshot_costs(plan: Plan, module: pl.LightningModule, monitors: list[Any], probe: int) -> Costs:
    """Train for some epochs of one step each, with a snapshot after every epoch."""
    data = TensorDataset(
        torch.randn(max(probe, plan.batch), 3, plan.size, plan.size), torch.zeros(max(probe, plan.batch))
    )
    loader = DataLoader(data, batch_size=plan.batch)
    clock = Clock(plan.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=plan.rounds + 1,
            limit_train_batches=1,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            accelerator="gpu" if plan.device.type == "cuda" else "cpu",
            devices=1,
            callbacks=[Before(clock), *monitors, Behind(clock, Path(folder))],
            logger=TensorBoardLogger(folder),
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, loader, loader)
    epochs = clock.epochs[1 : plan.rounds + 1]  # the first one warms up, and none is behind the last
    return Costs(*(statistics.median(epoch[name] for epoch in epochs) for name in ("host", "device", "memory")))


class Classifier(pl.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = getattr(torchvision.models, name)(num_classes=1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1].long())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


# ---- What it is compared with.


def forward(module: nn.Module, images: Tensor) -> None:
    module.eval()
    with torch.no_grad():
        module(images)
    module.train()


def training_step(module: pl.LightningModule, plan: Plan) -> Callable[[], None]:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    images = torch.randn(plan.batch, 3, plan.size, plan.size, device=plan.device)
    labels = torch.zeros(plan.batch, dtype=torch.long, device=plan.device)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step((images, labels), 0).backward()
        optimizer.step()

    return step


def add_histograms(module: nn.Module, writer: Any) -> None:
    for name, parameter in module.named_parameters():
        writer.add_histogram(f"by_hand/{name}", parameter, 1)
    writer.flush()  # what waits in its queue is not for the next to pay


def norms(module: nn.Module) -> Tensor:
    """Norms of all layers and of all parameters together, in one transfer."""
    return weights.Layers.of(module).combine(weights.parameter_norms(dict(module.named_parameters()))).cpu()


def cam_layer(module: Classifier) -> str:
    network = module.network
    return "network.layer4" if hasattr(network, "layer4") else f"network.encoder.layers.{last_block(network)}.ln_1"


def last_block(network: Any) -> str:
    return list(network.encoder.layers._modules)[-1]


class ByHand:
    """What a user would otherwise write: pytorch-grad-cam, captum, make_grid, add_histogram, .norm().item()."""

    def __init__(self, module: Classifier, writer: Any, images: Tensor) -> None:
        from pytorch_grad_cam import GradCAM

        self.module, self.writer, self.images = module, writer, images
        layer = module.get_submodule(cam_layer(module))
        self.cam = GradCAM(module, [layer], reshape_transform=None if cam_layer(module).endswith("layer4") else as_grid)

    def write(self) -> None:
        from captum.attr import Saliency
        from pytorch_grad_cam.utils.image import show_cam_on_image

        images, module, writer = self.images, self.module.eval(), self.writer
        predicted = module(images).argmax(1)
        heatmaps = self.cam(images, targets=None)
        shown = images.sub(images.amin()).div(images.amax() - images.amin()).permute(0, 2, 3, 1).cpu().numpy()
        tiles = [
            show_cam_on_image(image, heatmap, use_rgb=True) for image, heatmap in zip(shown, heatmaps, strict=True)
        ]
        grid = make_grid(torch.stack([torch.from_numpy(tile).permute(2, 0, 1) for tile in tiles]))
        writer.add_image("by_hand/gradcam", grid, 1)
        maps = Saliency(module).attribute(images.clone(), predicted).amax(1, keepdim=True)
        writer.add_image("by_hand/saliency", make_grid(maps.cpu(), normalize=True, scale_each=True), 1)
        first = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
        filters = make_grid(first.weight.detach().cpu(), normalize=True, scale_each=True)
        writer.add_image("by_hand/filters", filters, 1)
        for name, parameter in module.named_parameters():
            writer.add_histogram(f"by_hand/{name}", parameter, 1)
            writer.add_scalar(f"by_hand/norm/{name}", parameter.norm().item(), 1)
            if parameter.grad is not None:
                writer.add_scalar(f"by_hand/gradient/{name}", parameter.grad.norm().item(), 1)
        writer.flush()
        module.train()


def as_grid(tokens: Tensor) -> Tensor:
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


# ---- Clocks and memory.


def typical_time(work: Callable[[], Any], plan: Plan) -> float:
    """Return the median of the rounds behind one that warms up."""
    seconds = []
    for _ in range(plan.rounds + 1):
        synchronize(plan.device)
        started = time.perf_counter()
        work()
        synchronize(plan.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_added(work: Callable[[], Any], device: torch.device) -> float:
    gc.collect()
    held = reset_peak(device)
    work()
    return max(peak(device) - held, 0.0)


def reset_peak(device: torch.device) -> float:
    """Forget the peak of the device's memory, or of the process's on a CPU, and return MiB in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return process_memory("VmRSS")


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else process_memory("VmHWM")


def process_memory(field: str) -> float:
    """MiB of this process, where the system tells."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(field)), float("nan"))


if __name__ == "__main__":
    main()
