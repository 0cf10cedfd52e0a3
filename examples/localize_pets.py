"""Turn SqueezeNet into a localizer of pets, fine-tune it on their breeds, and score where it looks after every epoch.

    python examples/localize_pets.py --data DIR --weights FILE

The data set is torchvision's Oxford-IIIT Pet; no box and no mask is used for training, only for scoring.

What your own script needs of this is one callback:

    trainer = pl.Trainer(callbacks=[li.GAPHeadFinetuning(num_classes=37), li.LocalizationMonitor(unpack=...)])
"""

from __future__ import annotations

import argparse
import csv
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import OxfordIIITPet
from torchvision.models import SqueezeNet1_0_Weights, squeezenet1_0
from torchvision.ops import box_iou, masks_to_boxes

import lightning_interp as li
from lightning_interp import localize

SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PET, BACKGROUND, BORDER = 1, 2, 3  # in the trimaps
Batch = dict[str, Tensor]
Scores = dict[str, float]


def main(argv: Sequence[str] | None = None) -> Scores:
    """Fine-tune, print the table, and return the chosen epoch's scores on the test photographs."""
    args = parse_args(argv)
    pl.seed_everything(0, workers=True)
    # Lightning's own use of a name that recent releases of torch are about to drop.
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")

    to_tensor = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    plain = transforms.Compose([transforms.Resize((SIZE, SIZE)), *to_tensor])
    augmented = transforms.Compose(
        [transforms.RandomResizedCrop(SIZE, scale=(0.6, 1.0)), transforms.RandomHorizontalFlip(), *to_tensor]
    )
    train_set = Pets(args.data, "trainval", augmented, download=args.download)
    known_set, test_set = Pets(args.data, "trainval", plain), Pets(args.data, "test", plain)
    workers = min(2, os.cpu_count() or 1)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": True}
    train_loader = DataLoader(train_set, batch_size=16, shuffle=True, drop_last=True, **options)
    known_loader, test_loader = (DataLoader(each, batch_size=37, **options) for each in (known_set, test_set))

    curve = Curve(known_loader, test_loader)
    # The epoch is chosen on the training photographs; the test photographs have no say.
    best = ModelCheckpoint(monitor="localization/max_box_accuracy", mode="max", save_weights_only=True)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        logger=TensorBoardLogger(args.log_dir, name="localize-pets", default_hp_metric=False),
        callbacks=[
            li.GAPHeadFinetuning(
                attribute="network",
                num_classes=len(train_set.classes),
                layer="classifier.2",  # the rectified maps of the 1000 old classes: a new one is a mixture of them
                unfreeze_at_epoch=1,
                head_lr_multiplier=1,
            ),
            li.LocalizationMonitor(probe=8, unpack=dict),
            curve,
            best,
        ],
        log_every_n_steps=1,
        limit_train_batches=2 if args.small else None,
        limit_val_batches=1 if args.small else None,
        num_sanity_val_steps=0,
        accelerator="auto",
        devices=1,
    )
    network = pretrained(args.weights)
    model = PetClassifier(network, mixtures(network, known_loader, len(train_set.classes)))
    trainer.fit(model, train_loader, known_loader)

    chosen = curve.best_epoch
    print(f"\n{curve.table(chosen)}\n")
    print("The epoch and the threshold are chosen on the training photographs; all columns but the first are of the")
    print("test photographs. Box: IoU of at least 0.5 with the box around the whole pet. PxAP leaves the border out.")
    print(f"\nThe curves and the boxes are in {trainer.log_dir}. To look at them:\n")
    print(f'    tensorboard --logdir "{args.log_dir}" --samples_per_plugin images=1000\n')
    return curve.rows[chosen]


