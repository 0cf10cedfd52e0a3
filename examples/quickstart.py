"""Train a small network on pictures made on the spot and watch, in TensorBoard, what it learns.

    python examples/quickstart.py

Nothing is downloaded, and two minutes on two CPU cores are enough. Each picture holds one shape (a disk, a
square, a star ...) of random colour, texture, size and place among strokes and blobs: the network has to find the
shape to name it, and the class activation maps show whether it does.

What your own script needs of this is two lines:

    import lightning_interp as li

    trainer = pl.Trainer(callbacks=[*li.default_monitors()])
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import lightning_interp as li


def main(argv: Sequence[str] | None = None) -> float:
    """Train, say where the pictures are, and return the validation accuracy."""
    args = parse_args(argv)
    pl.seed_everything(0)

    # The images lie in memory, so worker processes would only cost time; Lightning advises them all the same.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning's own use of a name that recent releases of torch are about to drop.
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")
    train_set = Shapes(120 if args.small else 3600, seed=1)
    val_set = Shapes(60 if args.small else 600, seed=2)
    train_loader = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    val_loader = DataLoader(val_set, batch_size=100)

    model = ShapeClassifier(num_classes=len(train_set.classes))
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        logger=TensorBoardLogger(args.log_dir, name="quickstart", default_hp_metric=False),
        # The pictures know where their shapes are, so that it can be scored, too, where the network looks.
        callbacks=[*li.default_monitors(), li.LocalizationMonitor(method="cam")],
        log_every_n_steps=1 if args.small else 10,
        accelerator="auto",
        devices=1,
    )
    trainer.fit(model, train_loader, val_loader)

    accuracy, boxes = (float(trainer.callback_metrics[name]) for name in ("val_acc", "localization/max_box_accuracy"))
    whole = float(trainer.callback_metrics["localization/max_box_accuracy/whole_image"])
    print(f"\nValidation accuracy: {accuracy:.1%}")
    print(f"Boxes drawn from the class activation maps that meet the shape's: {boxes:.1%} (whole image: {whole:.1%})")
    print(f"The pictures are in {trainer.log_dir}. To look at them:\n")
    print(f'    tensorboard --logdir "{args.log_dir}" --samples_per_plugin images=1000\n')
    return accuracy


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small network on made-up pictures and log what it looks at to TensorBoard."
    )
    parser.add_argument(
        "--log-dir", type=Path, default=Path("runs"), metavar="DIR", help="folder for the logs (default: runs)"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="passes over the training images (default: 8, with --small 2)"
    )
    parser.add_argument("--small", action="store_true", help="a few images and seconds only: a check that all is well")
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 2 if args.small else 8
    elif args.epochs < 1:
        parser.error("--epochs must be at least 1")
    return args


# ---------------------------------------------------------------------------------------------- the network


def block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class ShapeClassifier(pl.LightningModule):
    """A plain convolutional network that ends in global average pooling and one linear layer.

    With such an ending the class activation maps are exact: the mean of a class's map, plus its bias, is its logit.
    """

    def __init__(self, num_classes: int, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            block(3, 24, stride=2),  # from 72 pixels a side to 36
            block(24, 48, stride=2),  # to 18, and no further: fine maps find the shapes better
            block(48, 64),
            block(64, 96),
            block(96, 128),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(images)).flatten(1))

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
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["learning_rate"], total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# ------------------------------------------------------------- the pictures: nothing below is about the library


class Shapes(Dataset[tuple[Tensor, int]]):
    """Pictures of one textured shape each, over a cluttered background, as many of every class.

    Args:
        n: number of pictures.
        size: side of the pictures, pixels.
        seed: the same seed gives the same pictures.

    Attributes:
        classes: the names of the shapes.
        targets: the class of each picture.
        boxes: (n, 4), the box around each shape, x1, y1, x2, y2 in pixels, maxima exclusive.
    """

    classes = ("disk", "ring", "square", "triangle", "star", "cross")

    def __init__(self, n: int, size: int = 72, seed: int = 0) -> None:
        self.classes = list(type(self).classes)
        self.transform = transforms.Compose(
            [
                transforms.ConvertImageDtype(torch.float32),
                transforms.Normalize(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
            ]
        )
        random = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % len(self.classes)
        parts = [draw(part, size, random) for part in labels.split(300)]  # bounds the memory taken
        self.images = torch.cat([images for images, _ in parts])  # (n, 3, size, size), uint8
        self.boxes = torch.cat([boxes for _, boxes in parts])
        self.targets: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def draw(labels: Tensor, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one picture for each label, all at once; lengths are shares of the picture's side.

    Args:
        labels: (N,), indices into ``Shapes.classes``.
        size: side of the pictures, pixels.
        random: where the random numbers come from.

    Returns:
        The pictures, uint8 (N, 3, size, size), and the boxes around the shapes, (N, 4).
    """
    n = len(labels)
    ticks = (torch.arange(size) + 0.5) / size
    y, x = ticks.view(1, size, 1), ticks.view(1, 1, size)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=random)

    def patches(cells: int) -> Tensor:  # smooth noise in [0, 1], (N, 1, size, size)
        noise = torch.rand(n, 1, cells, cells, generator=random)
        return F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=True)

    def turned(centre_x: Tensor, centre_y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        across, down = x - centre_x, y - centre_y
        return across * angle.cos() + down * angle.sin(), down * angle.cos() - across * angle.sin()

    def paint(canvas: Tensor, distance: Tensor, colour: Tensor) -> Tensor:  # where the distance is negative
        cover = (0.5 - distance * size).clamp(0, 1).unsqueeze(1)
        return canvas * (1 - cover) + colour * cover

    # The background: two shades that flow into each other, strokes and blobs of any colour.
    hue = uniform(0, 1)
    shade, other_shade = (colours(hue + uniform(-0.1, 0.1), uniform(0.1, 0.5), uniform(0.2, 0.9)) for _ in "ab")
    mix = (patches(2) + patches(6)) / 2
    canvas = shade * mix + other_shade * (1 - mix)
    for kind in ("stroke", "blob") * 5:
        u, v = turned(uniform(0, 1), uniform(0, 1), uniform(0, math.pi))
        if kind == "stroke":
            distance = torch.hypot((u.abs() - uniform(0.06, 0.3)).clamp(min=0), v) - uniform(0.006, 0.02)
        else:
            distance = torch.hypot(u, v * uniform(1, 2)) - uniform(0.02, 0.06)
        canvas = paint(canvas, distance, colours(uniform(0, 1), uniform(0.3, 1), uniform(0.3, 1)))

    # The shape: two shades of a hue that the background lacks, plain, striped or chequered.
    radius = uniform(0.2, 0.31)
    centre_x, centre_y = (radius + (1 - 2 * radius) * uniform(0, 1) for _ in "xy")
    u, v = (axis / radius for axis in turned(centre_x, centre_y, uniform(-0.5, 0.5)))
    distance = torch.empty(n, size, size)
    for label, name in enumerate(Shapes.classes):
        of_class = labels == label
        distance[of_class] = outline(name, u[of_class], v[of_class])
    frequency, phase = uniform(6, 14), uniform(0, 2 * math.pi)
    stripes = torch.sign(torch.sin(u * frequency + phase))
    chequers = stripes * torch.sign(torch.sin(v * frequency + phase))
    texture = torch.randint(3, (n, 1, 1), generator=random)
    mix = (torch.where(texture == 0, 1.0, torch.where(texture == 1, stripes, chequers)) + 1).unsqueeze(1) / 2
    hue = hue + uniform(0.3, 0.7)
    light = colours(hue, uniform(0.6, 1), uniform(0.8, 1))
    dark = colours(hue + uniform(-0.08, 0.08), uniform(0.6, 1), uniform(0.45, 0.65))
    canvas = paint(canvas, distance * radius, light * mix + dark * (1 - mix))

    inside = distance < 0
    boxes = torch.stack([*extent(inside.any(1)), *extent(inside.any(2))], 1)[:, [0, 2, 1, 3]]
    canvas = canvas + 0.04 * torch.randn(canvas.shape, generator=random)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8), boxes.float()


