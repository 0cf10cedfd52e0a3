"""The ways people train, each as a tiny run whose every step is written down to the bit."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_interp
from lightning_interp import CAMMonitor, default_monitors
from lightning_interp.callbacks import Monitor, ProbeMonitor
from lightning_interp.callbacks.run.coordinator import Coordinator
from lightning_interp.localize import GAPClassifier
from lightning_interp.localize._heads import LinearHead
from lightning_interp.sinks import MemorySink
from tests.helpers.runs import TRAINER, loggers

CLASSES = 3
PUBLIC = [getattr(lightning_interp, name) for name in lightning_interp.__all__]
MONITORS: list[type[Monitor]] = [each for each in PUBLIC if isinstance(each, type) and issubclass(each, Monitor)]


def single(kind: type[Monitor], **options: Any) -> list[Monitor]:
    return [kind(**options, **({"probe": 3} if issubclass(kind, ProbeMonitor) else {}))]


# What is watched: each exported monitor by itself, and those that most users take, together.
WATCHED: dict[str, Callable[..., list[Monitor]]] = {
    "default_monitors": functools.partial(default_monitors, probe=3),
    **{kind.__name__: functools.partial(single, kind) for kind in MONITORS},
}


# ---- What is trained.


class Net(pl.LightningModule):
    """Convolutions, batch norms, dropout and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, batch_size=4)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=4)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], 1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class FrozenNorms(Net):
    """The user froze the batch norms: eval mode throughout, and no gradient."""

    def __init__(self) -> None:
        super().__init__()
        for each in (self.net[1], self.net[5]):
            each.eval().requires_grad_(False)


class FrozenBackbone(Net):
    """Only the head is trained; everything before it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net[:8].eval().requires_grad_(False)


class Pooled(Net):
    """A localiser, whose validation steps are listened to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = GAPClassifier(self.net[:8], LinearHead(6, CLASSES))


class Manual(Net):
    """Two optimisers by hand: one steps with every second batch, the other with every third."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        self.manual_backward(self.loss(batch) / 2)
        for every, optimizer in ((2, first), (3, second)):
            if (batch_idx + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.net[:4].parameters(), 1e-2)
        second = torch.optim.SGD(self.net[4:].parameters(), 0.1, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (first, second)]


class Unused(Net):
    """A branch that only every second batch goes through, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.idle = nn.Linear(CLASSES, CLASSES), nn.Linear(2, 2)
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return nn.functional.cross_entropy(self.spare(logits) if batch_idx % 2 else logits, batch[1])


class _Mean(torch.autograd.Function):
    """The mean over ranks, which goes backwards the same way."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total / torch.distributed.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Mean.forward(ctx, gradient)


class SyncedNorm(nn.BatchNorm2d):
    """What SyncBatchNorm does where it cannot run: each forward pass in training speaks to the other ranks."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        mean = _Mean.apply(images.mean((0, 2, 3)))
        centred = images - mean[:, None, None]
        variance = _Mean.apply(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)  # type: ignore[union-attr]
            self.running_var.lerp_(variance, 0.1)  # type: ignore[union-attr]
        scaled = centred * (self.weight / (variance + self.eps).sqrt())[:, None, None]
        return scaled + self.bias[:, None, None]