class Pets(OxfordIIITPet):
    """Photographs of pets with their breed, mask and box, all at one size; the shapes of the transform's crops vary."""

    def __init__(self, root: Path, split: str, transform: Any, download: bool = False) -> None:
        super().__init__(root, split, "category", transform=transform, download=download)
        self.targets: list[int] = self._labels
        table = self._anns_folder / "boxes.csv"
        rows = csv.DictReader(table.open(encoding="utf-8")) if table.is_file() else ()
        self._boxes = {row["image"]: [float(row[f"pet_{side}"]) for side in SIDES] for row in rows}

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.open(self._images[index]).convert("RGB")
        trimap = torch.from_numpy(np.array(Image.open(self._segs[index])))
        name = self._images[index].stem
        box = torch.tensor(self._boxes[name]) if name in self._boxes else masks_to_boxes(trimap[None] != BACKGROUND)[0]
        small = F.interpolate(trimap[None, None].float(), (SIZE, SIZE), mode="nearest-exact")[0, 0]
        return {
            "images": self.transform(image),
            "targets": self._labels[index],
            "boxes": (box * torch.tensor([SIZE / image.width, SIZE / image.height] * 2)).clamp(0, SIZE),
            "masks": small == PET,
            "ignore": small == BORDER,
        }


SIDES = ("xmin", "ymin", "xmax", "ymax")


def pretrained(weights: Path | None) -> nn.Module:
    """SqueezeNet 1.0 with the ImageNet weights of a file, or with torchvision's own, which it downloads once."""
    if weights is None:
        try:
            return squeezenet1_0(weights=SqueezeNet1_0_Weights.IMAGENET1K_V1)
        except URLError as error:
            raise SystemExit(
                f"localize_pets.py: cannot download torchvision's weights ({error.reason}); name a file with --weights"
            ) from error
    model = squeezenet1_0()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


@torch.no_grad()
def mixtures(network: nn.Module, loader: DataLoader[Any], breeds: int) -> Tensor:
    """What ImageNet's classes the photographs of each breed are taken for: (breeds, 1000) shares that sum to 1."""
    shares = torch.zeros(breeds, 1000)
    network.eval()
    for batch in loader:
        shares.index_add_(0, batch["targets"], network(batch["images"]).softmax(1))
    network.train()
    return shares / shares.sum(1, keepdim=True)


