from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.hooks import HookPoint, run_until
from lightning_interp.model.locate import (
    find_layer,
    first_convolution,
    layer_name,
    linear_heads,
    locate,
    locate_features,
    locate_last_convolution,
    plain_name,
    unwrap_compiled,
)
from lightning_interp.model.trace import Trace
from tests.helpers.states import unchanged
from tests.helpers.zoo import CountingNet, Net, animal, swin, vgg

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_names_and_modules_find_each_other(model: Net) -> None:
    for name, module in model.named_modules():
        if name:
            assert find_layer(model, name) is module
            assert layer_name(model, module) == name
        assert find_layer(model, module) is module


def test_compiled_parts_stand_for_what_they_wrap(model: Net) -> None:
    inner = model.second
    model.second = torch.compile(inner, backend="eager")
    whole = torch.compile(model, backend="eager")
    for name in ("second", "second._orig_mod", "_orig_mod.second", "_orig_mod.second._orig_mod"):
        assert find_layer(whole, name) is inner
    assert find_layer(whole, model.second) is inner
    assert layer_name(whole, inner) == layer_name(whole, model.second) == "second"
    assert layer_name(whole, inner[0]) == "second.0"
    assert unwrap_compiled(whole) is model
    assert unwrap_compiled(model) is model
    assert plain_name("_orig_mod.a._orig_mod.b") == "a.b"


def test_near_names_are_suggested() -> None:
    resnet = animal("resnet").model
    with pytest.raises(
        ConfigurationError, match=r"there is no layer 'layer5' in SlimResNet; did you mean .*'layer4'.*\?"
    ):
        find_layer(resnet, "layer5")
    with pytest.raises(
        ConfigurationError, match=r"no layer 'downsample' in SlimResNet; did you mean 'layer1.0.downsample'"
    ):
        find_layer(resnet, "downsample")


def test_without_near_names_the_first_ones_are_told(model: Net) -> None:
    with pytest.raises(ConfigurationError, match=r"no layer 'xyz' in Net; it has 'first' or 'first.0' or 'first.1'"):
        find_layer(model, "xyz")
    with pytest.raises(ConfigurationError, match="no layer 'xyz' in Linear; it has no submodules"):
        find_layer(nn.Linear(1, 1), "xyz")


@pytest.mark.parametrize("name", ["", "_orig_mod"])
def test_an_empty_name_is_no_layer(model: Net, name: str) -> None:
    with pytest.raises(ConfigurationError, match="there is no layer"):
        find_layer(model, name)


def test_strangers_are_refused(model: Net) -> None:
    with pytest.raises(ConfigurationError, match="the layer Conv2d is not part of Net; pass a submodule of the model"):
        find_layer(model, nn.Conv2d(3, 6, 3))
    with pytest.raises(ConfigurationError, match="the layer Conv2d is not part of Net"):
        layer_name(model, nn.Conv2d(3, 6, 3))
    with pytest.raises(ConfigurationError, match="a layer is a module or its dotted name, got 3"):
        find_layer(model, 3)  # type: ignore[arg-type]


def test_first_convolution(model: Net) -> None:
    assert first_convolution(model) == ("first.0", model.first[0])
    assert first_convolution(torch.compile(model, backend="eager"))[0] == "first.0"
    assert first_convolution(animal("vit").model)[0] == "conv_proj"
    assert first_convolution(models.squeezenet1_1(num_classes=2))[0] == "features.0"
    with pytest.raises(ConfigurationError, match=r"Sequential has no two-dimensional convolution .*layers=\[...\]"):
        first_convolution(nn.Sequential(nn.Linear(2, 2)))


def test_heads_come_last_defined_first() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 3))
    assert list(linear_heads(model)) == [model[2], model[0]]


# ---- the last spatial layer


def alexnet() -> nn.Module:
    return models.alexnet(num_classes=3)


