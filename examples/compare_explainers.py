"""Explain four photographs with every explainer of the library, in one picture.

    python examples/compare_explainers.py --data DIR --weights FILE

Writes one picture. The photographs are torchvision's Oxford-IIIT Pet; the network is SqueezeNet with ImageNet weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import OxfordIIITPet
from torchvision.io import write_png
from torchvision.models import SqueezeNet, SqueezeNet1_0_Weights, squeezenet1_0
from torchvision.transforms.functional import resize

from lightning_interp import explain
from lightning_interp.data.probe import Probe
from lightning_interp.render import Caption, colorize, overlay, tile_grid

SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = (0, 20, 35, 50)  # of the test split
# Gradients are shown beside the photograph, all other maps as heat over it. SqueezeNet has no attention.
FINE = list(explain.explainers("gradients"))
COARSE = [name for name, method in explain.explainers().items() if method.family not in ("gradients", "attention")]
# The width of a tile; a row holds two methods.
TILE = 144
UNIT_LAYER = 10
SMALL = {
    "smoothgrad": {"n_samples": 2},
    "vargrad": {"n_samples": 2},
    "integrated_gradients": {"n_steps": 2},
    "occlusion": {"patch": 0.5, "stride": 0.25},
    "rise": {"n_masks": 8},
    "scorecam": {"n_channels": 4},
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Explain, write the picture, and return its path."""
    args = parse_args(argv)
    model = pretrained(args.weights).eval()
    names = SqueezeNet1_0_Weights.IMAGENET1K_V1.meta["categories"]
    plain = transforms.Compose(
        [transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    pets = OxfordIIITPet(args.data, "test", transform=plain, download=args.download)
    images = torch.stack([pets[index][0] for index in (PHOTOGRAPHS[:1] if args.small else PHOTOGRAPHS)])
    with torch.no_grad():
        probabilities, predicted = model(images).softmax(1).max(1)
    pictures = Probe(images, mean=IMAGENET_MEAN, std=IMAGENET_STD).to_display()

    columns = [pictures]
    titles = ["the photograph"]
    for method in (*COARSE, *FINE):
        start = time.perf_counter()
        if method == "deconvnet":
            maps = strongest_units(model, images)
        else:
            maps = getattr(explain, method)(model, images, predicted, **(SMALL.get(method, {}) if args.small else {}))
        columns.append(drawn(method, maps, pictures))
        titles.append("deconvnet of a unit" if method == "deconvnet" else method)
        print(f"{method:22} {(time.perf_counter() - start) / len(images):6.2f} s an image")
    tiles = resize(torch.cat(columns).permute(0, 3, 1, 2), [TILE, TILE]).permute(0, 2, 3, 1)
    predictions = [
        f"{names[index]} {100 * float(probability):.0f} %"
        for index, probability in zip(predicted, probabilities, strict=True)
    ]
    captions = [Caption((title, *([text] if title == titles[0] else ()))) for title in titles for text in predictions]
    grid = tile_grid(tiles, captions, columns=2 * len(images))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_png(grid.permute(2, 0, 1), str(args.out))
    print(f"\nThe picture is {args.out}")
    return args.out


def strongest_units(model: SqueezeNet, images: Tensor) -> Tensor:
    """Project the unit of a layer with the largest activation for each photograph, as in the paper.

    For a class, a deconvnet's map is empty here: in this sparse network the rectified signal vanishes on some layer.
    """
    maps = []
    for image in images.split(1):
        with torch.no_grad():
            activations = model.features[: UNIT_LAYER + 1](image)[0]
        unit = int(activations.amax((1, 2)).argmax())
        maps.append(explain.deconvnet(model, image, unit=(f"features.{UNIT_LAYER}", unit), channels="max_abs"))
    return torch.cat(maps)


def drawn(method: str, maps: Tensor, pictures: Tensor) -> Tensor:
    """Draw (N, H, W) maps as (N, H, W, 3) uint8 tiles."""
    if method in COARSE:
        scale = "relu" if getattr(explain, method).has_zero else "min_max"
        return overlay(pictures, explain.normalize_maps(maps, scale), "jet", 0.5)
    # A percentile, as outliers would darken all other pixels; a higher one for a unit, whose map is mostly zero.
    heat = explain.normalize_maps(maps, "max_abs", percentile=99.9 if method == "deconvnet" else 99.0)
    colors = colorize(heat, "inferno")
    if method != "deconvnet":
        return colors
    dimmed = 0.35 * pictures  # the map is zero for the rest of the photograph
    return (dimmed + heat[..., None] * (colors - dimmed)).to(torch.uint8)


def pretrained(weights: Path | None) -> SqueezeNet:
    """Return SqueezeNet 1.0 with the ImageNet weights of a file, or with those that torchvision downloads."""
    if weights is None:
        try:
            return squeezenet1_0(weights=SqueezeNet1_0_Weights.IMAGENET1K_V1)
        except URLError as error:
            raise SystemExit(
                f"compare_explainers.py: cannot download torchvision's weights ({error.reason}); name a file with "
                "--weights FILE"
            ) from error
    model = squeezenet1_0()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and check that data and weights exist."""
    parser = argparse.ArgumentParser(description="Show the maps of all explainers side by side.")
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
        "--out", type=Path, default=Path("explainers.png"), metavar="FILE", help="the picture (default: explainers.png)"
    )
    parser.add_argument("--small", action="store_true", help="one photograph, few samples: a quick check")
    args = parser.parse_args(argv)
    if not args.download and not (args.data / "oxford-iiit-pet" / "annotations").is_dir():
        parser.error(f"no folder oxford-iiit-pet/ with images/ and annotations/ in {args.data}; --download fetches it")
    if args.weights is not None and not args.weights.is_file():
        parser.error(f"no weights file {args.weights}; leave --weights out to download torchvision's own")
    return args


if __name__ == "__main__":
    main()