class PetClassifier(pl.LightningModule):
    """A classifier, of which the callback makes a localizer in ``setup``."""

    def __init__(self, network: nn.Module, mixtures: Tensor, learning_rate: float = 3e-5) -> None:
        super().__init__()
        self.save_hyperparameters("learning_rate")
        self.network, self.mixtures = network, mixtures

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def setup(self, stage: str) -> None:
        """The callback has adapted the network by now; its new head starts at zero."""
        with torch.no_grad():
            self.network.head.weight.copy_(self.mixtures)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["images"]), batch["targets"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("known_acc", (self(batch["images"]).argmax(1) == batch["targets"]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], weight_decay=1e-2)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["learning_rate"], total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Curve(pl.Callback):
    """Scores the localizer before training and after every epoch, with the threshold of the training photographs."""

    def __init__(self, known: DataLoader[Any], test: DataLoader[Any]) -> None:
        self.known, self.test = known, test
        self.rows: list[Scores] = []

    @property
    def best_epoch(self) -> int:
        """The row whose boxes on the training photographs are best; 0 is before training."""
        return max(range(len(self.rows)), key=lambda row: self.rows[row]["known_box"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = truth_and_maps(pl_module, self.known, trainer.num_val_batches[0])
        threshold = localize.fit_threshold(known["maps"], known["boxes"])
        self.score(trainer, pl_module, float(localize.max_box_accuracy(known["maps"], known["boxes"])), threshold)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = trainer.callback_metrics  # of the training photographs, which the monitor has scored
        self.score(
            trainer, pl_module, float(found["localization/max_box_accuracy"]), float(found["localization/threshold"])
        )

    def score(self, trainer: pl.Trainer, module: Any, known_box: float, threshold: float) -> None:
        """Add a row to the table, and to the logger's curves."""
        test = truth_and_maps(module, self.test, trainer.num_val_batches[0])
        fitted, fixed = (
            (box_iou(localize.maps_to_boxes(test["maps"], share), test["boxes"]).diagonal() >= 0.5).float().mean()
            for share in (threshold, 0.2)
        )
        scores = {
            "known_box": known_box,
            "threshold": threshold,
            "box": float(fitted),
            "box_at_20": float(fixed),
            "pxap": float(localize.pixel_average_precision(test["maps"], test["masks"], test["ignore"])),
            "pointing": float(localize.pointing_game(test["maps"], test["masks"] | test["ignore"], tolerance=0)),
            "accuracy": float((test["predicted"] == test["targets"]).float().mean()),
        }
        trainer.logger.log_metrics({f"test/{name}": value for name, value in scores.items()}, step=trainer.global_step)
        self.rows.append(scores if self.rows else scores | baselines(test))

    def table(self, chosen: int) -> str:
        """All rows as Markdown."""
        names = ("known_box", "threshold", "box", "box_at_20", "pxap", "pointing", "accuracy")
        titles = ("box, training", "threshold", "box", "box at 20 %", "PxAP", "pointing", "breed")
        lines = ["| epoch | " + " | ".join(titles) + " |", "|---" * (len(names) + 1) + "|"]
        for number, row in enumerate(self.rows):
            label = ("before" if number == 0 else str(number)) + (" (chosen)" if number == chosen else "")
            lines.append(f"| {label} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")
        row = self.rows[0]
        lines.append(
            f"| whole image, uniform map, centre | | | {row['whole_image']:.3f} | | {row['uniform']:.3f} "
            f"| {row['center']:.3f} | |"
        )
        return "\n".join(lines)


@torch.no_grad()
def truth_and_maps(module: Any, loader: DataLoader[Any], limit: float) -> Batch:
    """All batches of a loader as one, with the true breed's map of each photograph, at its size."""
    training, parts = module.training, list[Batch]()
    module.eval()
    for number, batch in enumerate(loader):
        if number >= limit:
            break
        logits, maps = module.network.forward_with_maps(batch["images"].to(module.device))
        true = maps[torch.arange(len(maps)), batch["targets"]].cpu()
        large = F.interpolate(true[:, None], (SIZE, SIZE), mode="bilinear")[:, 0]
        parts.append({**batch, "maps": large, "predicted": logits.argmax(1).cpu()})
    module.train(training)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def baselines(test: Batch) -> Scores:
    """What needs no model at all."""
    boxes, pixels = localize.MaxBoxAccuracy(), localize.PixelAveragePrecision()
    points = localize.PointingGame(tolerance=0)
    boxes.update(test["maps"], test["boxes"])
    pixels.update(test["maps"], test["masks"], test["ignore"])
    points.update(test["maps"], test["masks"] | test["ignore"])
    found = boxes.baselines() | pixels.baselines() | points.baselines()
    return {name: float(value) for name, value in found.items()}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and complain about what is missing before anything slow starts."""
    parser = argparse.ArgumentParser(
        description="Turn SqueezeNet into a localizer, fine-tune it on the breeds of pets, and score where it looks."
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
        "--log-dir", type=Path, default=Path("runs"), metavar="DIR", help="folder for the logs (default: runs)"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="passes over the training images (default: 10, with --small 1)"
    )
    parser.add_argument("--small", action="store_true", help="one epoch of two batches: a check that all is well")
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 1 if args.small else 10
    elif args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if not args.download and not (args.data / "oxford-iiit-pet" / "annotations").is_dir():
        parser.error(f"no folder oxford-iiit-pet/ with images/ and annotations/ in {args.data}; --download fetches it")
    if args.weights is not None and not args.weights.is_file():
        parser.error(f"no weights file {args.weights}; leave --weights out to download torchvision's own")
    return args


if __name__ == "__main__":
    main()
