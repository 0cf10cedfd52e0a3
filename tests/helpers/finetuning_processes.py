"""Modules to fine-tune, and their training by two processes under DDP: run as a script by test_finetuning.py."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_interp.callbacks.finetuning import GAPHeadFinetuning
from tests.helpers.runs import CLASSES, dataset, fit, loader, make_trainer, seed
from tests.helpers.runs import body as network

SHAPE = (1, 3, 12, 12)
UNFREEZE, EPOCHS = 1, 3


def body(plain: bool = False, dropout: float = 0.3) -> nn.Sequential:
    layers = network(plain=plain)
    if not plain:
        layers[0].bias = None  # in front of a batch norm it has no gradient
    for layer in layers.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    return layers


def callback(**options: Any) -> GAPHeadFinetuning:
    return GAPHeadFinetuning(**({"sample": SHAPE} | options))


class Tiny:
    """The methods of a small module of either package."""

    rate = 0.1
    trained = 0
    configure: Callable[[Any], Any] | None = None

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # type: ignore[attr-defined,no-any-return]

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])  # type: ignore[operator]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained += 1
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=4)  # type: ignore[attr-defined]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=4)  # type: ignore[attr-defined]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[operator,no-any-return]

    def configure_optimizers(self) -> Any:
        if self.configure is not None:
            return self.configure(self)
        return torch.optim.SGD(self.parameters(), self.rate)  # type: ignore[attr-defined]

    @staticmethod
    @functools.cache
    def of(package: Any) -> Any:
        """The class in a package."""

        class Made(Tiny, package.LightningModule):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.model = body()

        Made.__name__ = Made.__qualname__ = "Tiny"
        return Made


class Manual:
    """Two optimisers: one of another layer, one of the head with the trainable part of the backbone."""

    @staticmethod
    def of(package: Any) -> Any:
        class Made(Tiny.of(package)):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.other = nn.Linear(2, 2)
                self.automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> None:
                one, two = self.optimizers()
                for optimizer in (one, two):
                    optimizer.zero_grad()
                self.manual_backward(self.loss(batch) + self.other(torch.ones(2)).sum())
                one.step()
                two.step()

            def configure_optimizers(self) -> Any:
                trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                return [torch.optim.SGD(self.other.parameters(), 0.3), torch.optim.SGD(trainable, 0.1)]

        seed()
        return Made()


class ZeroHead:
    """A class whose fresh instances give zeros, with a norm before the head."""

    @staticmethod
    def of(package: Any, make: bool = True) -> Any:
        class Made(Tiny.of(package)):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6)]
                self.model = nn.Sequential(*layers, nn.Linear(6, CLASSES))
                nn.init.zeros_(self.model[-1].weight)
                nn.init.zeros_(self.model[-1].bias)

        seed()
        return Made() if make else Made


def tiny(
    package: Any, configure: Callable[[Any], Any] | None = None, *, plain: bool = False, dropout: float = 0.3
) -> Any:
    seed()
    module = Tiny.of(package)()
    if plain or dropout != 0.3:
        seed()
        module.model = body(plain, dropout)
    module.configure = None if configure is None else lambda _: configure(module)
    seed(2)  # the next random numbers do not depend on how the module was made
    return module


def classifier_of(module: Any) -> nn.Module:
    classifier: nn.Module = module.model
    return classifier


def rates(trainer: Any, module: Any) -> tuple[float, float]:
    """The head's learning rate and the backbone's, where it has one."""
    by_part: dict[bool, set[float]] = {True: set(), False: set()}
    backbone = {id(parameter) for parameter in getattr(module.model, "features", nn.Module()).parameters()}
    head = {id(parameter) for parameter in module.model.head.parameters()}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in backbone | head:
                    by_part[id(parameter) in backbone].add(float(group["lr"]))
    (of_head,) = by_part[False]
    (of_backbone,) = by_part[True] or {float("nan")}
    return of_head, of_backbone


def toy(n: int) -> tuple[Tensor, Tensor]:
    """One of three channels is brighter."""
    images = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 3
    images[torch.arange(n), labels] += 0.7
    return images, labels


def start() -> Any:
    """The adapted module before training: with the same head on every rank, and without batch norms."""
    module = tiny(pl, plain=True)
    seed(2)
    callback(num_classes=CLASSES).setup(make_trainer(), module, "validate")
    return module


def train(data: Any, epochs: int = EPOCHS, ckpt_path: str | None = None, **options: Any) -> Any:
    module = tiny(pl, plain=True)
    module.rate = 1.0
    monitors = [callback(num_classes=CLASSES, unfreeze_at_epoch=UNFREEZE, head_lr_multiplier=2.0)]
    return fit(monitors, module, train=data, val=None, max_epochs=epochs, ckpt_path=ckpt_path, **options)


def alone() -> dict[str, Tensor]:
    """One process that sees both ranks' images in one batch."""
    state: dict[str, Tensor] = classifier_of(train(loader(dataset(16))).lightning_module).state_dict()
    return state


def share() -> DataLoader[Any]:
    """Every second image: two ranks' batches make one of four."""
    sampler = DistributedSampler(dataset(16), 2, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    return DataLoader(dataset(16), batch_size=2, sampler=sampler)


DDP = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}


def unfreezes() -> Any:
    return classifier_of(train(share(), **DDP).lightning_module).state_dict()


def resumes() -> Any:
    path = str(Path(sys.argv[1]) / "stopped.ckpt")
    train(share(), 2, **DDP).save_checkpoint(path)
    return classifier_of(train(share(), ckpt_path=path, **DDP).lightning_module).state_dict()


def main() -> None:
    torch.set_num_threads(1)
    for scene in (unfreezes, resumes):
        torch.save(scene(), Path(sys.argv[1]) / f"{scene.__name__}-{os.environ.get('LOCAL_RANK', '0')}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
