"""Small models of every kind that the contract promises to explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

CLASSES = 3


def itself(logits: Tensor) -> Any:
    return logits


class Net(nn.Module):
    """Two convolutions, global average pooling, one linear layer; ``wrap`` makes the output of the logits."""

    def __init__(self, wrap: Callable[[Tensor], Any] = itself, classes: int = CLASSES) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True), nn.Dropout2d(0.5))
        self.head = nn.Linear(8, classes)
        self.wrap = wrap

    def features(self, images: Tensor) -> Tensor:
        return self.second(self.first(images))

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.head(self.features(images).mean((2, 3))))


class CountingNet(Net):
    """Counts its forward passes."""

    calls = 0

    def forward(self, images: Tensor) -> Any:
        type(self).calls += 1
        return super().forward(images)


class Flattening(nn.Module):
    """Like LeNet: activations by functions, and a flattening where others pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 8, 5)
        self.fc1, self.fc2 = nn.Linear(8 * 5 * 5, 16), nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu_(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class Repeating(nn.Module):
    """Uses one block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.stem(images))).mean((2, 3)))


class Checkpointed(nn.Module):
    """Checkpoints its middle block; ``last`` stands after it."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.last = nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = checkpoint(self.block, self.stem(images), use_reentrant=self.use_reentrant)
        return self.head(self.last(x).mean((2, 3)))


class Overwriting(Net):
    """Normalises its input in place."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images.sub_(0.5).div_(0.25))


def frozen() -> nn.Module:
    model = Net()
    for parameter in [*model.first.parameters(), *model.second.parameters()]:
        parameter.requires_grad = False
    return model


def vgg() -> nn.Module:
    with torch.device("meta"):
        model = VGG(nn.Sequential(), init_weights=False)  # type: ignore[no-untyped-call]
    model.features = make_layers([8, "M", 8, "M", 12], batch_norm=True)
    model.classifier = nn.Sequential(nn.Linear(12 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, CLASSES))
    return model


def convnext() -> nn.Module:
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return ConvNeXt(blocks, num_classes=CLASSES, layer_scale=1.0)


def mobilenet_v3() -> nn.Module:
    """Each of its three kinds of blocks once, so that copying it is fast."""
    blocks = [
        InvertedResidualConfig(8, 3, 8, 8, True, "RE", 2, 1, 1),
        InvertedResidualConfig(8, 3, 24, 16, False, "RE", 2, 1, 1),
        InvertedResidualConfig(16, 5, 32, 16, True, "HS", 1, 1, 1),
    ]
    return models.MobileNetV3(blocks, last_channel=16, num_classes=CLASSES)


class SlimResNet(models.ResNet):
    """ResNet-18 with an eighth of its channels, so that slow references take seconds."""

    def __init__(self) -> None:
        super().__init__(models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=CLASSES)
        self.fc = nn.Linear(64, CLASSES)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def timm_vit() -> nn.Module:
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, depth=2, num_heads=2, embed_dim=8, mlp_ratio=1, num_classes=CLASSES
    )
    nn.init.normal_(model.head.weight)
    return model


def vit() -> nn.Module:
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=CLASSES
    )
    nn.init.normal_(model.heads.head.weight)
    return model


def swin() -> nn.Module:
    return SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=CLASSES
    )


@dataclass(frozen=True)
class Animal:
    """A model of the zoo.

    Args:
        name: Its name in the tests.
        build: Makes a new one.
        layer: The name of the layer that ``layer=None`` locates; None where that is no module.
        gap: Whether it ends in global average pooling and one linear layer.
        spatial: Whether ``layer=None`` locates anything.
        attends: Whether it has attention between all its tokens.
        activations: ``"relu"``: ReLUs and gates only; ``"other"``: others, too; ``"none"``: it is linear.
        size: (H, W) of its images.
    """

    name: str
    build: Callable[[], nn.Module]
    layer: str | None = "second"
    gap: bool = False
    spatial: bool = True
    attends: bool = False
    activations: Literal["relu", "other", "none"] = "relu"
    size: tuple[int, int] = (32, 32)

    @property
    def model(self) -> nn.Module:
        """The one instance that all tests share: no explanation may change it."""
        return _living(self)

    def images(self, n: int = 3) -> Tensor:
        return torch.rand(n, 3, *self.size, generator=torch.Generator().manual_seed(n))


@cache
@torch.no_grad()
def _living(animal: Animal) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(8)  # no score is near zero, by which ablationcam divides; no class is dead
        model = animal.build().eval()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # the statistics of a single pass
            norm.train()
        model(animal.images(16))  # with untrained statistics, activations of deep nets vanish
        for norm in norms:  # not those of the images, so that a norm in training mode changes the result
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 1.5)
        return model.train()


ANIMALS = [
    Animal("plain", Net, gap=True, size=(14, 18)),
    Animal("resnet", SlimResNet, "layer4", gap=True, size=(64, 64)),
    Animal("vgg_bn", vgg, "features"),
    Animal(
        "densenet",
        partial(
            models.DenseNet, growth_rate=8, block_config=(2, 2), num_init_features=16, bn_size=2, num_classes=CLASSES
        ),
        None,
        gap=True,
    ),
    Animal("mobilenet_v3", mobilenet_v3, "features", activations="other"),
    Animal("squeezenet", partial(models.squeezenet1_1, num_classes=CLASSES), "classifier.2", gap=True, size=(64, 64)),
    Animal("convnext", convnext, "features", activations="other"),
    Animal("flattening", Flattening, None),
    Animal("repeating", Repeating, "block", gap=True),
    Animal("dict", partial(Net, wrap=lambda x: {"features": x[:, :2].sigmoid(), "logits": x}), gap=True),
    Animal("object", partial(Net, wrap=lambda x: SimpleNamespace(loss=None, logits=x)), gap=True),
    Animal("tuple", partial(Net, wrap=lambda x: (x, x.sigmoid())), gap=True),
    Animal("one_logit", partial(Net, classes=1), gap=True),
    Animal("one_logit_flat", partial(Net, wrap=lambda x: x[:, 0], classes=1), gap=True),
    Animal("frozen", frozen, gap=True),
    Animal("overwriting", Overwriting, gap=True),
    Animal("checkpointed", partial(Checkpointed, use_reentrant=False), "last", gap=True),
    Animal("vit", vit, "encoder.layers.encoder_layer_1.ln_1", attends=True, activations="other"),
    Animal("timm_vit", timm_vit, "blocks.1.norm1", attends=True, activations="other"),
    Animal("swin", swin, "permute", gap=True, activations="other"),
    Animal(
        "mlp",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES)),
        None,
        spatial=False,
        activations="none",
    ),
]


def animal(name: str) -> Animal:
    return next(kind for kind in ANIMALS if kind.name == name)
