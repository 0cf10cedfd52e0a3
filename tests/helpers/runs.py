"""Small runs: a network, data, a Trainer, and what can be read of them afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_interp.callbacks.run.coordinator import Coordinator
from lightning_interp.localize import GAPClassifier
from lightning_interp.localize._heads import LinearHead
from lightning_interp.sinks import MemorySink, Sink, register

CLASSES = 3


def body(channels: int = 3, *, plain: bool = False) -> nn.Sequential:
    """Convolution, pooling and one linear layer; with batch norm and dropout unless ``plain``."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 4, 3, padding=1)]
    layers += [] if plain else [nn.BatchNorm2d(4)]
    layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()]
    layers += [] if plain else [nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


class Net(pl.LightningModule):
    """A classifier that counts the batches it was trained on."""

    def __init__(
        self, channels: int = 3, *, plain: bool = False, optimizer: str = "adam", net: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.net = body(channels, plain=plain) if net is None else net
        self.optimizer = optimizer
        self.trained = 0
        self.looked_at: list[int] = []

    def forward(self, images: Tensor) -> Any:
        self.looked_at.append(len(images))
        return self.net(images)

    def read(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch[0], batch[1]

    def score(self, images: Tensor) -> Tensor:
        return self(images)

    def loss(self, batch: Any) -> Tensor:
        images, labels = self.read(batch)
        return nn.functional.cross_entropy(self.score(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained += 1
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, batch_size=4)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=4)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), 0.1)
        return torch.optim.Adam(self.parameters(), 1e-2)


def for_flavour(package: Any) -> type[Any]:
    """A classifier whose base is another package's LightningModule."""
    names = ("__init__", "forward", "read", "score", "loss", "training_step", "validation_step", "test_step")

    class Other(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.optimizer, self.trained, self.looked_at = body(), "adam", 0, []

    for name in (*names[1:], "configure_optimizers"):
        setattr(Other, name, Net.__dict__[name])
    return Other


def tensors(n: int = 12, channels: int = 3, size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=generator), torch.arange(n) % CLASSES


def dataset(n: int = 12, channels: int = 3, size: int = 12) -> TensorDataset:
    return TensorDataset(*tensors(n, channels, size))


class Squares(Dataset[Any]):
    """Bright squares on dim noise, and where they are."""

    def __init__(self, n: int = 12, size: int = 32, seed: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images, self.labels = 0.2 * torch.rand(n, 3, size, size, generator=generator), torch.arange(n) % CLASSES
        corners = torch.randint(0, size // 2, (n, 2), generator=generator)
        sides = torch.randint(size // 5, size // 2, (n, 2), generator=generator)
        self.boxes: Any = torch.cat([corners, corners + sides], dim=1)
        for image, (x1, y1, x2, y2) in zip(self.images, self.boxes.tolist(), strict=True):
            image[:, y1:y2, x1:x2] += 0.8

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class Localiser(Net):
    """A GAPClassifier that answers to what is bright, and counts its passes."""

    def __init__(self, rate: float = 1e-3) -> None:
        features = nn.Sequential(nn.Conv2d(3, 6, 5, padding=2, stride=2), nn.ReLU())
        super().__init__(net=GAPClassifier(features, LinearHead(6, CLASSES)))
        self.rate = rate
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for each in (self.net.features[0].weight, self.net.head.weight):
                each.copy_(0.1 * torch.rand(each.shape, generator=generator))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate)


class Augmented(Dataset[Any]):
    """Draws from torch's, NumPy's and Python's streams for each item."""

    def __init__(self, n: int = 12) -> None:
        self.images, self.labels = tensors(n)
        self.boxes = [[1, 2, 7, 11]] * n

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = torch.rand(()) + float(np.random.rand()) + random.random()
        return self.images[index] + 0.1 * shift, self.labels[index]


class Items(Dataset[Any]):
    def __init__(self, make: Callable[[Tensor, Tensor], Any], n: int = 12, channels: int = 3) -> None:
        self.images, self.labels = tensors(n, channels)
        self.make = make

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.images[index], self.labels[index])


class Stream(IterableDataset[Any]):
    """Can be iterated only, and counts what was taken."""

    def __init__(self, n: int = 12) -> None:
        self.images, self.labels = tensors(n)
        self.taken = 0

    def __iter__(self) -> Iterable[Any]:  # type: ignore[override]
        for image, label in zip(self.images, self.labels, strict=True):
            self.taken += 1
            yield image, label


def loader(data: Any, shuffle: bool = False, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=4, shuffle=shuffle, **options)


class SinkLogger(DummyLogger):
    """A logger to which a sink belongs."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self.sink = sink

    def __deepcopy__(self, memo: Any) -> SinkLogger:  # Lightning's dummy has every attribute, this one too
        return SinkLogger(MemorySink())


@register
class PassedSink(MemorySink):
    """Gives the sink that a test passes with its logger."""

    @classmethod
    def for_logger(cls, logger: object) -> Any:
        return logger.sink if isinstance(logger, SinkLogger) else None


def loggers(*sinks: Sink) -> list[SinkLogger]:
    """Loggers for ``Trainer(logger=...)`` that pass these sinks."""
    return [SinkLogger(sink) for sink in sinks]


# The options of every Trainer that a test makes, where it says nothing else.
TRAINER: dict[str, Any] = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
}


def make_trainer(monitors: Sequence[Any] = (), *, package: Any = pl, **options: Any) -> Any:
    return package.Trainer(**(TRAINER | {"callbacks": list(monitors)} | options))


def coordinator(trainer: Any) -> Coordinator:
    """What runs the monitors of a Trainer during a run."""
    (running,) = [callback for callback in trainer.callbacks if isinstance(callback, Coordinator)]
    return running


def seed(number: int = 1) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def fit(
    monitors: Sequence[Any] = (),
    module: Any = None,
    *,
    train: Any = None,
    val: Any = "validation",
    ckpt_path: str | None = None,
    **options: Any,
) -> Any:
    """Train, and give back the Trainer; ``val=None``: without validation."""
    trainer = make_trainer(monitors, **options)
    if module is None:
        seed()
        module = Net()
    train = loader(dataset()) if train is None else train
    val = loader(dataset(8)) if isinstance(val, str) else val
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return trainer


def fingerprint(trainer: Any) -> dict[str, Any]:
    """All that a training leaves behind, as values that can be compared."""
    module = trainer.lightning_module
    found: dict[str, Any] = {f"state {name}": value.clone() for name, value in module.state_dict().items()}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {number} {index} {name}": value for name, value in state.items()}
    found["torch stream"] = torch.get_rng_state()
    state = np.random.get_state()
    found["numpy stream"] = (state[0], state[1].tolist(), *state[2:])  # type: ignore[index, union-attr]
    found["python stream"] = random.getstate()
    found["modes"] = {name: each.training for name, each in module.named_modules()}
    found["requires_grad"] = {name: each.requires_grad for name, each in module.named_parameters()}
    for name, each in module.named_parameters():
        found[f"grad {name}"] = None if each.grad is None else each.grad.clone()
    found["hooks"] = {
        name: sum(len(value) for key, value in vars(each).items() if key.endswith("_hooks"))
        for name, each in module.named_modules()
    }
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names under which two fingerprints differ."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)

    return [name for name in sorted(one.keys() | other.keys()) if not same(one.get(name), other.get(name))]


def read_events(folder: str | Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0, "tensors": 0})
    found.Reload()
    return found


def steps(memory: MemorySink, tag: str) -> list[int]:
    return [step for step, record in memory.records if getattr(record, "tag", None) == tag]


def tags(memory: MemorySink) -> set[str]:
    """The tags that were written, but for the card that every run has."""
    return {record.tag for _, record in memory.records if hasattr(record, "tag")} - {"about/monitors"}


class Log(pl.Callback):
    """What was logged by the end of each validation, by its name without the kind."""

    def __init__(self, kind: str = "localization") -> None:
        self.kind = kind
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.epochs.append(logged(trainer, self.kind))


def logged(trainer: Any, kind: str = "localization") -> dict[str, float]:
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name.removeprefix(f"{kind}/"): value for name, value in found.items() if name.startswith(f"{kind}/")}
