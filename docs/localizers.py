"""Writes the table of torchvision's and timm's classifiers as adapted by `GAPClassifier.from_classifier`.

pip install -e ".[test]" && python docs/localizers.py > docs/localizers.md
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision import models

from lightning_interp.errors import ConfigurationError
from lightning_interp.localize import GAPClassifier

TORCHVISION = (
    *("alexnet", "vgg11", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121"),
    *("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small"),
    *("mobilenet_v3_large", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s"),
    *("regnet_x_400mf", "regnet_y_400mf", "convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t"),
)
TIMM = (
    *("resnet18", "resnet10t", "efficientnet_b0", "tf_efficientnet_b0", "convnext_atto", "convnextv2_atto"),
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "mixer_s32_224"),
    *("swin_tiny_patch4_window7_224", "mobilenetv3_small_050", "mobilevit_xxs", "densenet121", "nfnet_f0"),
    *("regnety_002", "poolformer_s12", "coatnet_nano_rw_224", "hrnet_w18_small", "levit_128s", "vgg11"),
)
SIZE = 224


def classifier(library: str, name: str) -> nn.Module:
    """An untrained classifier with 10 classes, whose statistics and head are of a scale that shows differences."""
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(name, num_classes=10)
    else:
        unset = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = getattr(models, name)(num_classes=10, **unset)
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 10]
    for head in heads:
        nn.init.normal_(head.weight)  # some are initialised with zeros
    for module in model.modules():
        if type(module).__name__ == "CNBlock":
            nn.init.ones_(module.layer_scale)  # initialised with 1e-6
    return calibrated(model)


def calibrated(model: nn.Module) -> nn.Module:
    """Estimate the batch norms' statistics: with the initial ones, activations of some untrained networks vanish."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model.eval()
    for norm in norms:
        norm.train()
    with torch.no_grad():
        model(pictures(2))
    return model.eval()


def pictures(n: int, size: int = SIZE) -> Tensor:
    """Smooth noise, whose spectrum is closer to that of photographs than white noise."""
    coarse = torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(n))
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic")


def table_row(library: str, name: str) -> tuple[str, ...]:
    """One row: model, cut, maps, exactness, logits, finer maps."""
    model, images = classifier(library, name), pictures(2)
    sample = images[:1]
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        adapted = GAPClassifier.from_classifier(model, sample=sample)
        expected = model(images)
        logits, maps = adapted.forward_with_maps(images)
    layer = adapted.summary.split("'")[1]
    is_kept = not any("replaces" in str(warning.message) for warning in caught)
    size = f"{maps.shape[2]} x {maps.shape[3]}"
    if is_kept:
        error = float((logits - expected).abs().max() / expected.abs().max())
        relation = "equal" if error < 1e-4 else f"DIFFERENT ({error:.0e})"
    else:
        relation = "new head, to be trained"
    return name, f"`{layer}`", size, "yes" if is_kept else "after training", relation, ", ".join(finer(model, sample))


def finer(model: nn.Module, sample: Tensor) -> Iterator[str]:
    """Map sizes with `output_stride=16` and `8`."""
    for stride in (16, 8):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                features = GAPClassifier.from_classifier(model, 2, sample=sample, output_stride=stride).features(sample)
            yield f"{stride}: {features.shape[2]} x {features.shape[3]}"
        except ConfigurationError:
            yield f"{stride}: no"


def main(argv: Sequence[str] | None = None) -> None:
    print(f"""# Classifiers as localizers

What `GAPClassifier.from_classifier(model)` does, at {SIZE} x {SIZE} pixels. "Exact" says whether the maps are those of
the model's logits: where its head is average pooling and one linear layer (or a fully convolutional one, or has a
norm between), the logits stay equal to 1e-4. Elsewhere `num_classes` gives a new head, whose maps are exact as well,
once it is trained. The last column: the size of the maps with `output_stride=16` and `8`, where the model allows it.

Made by `python docs/localizers.py > docs/localizers.md` with torchvision {torchvision.__version__.split("+")[0]} and
timm {timm.__version__}.
""")
    for library, names in {"torchvision": TORCHVISION, "timm": TIMM}.items():
        print(f"## {library}\n\n| model | cut at | maps | exact | logits | finer |\n|---|---|---|---|---|---|")
        for name in names:
            print("| " + " | ".join(table_row(library, name)) + " |", flush=True)
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