def outline(name: str, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance (about) to a shape's outline, negative inside; no shape reaches beyond a radius of 1."""
    distance = torch.hypot(u, v)
    if name == "disk":
        return distance - 0.95
    if name == "ring":
        return (distance - 0.75).abs() - 0.22
    if name == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.7
    if name == "cross":
        long, short = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
        return torch.maximum(long - 0.95, short - 0.28)
    # Regular with straight edges: fold the plane into one half of one corner; there it is a single line.
    corners, inner = {"triangle": (3, 0.5), "star": (5, 0.45)}[name]
    half = math.pi / corners
    angle = (torch.remainder(torch.atan2(v, u) + half, 2 * half) - half).abs()
    run, rise = 1 - inner * math.cos(half), inner * math.sin(half)
    return ((distance * angle.cos() - 1) * rise + distance * angle.sin() * run) / math.hypot(run, rise)


def extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First and last-plus-one true position of each row of an (N, size) mask."""
    mask = occupied.int()
    return mask.argmax(1), mask.shape[1] - mask.flip(1).argmax(1)


def colours(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """HSV, each (N, 1, 1) in [0, 1] (the hue goes round), to RGB (N, 3, 1, 1)."""
    sector = torch.remainder(torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + hue.unsqueeze(1) * 6, 6)
    ramp = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value.unsqueeze(1) * (1 - saturation.unsqueeze(1) * ramp)


if __name__ == "__main__":
    main()