class Synced(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[1], self.net[5] = SyncedNorm(4), SyncedNorm(6)


GRAPHS: list[str] = []


def counting(graph: Any, inputs: Any) -> Any:
    """A compiler's back end that remembers each graph it was given."""
    GRAPHS.append(graph.code)
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


class CompiledPart(Net):
    """The network inside is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend=counting)


def compiled() -> Any:
    """The whole module is compiled, its steps included."""
    return torch.compile(Net(), backend=counting)


# ---- On what.


class Augmented(Dataset[Any]):
    """Draws from torch's, NumPy's and Python's streams for each item."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(n)
        self.images, self.labels = torch.rand(n, 3, 12, 12, generator=generator), torch.arange(n) % CLASSES
        self.boxes = [[1 + index % 4, 2, 7 + index % 4, 11] for index in range(n)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = torch.rand(()) + float(np.random.rand()) + random.random()
        return self.images[index] + 0.1 * shift, self.labels[index]


def loaders(**options: Any) -> tuple[Any, Any]:
    """Five batches to train on, two to validate on; both sets are random."""
    train = DataLoader(Augmented(20), batch_size=4, shuffle=True, **options)
    return train, DataLoader(Augmented(8), batch_size=4, **options)


# ---- How.


class Flawed:
    """An explanation that meddles with everything, and fails the second time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, model: Any, images: Tensor, targets: Tensor) -> Tensor:
        self.asked += 1
        _ = torch.rand(3), np.random.rand(), random.random()
        model.train()
        model.requires_grad_(True)
        model(images).sum().backward()
        with torch.no_grad():
            model.net[0].weight.zero_()
        model.net[0].register_forward_hook(lambda *args: None)
        if self.asked == 2:
            raise ValueError("no explanation today")
        return torch.zeros(len(images), *images.shape[2:])


def flawed() -> list[Monitor]:
    return [CAMMonitor(method=Flawed(), name="flawed")]


@dataclass(frozen=True)
class Setting:
    """A way to train.

    Args:
        module: Makes the module.
        loaders: Makes the loaders for training and validation.
        trainer: What the Trainer is told beyond the usual.
        callbacks: Makes the callbacks that the user has without us, too.
        options: What every monitor is told.
        beside: Makes monitors that stand beside those that are watched.
        legs: How far each Trainer goes (``stop``: so many steps); a later one goes on from the former's checkpoint.
        compiles: Whether graphs are compiled.
    """

    module: Callable[[], Any] = Net
    loaders: Callable[[], tuple[Any, Any]] = loaders
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Any]] = list
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: Callable[[], list[Monitor]] = list
    legs: Sequence[Mapping[str, Any]] = ({},)
    compiles: bool = False


every_step, every_third = {"every_n_train_steps": 1}, {"every_n_train_steps": 3}
SETTINGS: dict[str, Setting] = {
    "batch norm and dropout": Setting(),
    "steps": Setting(options=every_third),
    "frozen batch norms": Setting(FrozenNorms),
    "frozen backbone": Setting(FrozenBackbone),
    "a localiser": Setting(Pooled),
    "accumulation": Setting(trainer={"accumulate_grad_batches": 2}),
    "steps amid accumulation": Setting(trainer={"accumulate_grad_batches": 3}, options=every_step),
    "clipping": Setting(trainer={"gradient_clip_val": 0.05}, options=every_third),
    "bf16 autocast": Setting(trainer={"precision": "bf16-mixed"}),
    "manual, two optimisers": Setting(Manual),
    "manual, steps amid accumulation": Setting(Manual, options=every_step),
    "compiled part": Setting(CompiledPart, compiles=True),
    "compiled part, steps": Setting(CompiledPart, options=every_third, compiles=True),
    "compiled module": Setting(compiled, compiles=True),
    "workers": Setting(loaders=functools.partial(loaders, num_workers=1, persistent_workers=True)),
    "validation inside the epoch": Setting(trainer={"val_check_interval": 2}),
    "validation inside the epoch, steps amid accumulation": Setting(
        trainer={"val_check_interval": 1, "accumulate_grad_batches": 2}, options=every_step
    ),
    "no validation set": Setting(loaders=lambda: (loaders()[0], None)),
    "resumed": Setting(legs=({"max_epochs": 1}, {})),
    "resumed inside an epoch": Setting(legs=({"stop": 7}, {}), options={"every_n_train_steps": 2}),
    "resumed amid the steps of a monitor": Setting(legs=({"stop": 6}, {}), options={"every_n_train_steps": 4}),
    "a flawed explanation": Setting(beside=flawed),
    "a flawed explanation, steps amid accumulation": Setting(
        trainer={"accumulate_grad_batches": 2}, beside=flawed, options=every_step
    ),
}
if hasattr(pl.callbacks, "EMAWeightAveraging"):  # Lightning 2.6
    SETTINGS |= {
        "weight averaging": Setting(callbacks=lambda: [pl.callbacks.WeightAveraging()]),
        "moving average, steps": Setting(
            callbacks=lambda: [pl.callbacks.EMAWeightAveraging(decay=0.5, update_every_n_steps=2)], options=every_third
        ),
    }
DDP = {"devices": 2, "strategy": "ddp"}
TWO_PROCESSES: dict[str, Setting] = {
    "ddp": Setting(trainer=DDP),
    "ddp, steps amid accumulation": Setting(trainer=DDP | {"accumulate_grad_batches": 2}, options=every_step),
    "ddp, a localiser": Setting(Pooled, trainer=DDP),
    "ddp, norms that speak": Setting(Synced, trainer=DDP),
    "ddp, unused parameters": Setting(Unused, trainer=DDP | {"strategy": "ddp_find_unused_parameters_true"}),
    "ddp, a flawed explanation": Setting(trainer=DDP, beside=flawed),
}
# SyncBatchNorm trains on GPUs only, one for each process; "norms that speak" stand in where there are none.
NCCL = DDP | {"accelerator": "gpu", "deterministic": True}
ON_GPUS: dict[str, Setting] = {
    "ddp on GPUs": Setting(trainer=NCCL),
    "ddp on GPUs, a localiser": Setting(Pooled, trainer=NCCL),
    "ddp on GPUs, a flawed explanation": Setting(trainer=NCCL, beside=flawed),
    "ddp, SyncBatchNorm": Setting(trainer=NCCL | {"sync_batchnorm": True}),
}


# ---- What is written down.

Snapshot = dict[str, Any]


def bits(value: Any) -> Any:
    """A value as something whose equality is that of its bits."""
    if isinstance(value, Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return {name: bits(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(each) for each in value]
    return value


def hook_counts(owner: Any) -> dict[str, int]:
    found = {name: value for name, value in vars(owner).items() if name.endswith("_hooks")}
    return {name: len(value) for name, value in found.items() if value is not None}


def snapshot(trainer: pl.Trainer) -> Snapshot:
    """Everything that a training consists of at this moment."""
    module = trainer.lightning_module
    found: Snapshot = {}
    for name, each in module.named_parameters():
        found[f"parameter {name}"] = bits(each)
        found[f"grad {name}"] = None if each.grad is None else bits(each.grad)
        found[f"requires_grad {name}"] = each.requires_grad
        # Read by name: both are None where no hook was ever set.
        counted = {kind: len(getattr(each, kind) or ()) for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")}
        found[f"hooks of parameter {name}"] = counted
    for name, each in module.named_buffers():
        found[f"buffer {name}"] = bits(each)
    for name, each in module.named_modules():
        found[f"mode {name}"] = each.training
        found[f"hooks {name}"] = hook_counts(each)
        found[f"attributes {name}"] = sorted(vars(each))
    found["hooks everywhere"] = hook_counts(torch.nn.modules.module)
    for number, optimizer in enumerate(trainer.optimizers):
        found[f"optimiser {number}"] = bits(optimizer.state_dict())
        found[f"hooks of optimiser {number}"] = hook_counts(optimizer)
    for number, config in enumerate(trainer.lr_scheduler_configs):
        found[f"scheduler {number}"] = bits(config.scheduler.state_dict())
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        if (average := getattr(each, "_average_model", None)) is not None:
            found["average"] = bits(average.state_dict())
            found["average's hooks"] = [hook_counts(part) for part in average.modules()]
    found["torch stream"] = bits(torch.get_rng_state())
    found["CUDA streams"] = bits(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else None
    found["numpy stream"] = bits(np.random.get_state())
    found["python stream"] = random.getstate()
    found["modes of torch"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), trainer.state.stage)
    # Scores are logged as the user's own numbers are, beside them.
    logged = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("localization/")}
    found["metrics"] = bits(dict(sorted(logged.items())))
    found["steps"] = trainer.global_step
    found["graphs"] = list(GRAPHS)
    return found


class Recorder(pl.Callback):
    """Takes a snapshot whenever a monitor may have acted; stands behind all monitors."""

    def __init__(self) -> None:
        self.snapshots: dict[str, Snapshot] = {}
        self.probes: list[Any] = []

    def take(self, moment: str, trainer: pl.Trainer) -> None:
        self.snapshots[f"{len(self.snapshots)} {moment}"] = snapshot(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.take("train start", trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.take("batch start", trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.take("optimiser step", trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.take("batch end", trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.take("validation end", trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.take("epoch end", trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.take("train end", trainer)
        running = [callback for callback in trainer.callbacks if isinstance(callback, Coordinator)]
        self.probes = [bits(probe.images) for each in running for probe in each.probes._probes.values() if probe]

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.take("teardown", trainer)


class Stop(pl.Callback):
    """Makes a checkpoint after so many steps, and ends the run there, as someone does who pulls the plug."""

    def __init__(self, steps: int, checkpoint: str) -> None:
        self.steps, self.checkpoint = steps, checkpoint

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True


@dataclass(frozen=True)
class Leg:
    """What one Trainer left: its snapshots, what the monitors wrote, and the probes they looked at."""

    snapshots: dict[str, Snapshot]
    records: list[tuple[int, Any]]
    probes: list[Any]


def train(setting: Setting, watched: Callable[..., list[Any]] | None, checkpoint: Any, **trainer: Any) -> list[Leg]:
    """Train in a setting, with what is watched or without, from one seed.

    Args:
        setting: How.
        watched: Makes the monitors; None: without any.
        checkpoint: A file that may be written.
        **trainer: What the Trainer is told beyond what the setting says.
    """
    if setting.compiles:
        torch._dynamo.reset()
    GRAPHS.clear()
    legs: list[Leg] = []
    for number, leg in enumerate(setting.legs):
        torch.manual_seed(7 + number)
        np.random.seed(7 + number)
        random.seed(7 + number)
        recorder, sink = Recorder(), MemorySink()
        monitors = [] if watched is None else [*watched(**setting.options), *setting.beside()]
        settings: dict[str, Any] = {**TRAINER, "logger": loggers(sink)}
        settings |= {**setting.trainer, **leg, **trainer}
        steps = settings.pop("stop", None)
        stops = [] if steps is None else [Stop(steps, checkpoint)]
        runner = pl.Trainer(callbacks=[*setting.callbacks(), *monitors, recorder, *stops], **settings)
        runner.fit(setting.module(), *setting.loaders(), ckpt_path=checkpoint if number else None)
        if len(setting.legs) > number + 1 and not stops:
            runner.save_checkpoint(checkpoint)
        legs.append(Leg(recorder.snapshots, sink.records, recorder.probes))
    return legs


def differences(one: Sequence[Leg], other: Sequence[Leg]) -> list[str]:
    """Where two trainings differ: the leg, the moment, and what."""
    found = []
    for number, (first, second) in enumerate(zip(one, other, strict=True)):
        if list(first.snapshots) != list(second.snapshots):
            found.append(f"leg {number}: other moments")
        for moment in first.snapshots.keys() & second.snapshots.keys():
            left, right = first.snapshots[moment], second.snapshots[moment]
            for name in sorted(left.keys() | right.keys()):
                if left.get(name) != right.get(name):
                    found.append(f"leg {number}, {moment}: {name}")
    return found


def loud(watched: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Monitors whose failure ends the training: only one that stands beside may fail."""
    return functools.partial(watched, on_error="raise")


def repeated(legs: Sequence[Leg]) -> list[tuple[str, int]]:
    """What a later leg wrote again, or wrote of a start that it did not have."""
    seen: set[tuple[str, int]] = set()
    again = []
    for number, leg in enumerate(legs):
        # A layout of charts has no tag: each run says it.
        now = [(record.tag, step) for step, record in leg.records if hasattr(record, "tag")]
        again += [each for each in now if each in seen or (number and each[1] == 0)]
        # Where a look comes after every step, the first stands at the start's own x: Lightning counts from 0.
        again += [each for each in set(now) if now.count(each) > (2 if each[1] == 0 else 1)]
        seen |= set(now)
    return again


def quiet() -> None:
    """Lightning's own warnings, each by its words: none of them speaks of anything that is tested here."""
    for words in LIGHTNINGS_OWN:
        warnings.filterwarnings("ignore", message=words)


LIGHTNINGS_OWN = [
    ".*does not have many workers which may be a bottleneck",
    ".*persistent_workers",
    "The number of training batches .* is smaller than the logging interval",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "Checkpoint directory .* exists and is not empty",
    "You defined a `validation_step` but have no `val_dataloader`",
    # Speaks to whoever calls fit, of what a loader cannot do.
    ".*resuming from a checkpoint that ended before the epoch ended",
    # Torch's own, while it traces Lightning's log().
    "The \\.grad attribute of a Tensor that is not a leaf Tensor",
    "Found .* module\\(s\\) in eval mode at the start of training",
]