def regnet() -> nn.Module:
    with torch.device("cpu"):  # its builder computes widths with tensors
        return models.regnet_y_400mf(num_classes=3).to("meta")


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(200, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "size", "name"),
    [
        (models.resnet18, 64, "layer4"),
        (models.resnext50_32x4d, 64, "layer4"),
        (vgg, 64, "features"),
        (vgg, 16, "features"),
        (models.vgg11, 64, "features"),
        (alexnet, 96, "features"),
        (alexnet, 64, "features"),
        (models.densenet121, 64, "input of adaptive_avg_pool2d"),
        (models.squeezenet1_1, 64, "classifier.2"),
        (models.mobilenet_v2, 64, "features"),
        (models.mobilenet_v3_small, 64, "features"),
        (models.efficientnet_b0, 64, "features"),
        (models.shufflenet_v2_x0_5, 64, "conv5"),
        (models.mnasnet0_5, 64, "layers"),
        (regnet, 64, "trunk_output"),
        (models.convnext_tiny, 64, "features"),
        (models.googlenet, 64, "inception5b"),
        (models.inception_v3, 107, "Mixed_7c"),
        (models.swin_t, 64, "permute"),
        (models.maxvit_t, 224, "blocks.3"),
        (swin, 32, "permute"),
        (lenet, 32, "5"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_the_last_spatial_layer_is_found(build: Callable[[], nn.Module], size: int, name: str) -> None:
    # Shapes tell it, so no value is ever computed.
    with torch.device("meta"):
        point = locate(build(), None, torch.empty(2, 3, size, size))
    assert point.name == name


class FlattensTwice(nn.Module):
    """Calls the function that its maps enter on something else, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 36, 2)
        self.pixels = nn.Linear(3 * 64, 2)

    def forward(self, images: Tensor) -> Tensor:
        before = images.flatten(1)
        maps = self.head((2 * self.convolution(images)).flatten(1))
        return maps + self.pixels(before) + self.pixels(images.flatten(1))


def test_other_calls_of_the_same_function_are_not_confused() -> None:
    model, images = FlattensTwice(), torch.rand(2, 3, 8, 8)
    point = locate(model, None, images)
    assert (point.module, point.call_index) == (None, 1)
    with Trace.record(model, images, layers={point: True}) as trace:
        torch.testing.assert_close(trace.activations(point), 2 * model.convolution(images))
        assert trace.gradients(point).shape == (2, 4, 6, 6)


def test_a_functional_activation_before_the_pooling_is_tapped() -> None:
    model, images = animal("densenet").model, animal("densenet").images()
    point = locate(model, None, images)
    with Trace.record(model, images, 1, layers={point: True}) as trace:
        expected = model.features(images).relu()
        assert torch.equal(trace.activations(point), expected)
        assert trace.gradients(point).shape == expected.shape
    assert point.module is None


def test_functional_layers_of_a_flattening_net_are_tapped() -> None:
    model, images = animal("flattening").model, animal("flattening").images()
    point = locate(model, None, images)
    with Trace.record(model, images, 1, layers={point: True}) as trace:
        assert trace.activations(point).shape == (3, 8, 5, 5)
        logits = model.fc2(model.fc1(trace.activations(point).flatten(1)).relu())
        torch.testing.assert_close(logits, trace.logits)


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.AvgPool2d(8), nn.Flatten()])
def test_pooling_comes_in_many_kinds(pool: nn.Module) -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    model = nn.Sequential(body, pool, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 10, 10))
    assert locate(model, None, torch.rand(2, 3, 10, 10)).name == "0"


@pytest.mark.parametrize("take", ["mean", "sum", "amax", "logsumexp", "view", "reshape", "chained"])
def test_pooling_by_methods(take: str) -> None:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda x: x.mean([2, 3]),
        "sum": lambda x: x.sum((2, 3)),
        "amax": lambda x: x.amax(dim=(-2, -1)),
        "logsumexp": lambda x: x.logsumexp((2, 3)),
        "view": lambda x: x.view(len(x), 8, -1).mean(-1),
        "reshape": lambda x: x.reshape(len(x), 8, -1).mean(-1),
        "chained": lambda x: x.mean(3).mean(2),
    }

    class Model(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(ways[take](self.features(images)))

    assert locate(Model(), None, IMAGES).name == "second.1"  # its dropout does nothing


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: animal("mlp").model, "Sequential has no spatial layer: no convolution's output .*name a layer that"),
        (
            lambda: models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2),
            r"output of LRASPP is itself spatial, float32 \(1, 2, 32, 32\).*name a layer that",
        ),
    ],
    ids=["mlp", "segmentation"],
)
def test_models_without_a_final_pooling(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        locate(build(), None, torch.rand(2, 3, 32, 32))


def test_searching_needs_images(model: Net) -> None:
    with pytest.raises(ConfigurationError, match="to find the last spatial layer, locate needs images"):
        locate(model)
    assert locate(model, "first") == HookPoint("first", model.first)


@pytest.mark.parametrize(
    ("build", "name", "shape"),
    [
        (lambda: animal("plain").model, "second.1", (1, 8, 15, 15)),
        (lambda: animal("vit").model, "encoder", (1, 17, 8)),
        (lambda: animal("timm_vit").model, "norm", (1, 17, 8)),
        (lambda: animal("swin").model, "permute", (1, 16, 4, 4)),
    ],
    ids=["plain", "vit", "timm_vit", "swin"],
)
def test_the_features_that_enter_the_head_are_found(
    build: Callable[[], nn.Module], name: str, shape: tuple[int, ...]
) -> None:
    # Of a transformer: the tokens of which the first is taken, not those that enter the last attention.
    model, images = build(), torch.rand(2, 3, 32, 32)
    point = locate_features(model, images)
    assert point.name == name
    assert run_until(model.eval(), images[:1], point).shape == shape


def test_features_that_are_not_there() -> None:
    with pytest.raises(ConfigurationError, match=r"Sequential has no spatial layer: .*name a layer that"):
        locate_features(animal("mlp").model, torch.rand(2, 3, 32, 32))


def test_what_enters_the_last_convolution_is_found() -> None:
    model, images = animal("squeezenet").model.eval(), animal("squeezenet").images()
    with unchanged(model):
        point = locate_last_convolution(model, images)
    assert point.name == "input of classifier.1"
    torch.testing.assert_close(run_until(model, images, point), model.features(images))
    plain = animal("plain")
    point = locate_last_convolution(plain.model, plain.images())
    assert point.name == "input of second.0"
    torch.testing.assert_close(run_until(plain.model.eval(), plain.images(), point), plain.model.first(plain.images()))


# ---- the cache


def test_the_last_layer_is_located_again_after_a_flag_has_changed() -> None:
    class Forked(nn.Module):
        short = True

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.first(images)
            return self.head((maps if self.short else self.second(maps)).mean((2, 3)))

    model = Forked()
    model.short = True
    assert locate(model, None, IMAGES).name == "first"
    model.short = False
    assert locate(model, None, IMAGES).name == "second"


def test_a_model_that_its_layers_reference_is_freed() -> None:
    model = Net()
    model.second[1].parents = [model]  # type: ignore[assignment]
    assert locate(model, None, IMAGES).module is model.second[1]
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None


def test_the_search_for_the_last_layer_leaves_no_hook_and_keeps_no_model() -> None:
    model = animal("resnet").build()
    with unchanged(model):
        locate(model, None, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    locate(model, None, torch.rand(1, 3, 64, 64), predict=lambda _, images, held=model: held(images))
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None


def test_the_search_is_made_once_for_a_model() -> None:
    model = CountingNet()
    CountingNet.calls = 0
    for _ in range(3):
        assert locate(model, None, IMAGES).name == "second.1"
    assert CountingNet.calls == 1
    model.second = nn.Sequential(model.second, nn.ReLU())
    assert locate(model, None, IMAGES).name == "second"
    assert CountingNet.calls == 2
