"""Fine-tune SqueezeNet on photographs of cats and dogs and watch, in TensorBoard, where it looks.

    python examples/pets.py --data DIR --download

The data set is torchvision's Oxford-IIIT Pet. `--task catdog` tells cats from dogs, `--task breeds` the 37 breeds.

What your own script needs of this is two lines:

    import lightning_interp as li

    trainer = pl.Trainer(callbacks=[*li.default_monitors()])
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytorch_lightning as pl
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import OxfordIIITPet
from torchvision.models import SqueezeNet, SqueezeNet1_0_Weights, squeezenet1_0

import lightning_interp as li

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv: Sequence[str] | None = None) -> float:
    """Fine-tune, say where the pictures are, and return the accuracy on the test photographs."""
    args = parse_args(argv)
    pl.seed_everything(0, workers=True)
    # Lightning's own use of a name that recent releases of torch are about to drop.
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")

    to_tensor = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    augmented = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.6, 1.0)),
            transforms.RandomHorizontalFlip(),
            *to_tensor,
        ]
    )
    plain = transforms.Compose([transforms.Resize((224, 224)), *to_tensor])
    train_set = Pets(args.data, "trainval", args.task, augmented, download=args.download)
    val_set = Pets(args.data, "test", args.task, plain)
    workers = min(4, os.cpu_count() or 1)
    train_loader = DataLoader(
        train_set, batch_size=16, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    val_loader = DataLoader(val_set, batch_size=37, num_workers=workers, persistent_workers=True)

    model = PetClassifier(pretrained(args.weights), num_classes=len(train_set.classes))
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        logger=TensorBoardLogger(args.log_dir, name=f"pets-{args.task}", default_hp_metric=False),
        callbacks=[*li.default_monitors()],
        log_every_n_steps=1,
        limit_train_batches=2 if args.small else None,
        limit_val_batches=1 if args.small else None,
        accelerator="auto",
        devices=1,
    )
    trainer.fit(model, train_loader, val_loader)

    accuracy = float(trainer.callback_metrics["val_acc"])
    print(f"\nAccuracy on the test photographs: {accuracy:.1%}")
    print(f"The pictures are in {trainer.log_dir}. To look at them:\n")
    print(f'    tensorboard --logdir "{args.log_dir}" --samples_per_plugin images=1000\n')
    return accuracy


class Pets(OxfordIIITPet):
    """Oxford-IIIT Pet with ``classes`` and ``targets`` of the task, as most data sets of torchvision have them."""

    def __init__(self, root: Path, split: str, task: str, transform: Any, download: bool = False) -> None:
        target_type = "binary-category" if task == "catdog" else "category"
        super().__init__(root, split, target_type, transform=transform, download=download)
        self.targets: list[int] = self._bin_labels if task == "catdog" else self._labels
        if task == "catdog":
            self.classes = ["cat", "dog"]


def pretrained(weights: Path | None) -> SqueezeNet:
    """SqueezeNet 1.0 with the ImageNet weights of a file, or with torchvision's own, which it downloads once."""
    if weights is None:
        try:
            return squeezenet1_0(weights=SqueezeNet1_0_Weights.IMAGENET1K_V1)
        except URLError as error:
            raise SystemExit(
                f"pets.py: cannot download torchvision's weights ({error.reason}); name a file with --weights FILE"
            ) from error
    model = squeezenet1_0()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


class PetClassifier(pl.LightningModule):
    """A pretrained SqueezeNet with a new last convolution, trained faster than what lies beneath it.

    SqueezeNet ends in a 1x1 convolution and average pooling, so that its last activations are the class activation maps
    themselves.
    """

    def __init__(
        self, network: SqueezeNet, num_classes: int, learning_rate: float = 1e-3, backbone_rate: float = 2e-5
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="network")
        maps = nn.Conv2d(512, num_classes, kernel_size=1)
        nn.init.zeros_(maps.weight)  # the features are large: with random weights the first steps would wreck them
        nn.init.zeros_(maps.bias)
        # The original has a ReLU before the pooling; left out, since a new class can fall silent under it for good.
        network.classifier = nn.Sequential(nn.Dropout(0.5), maps, nn.AdaptiveAvgPool2d(1))
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = F.cross_entropy(self(images), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, targets))
        self.log("val_acc", (logits.argmax(1) == targets).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [
            {"params": self.network.classifier.parameters(), "lr": self.hparams["learning_rate"]},
            {"params": self.network.features.parameters(), "lr": self.hparams["backbone_rate"]},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and complain about what is missing before anything slow starts."""
    parser = argparse.ArgumentParser(
        description="Fine-tune SqueezeNet on the Oxford-IIIT Pet photographs and log where it looks to TensorBoard."
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="the folder that holds (or gets) oxford-iiit-pet/"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the data set into DIR if it is not there (about 800 MB)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="ImageNet weights of squeezenet1_0 (default: torchvision's own)"
    )
    parser.add_argument(
        "--task",
        choices=("catdog", "breeds"),
        default="catdog",
        help="cat or dog, or one of 37 breeds (default: catdog)",
    )
    parser.add_argument(
        "--log-dir", type=Path, default=Path("runs"), metavar="DIR", help="folder for the logs (default: runs)"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="passes over the training images (default: 6, with --small 1)"
    )
    parser.add_argument("--small", action="store_true", help="one epoch of two batches: a check that all is well")
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 1 if args.small else 6
    elif args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if not args.download and not (args.data / "oxford-iiit-pet" / "annotations").is_dir():
        parser.error(f"no folder oxford-iiit-pet/ with images/ and annotations/ in {args.data}; --download fetches it")
    if args.weights is not None and not args.weights.is_file():
        parser.error(f"no weights file {args.weights}; leave --weights out to download torchvision's own")
    return args


if __name__ == "__main__":
    main()
