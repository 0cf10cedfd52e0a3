"""A small training run, to which the recipes of this folder add what they extend."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def squares(n: int) -> TensorDataset:
    """Images (n, 3, 24, 24) with a bright square on the left (class 0) or on the right (class 1)."""
    images, labels = 0.2 * torch.rand(n, 3, 24, 24), torch.arange(n) % 2
    for image, label in zip(images, labels, strict=True):
        image[:, 8:16, (2 + 12 * label) : (10 + 12 * label)] += 0.8
    return TensorDataset(images, labels)


def train(callbacks: Sequence[Any], **options: Any) -> pl.Trainer:
    """Train for two epochs on the CPU; ``options`` are the Trainer's."""
    pl.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **(quiet | {"max_epochs": 2} | options))
    trainer.fit(Classifier(), DataLoader(squares(32), batch_size=8), DataLoader(squares(15), batch_size=4))
    return trainer
