from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Deconvolution, GuidedBackprop, GuidedGradCam
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import deconvnet, guided_backprop, guided_gradcam, saliency
from lightning_interp.model.locate import locate
from lightning_interp.model.trace import Trace
from tests.helpers import references
from tests.helpers.states import assert_same, unchanged
from tests.helpers.zoo import CLASSES, Net, animal

TARGETS = torch.tensor([0, 1, 2])
METHODS = [guided_backprop, deconvnet]
CAPTUMS = {guided_backprop: GuidedBackprop, deconvnet: Deconvolution}


class OneConvolution(nn.Module):
    """captum's example: a convolution of ones, whose map is flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 2, 3), nn.Linear(8, 4, bias=False)
        self.relu, self.last = nn.ReLU(), nn.ReLU()
        with torch.no_grad():
            self.conv.weight.fill_(1)
            self.conv.bias.copy_(torch.tensor([-50.0, -75.0]))  # type: ignore[union-attr]
            self.linear.weight.copy_(torch.tensor([1.0] * 5 + [-1.0] * 3).expand(4, 8))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.linear(self.relu(self.conv(images)).flatten(1)))


@pytest.mark.parametrize(
    ("explainer", "expected"),
    [
        (guided_backprop, [[0, 1, 1, 1], [1, 3, 3, 2], [1, 3, 3, 2], [1, 2, 2, 1]]),
        (deconvnet, [[2, 3, 3, 1], [3, 5, 5, 2], [3, 5, 5, 2], [1, 2, 2, 1]]),
    ],
)
def test_captums_numbers(explainer: Any, expected: list[list[int]]) -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4)
    assert explainer(OneConvolution(), images, 0, channels="sum")[0].tolist() == expected


def out_of_place(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


@pytest.mark.parametrize("explainer", METHODS)
@pytest.mark.parametrize("name", ["plain", "vgg_bn", "squeezenet", "resnet"])
def test_is_captums_where_relus_are_modules(name: str, explainer: Any) -> None:
    kind = animal(name)
    expected = attributed(explainer, out_of_place(kind.model), kind.images())
    assert_same(explainer(kind.model, kind.images(), TARGETS, channels=None), expected)


def attributed(explainer: Any, model: nn.Module, images: Tensor) -> Tensor:
    with pytest.warns(UserWarning, match="Setting backward hooks on ReLU activations"):
        return CAPTUMS[explainer](model).attribute(images.requires_grad_(), target=TARGETS).detach()


@pytest.mark.parametrize("name", ["plain", "vgg_bn", "squeezenet", "resnet"])
def test_guided_gradcam_is_captums(name: str) -> None:
    kind = animal(name)
    assert kind.layer is not None
    model = out_of_place(kind.model)
    with pytest.warns(UserWarning, match="Setting backward hooks on ReLU activations"):
        expected = GuidedGradCam(model, model.get_submodule(kind.layer)).attribute(
            kind.images().requires_grad_(), TARGETS, interpolate_mode="bilinear"
        )
    assert expected.flatten(1).any(1).all()
    assert_same(guided_gradcam(kind.model, kind.images(), TARGETS, channels=None), expected.detach())


class Functional(nn.Module):
    """Two convolutions and a linear layer, with a ReLU after each convolution that is called in some way."""

    def __init__(self, rectify: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rectify = rectify
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.rectify(self.second(self.rectify(self.first(images)))).mean((2, 3)))


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.ReLU(),
    "in-place module": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "F.relu by name": lambda x: F.relu(input=x),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "in-place method": lambda x: x.relu_(),
    "in-place method, its result not used": lambda x: (x.relu_(), x)[1],
    "threshold": nn.Threshold(0, 0),
    "in-place threshold": lambda x: F.threshold_(x, 0, 0),
    "clamp": lambda x: x.clamp(min=0),
    "clamp_": lambda x: x.clamp_(0),
    "torch.clamp": lambda x: torch.clamp(x, 0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clip": lambda x: x.clip(0),
    "clip_": lambda x: x.clip_(0),
    "torch.clip": lambda x: torch.clip(x, min=0),
    "relu6 below six": F.relu6,
    "hardtanh without a bound": lambda x: F.hardtanh(x, 0.0, 1e9),
    "leaky without a leak": lambda x: F.leaky_relu(x, 0.0),
}


@pytest.mark.parametrize("explainer", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_call_a_relu(way: str, explainer: Any) -> None:
    torch.manual_seed(3)
    model, images = Functional(WAYS[way]), torch.rand(3, 3, 10, 10)
    plain = Functional(F.relu)
    plain.load_state_dict(model.state_dict())
    expected = getattr(references, explainer.name)(plain, images, TARGETS)
    with unchanged(model):
        got = explainer(model, images, TARGETS)
    assert_same(got, expected)
    assert not torch.allclose(got, saliency(model, images, TARGETS), atol=1e-4)


@pytest.mark.parametrize("explainer", METHODS)
def test_captum_gives_the_plain_gradient_for_functions(explainer: Any) -> None:
    torch.manual_seed(3)
    model, images = Functional(F.relu), torch.rand(3, 3, 10, 10)
    wrong = attributed(explainer, model, images.clone())
    assert_same(wrong, saliency(model, images, TARGETS, channels=None))
    right = getattr(references, explainer.name)(model, images, TARGETS, channels=None)
    assert_same(explainer(model, images, TARGETS, channels=None), right)
    assert not torch.allclose(right, wrong, atol=1e-4)


class Branches(nn.Module):
    """Two branches share one ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.relu, self.head = nn.ReLU(), nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        left, right = self.left(images), self.right(images)
        return self.head((self.relu(left) + self.relu(right) * 2).mean((2, 3)))


def test_a_shared_relu_in_parallel_branches_where_captums_deconvolution_is_wrong() -> None:
    # captum uses the gradient of the ReLU's last call for every call.
    torch.manual_seed(3)
    model, images = Branches(), torch.rand(3, 3, 10, 10)
    for explainer in METHODS:
        expected = getattr(references, explainer.name)(model, images, TARGETS, channels=None)
        assert_same(explainer(model, images, TARGETS, channels=None), expected)
    wrong = attributed(deconvnet, model, images.clone())
    assert not torch.allclose(wrong, references.deconvnet(model, images, TARGETS, channels=None), atol=1e-4)


@pytest.mark.parametrize("explainer", METHODS)
@pytest.mark.parametrize("name", ["resnet", "densenet", "flattening", "repeating", "checkpointed", "frozen"])
def test_is_the_reference(name: str, explainer: Any) -> None:
    kind = animal(name)
    expected = getattr(references, explainer.name)(kind.model, kind.images(), TARGETS, channels=None)
    assert_same(explainer(kind.model, kind.images(), TARGETS, channels=None), expected)


def test_relu6_and_leaky_relus_keep_their_slopes() -> None:
    torch.manual_seed(3)
    images = torch.rand(2, 3, 10, 10)
    for rectify, slope in (
        (nn.ReLU6(), lambda x: ((x > 0) & (x < 6)).float()),
        (nn.Hardtanh(0, 0.1), lambda x: ((x > 0) & (x < 0.1)).float()),
        (nn.LeakyReLU(0.2, inplace=True), lambda x: torch.where(x > 0, 1.0, 0.2)),
        (nn.PReLU(init=0.3), lambda x: torch.where(x > 0, 1.0, 0.3)),
        (nn.RReLU(0.1, 0.3), lambda x: torch.where(x > 0, 1.0, 0.2)),
    ):
        model = Functional(rectify).eval()
        with torch.no_grad():
            first = model.first(images)
            second = model.second(model.rectify(first.clone()))
            back = model.head.weight[1].view(1, -1, 1, 1).expand_as(second) / second[0, 0].numel()
            guided = F.conv_transpose2d(back.relu() * slope(second), model.second.weight)
            guided = F.conv_transpose2d(guided.relu() * slope(first), model.first.weight)
            down = F.conv_transpose2d(back.relu(), model.second.weight)
            down = F.conv_transpose2d(down.relu(), model.first.weight)
        assert_same(guided_backprop(model, images, 1, channels=None), guided)
        assert_same(deconvnet(model, images, 1, channels=None), down)


@pytest.mark.parametrize("explainer", METHODS)
def test_mobilenet_v2(explainer: Any) -> None:
    torch.manual_seed(0)
    model = models.MobileNetV2(num_classes=CLASSES, width_mult=0.25).eval()
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        inner = model(images)
    with unchanged(model):
        maps = explainer(model, images, TARGETS)
    assert torch.equal(model(images), inner)
    assert maps.any()
    # None of these small activations reaches six, so that ReLU6 is ReLU.
    with_relu = copy.deepcopy(model)
    for module in list(with_relu.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    assert_same(maps, getattr(references, explainer.name)(with_relu, images, TARGETS))


@pytest.mark.parametrize("explainer", [*METHODS, guided_gradcam])
@pytest.mark.parametrize(
    ("activation", "called"),
    [
        *((nn.GELU(), "gelu"), (nn.SiLU(), "silu"), (nn.Hardswish(), "hardswish"), (nn.ELU(), "elu")),
        *((nn.Mish(), "mish"), (nn.Tanh(), "tanh"), (nn.Hardtanh(), "hardtanh"), (nn.LogSigmoid(), "log_sigmoid")),
        *((nn.Tanhshrink(), "tanhshrink"), (nn.Softshrink(), "softshrink"), (nn.Hardshrink(), "hardshrink")),
        *((nn.SELU(), "selu"), (nn.CELU(), "celu"), (nn.Softplus(), "softplus"), (nn.Softsign(), "softsign")),
        (nn.Sequential(nn.Conv2d(6, 12, 1), nn.GLU(1)), "glu"),
    ],
)
def test_other_activations_are_refused(activation: nn.Module, called: str, explainer: Any) -> None:
    with (
        unchanged(model := Functional(nn.Sequential(nn.ReLU(), activation))),
        pytest.raises(ConfigurationError, match=f"the model's activation '{called}' is not a ReLU"),
    ):
        explainer(model, torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(0)), 1)


@pytest.mark.parametrize("explainer", [*METHODS, guided_gradcam])
@pytest.mark.parametrize("activation", [nn.Identity(), nn.Sigmoid(), lambda x: x.clamp(min=-1)])
def test_a_model_without_relus_is_refused(activation: Any, explainer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Functional calls no ReLU .* whose gradient could be modified"):
        explainer(Functional(activation), torch.rand(2, 3, 10, 10), 1)


def test_gates_keep_their_gradient() -> None:
    class Gated(Net):
        def features(self, images: Tensor) -> Tensor:
            x = self.second(self.first(images))
            x = x * x.mean((2, 3), keepdim=True).sigmoid()
            return x * F.hardsigmoid(x.mean((2, 3), keepdim=True))

    model, images = Gated(), torch.rand(3, 3, 10, 10)
    assert_same(guided_backprop(model, images, TARGETS), references.guided_backprop(model, images, TARGETS))


@pytest.mark.parametrize("explainer", [*METHODS, guided_gradcam])
def test_a_callable_keeps_its_own_gradient(explainer: Any) -> None:
    torch.manual_seed(3)
    model, images = Functional(F.relu), torch.rand(3, 3, 10, 10)
    logits = model(images)[:, 1].detach()
    plain = explainer(model, images, 1, channels=None)
    assert plain.any()

    def scaled(slope: Tensor) -> Tensor:
        # The maps grow with the gradient, as long as it is positive; Guided Grad-CAM takes it twice.
        return plain * slope.view(-1, 1, 1, 1) ** (2 if explainer is guided_gradcam else 1)

    got = explainer(model, images, lambda output: F.softplus(output[:, 1]), channels=None)
    assert_same(got, scaled(logits.sigmoid()))
    got = explainer(model, images, lambda output: -F.relu(5 - output[:, 1]), channels=None)
    assert_same(got, scaled(torch.ones(3)))
    # The model's ReLUs are modified again afterwards.
    assert_same(explainer(model, images, 1, channels=None), plain)


# ---- a unit, projected down


def test_the_classic_example_in_one_dimension() -> None:
    """Eight values padded by two, a filter of four, stride two, five outputs."""
    torch.manual_seed(0)
    values, kernel, outputs = torch.randn(8), torch.randn(4), torch.randn(5)
    matrix = torch.zeros(5, 12)
    for row in range(5):
        matrix[row, 2 * row : 2 * row + 4] = kernel
    matrix = matrix[:, 2:-2]  # what meets the padding is lost

    leaf = values.clone().requires_grad_()
    forward = F.conv1d(leaf.view(1, 1, -1), kernel.view(1, 1, -1), stride=2, padding=2)[0, 0]
    torch.testing.assert_close(forward, matrix @ values)
    (by_autograd,) = torch.autograd.grad(forward, leaf, outputs)
    torch.testing.assert_close(by_autograd, matrix.T @ outputs)

    # Sub-pixel: zeros between the outputs, and around them, and the flipped filter moved by one.
    between = torch.zeros(9)
    between[::2] = outputs
    around = F.pad(between, (1, 1))
    by_sub_pixels = F.conv1d(around.view(1, 1, -1), kernel.flip(0).view(1, 1, -1))[0, 0]
    torch.testing.assert_close(by_sub_pixels, matrix.T @ outputs)

    # And so does the deconvnet, with the strongest of the outputs alone.
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 4), stride=(1, 2), padding=(0, 2), bias=False))
    model[0].weight.data.copy_(kernel.view(1, 1, 1, 4))
    strongest = forward.detach() * (forward == forward.max())
    projected = deconvnet(model, values.view(1, 1, 1, 8), unit=("0", 0), channels=None)
    torch.testing.assert_close(projected[0, 0, 0], matrix.T @ strongest.relu())


class Stack(nn.Module):
    """Convolutions, ReLUs and a pooling without overlap, as in the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, stride=2)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2, return_indices=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.relu(self.one(images)))
        return self.head(self.relu(self.two(x)).mean((2, 3)))


def test_a_unit_is_unpooled_rectified_and_filtered() -> None:
    torch.manual_seed(1)
    model, images = Stack(), torch.rand(4, 3, 12, 12)
    with torch.no_grad():
        first = F.relu(model.one(images))
        pooled, switches = F.max_pool2d(first, 2, return_indices=True)
        units = model.two(pooled)[:, 2]
        kept = torch.zeros(4, 4, *units.shape[1:])
        for number, unit in enumerate(units):
            row, column = divmod(int(unit.argmax()), unit.shape[1])
            kept[number, 2, row, column] = unit[row, column].clamp(min=0)
        filtered = F.conv_transpose2d(kept, model.two.weight, stride=2, output_padding=1)
        unpooled = F.max_unpool2d(filtered, switches, 2, output_size=first.shape[2:])
        expected = F.conv_transpose2d(unpooled.relu(), model.one.weight, padding=1)
    assert (kept.amax((1, 2, 3)) > 0).any()
    with unchanged(model):
        for layer in ("two", model.two):
            got = deconvnet(model, images, unit=(layer, 2), channels=None)
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(deconvnet(model, images, unit=("two", 2), channels=None, batch_size=3), expected)
    torch.testing.assert_close(deconvnet(model, images, unit=("two", 2)), expected.abs().amax(1))


def test_overlapping_pools_sum_at_shared_switches() -> None:
    # max_unpool2d would overwrite: one position is the maximum of several pools.
    model = nn.Sequential(nn.MaxPool2d(3, stride=1), nn.Conv2d(1, 1, 2, bias=False))
    nn.init.ones_(model[1].weight)
    images = torch.zeros(1, 1, 4, 4)
    images[0, 0, 1, 1] = 3
    projected = deconvnet(model, images, unit=("1", 0), channels=None)
    assert projected[0, 0, 1, 1] == 4 * 12
    assert projected.sum() == 4 * 12


def test_of_equal_activations_one_is_projected() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False))
    nn.init.ones_(model[0].weight)
    projected = deconvnet(model, torch.ones(2, 1, 6, 6), unit=("0", 0), channels=None)
    for image in projected:
        assert sorted(set(image.flatten().tolist())) == [0, 9]
        assert image.count_nonzero() == 9  # what one unit sees


def test_a_unit_that_is_silent_leaves_an_empty_map() -> None:
    model = Stack()
    nn.init.constant_(model.two.bias, -100)
    assert not deconvnet(model, torch.rand(2, 3, 12, 12), unit=("two", 0)).any()
    assert not deconvnet(model, torch.rand(2, 3, 12, 12), unit=("relu", 0)).any()


def test_the_last_call_of_a_layer_is_meant() -> None:
    torch.manual_seed(1)
    model, images = Stack(), torch.rand(2, 3, 12, 12)
    maps = deconvnet(model, images, unit=("relu", 2), channels=None)
    torch.testing.assert_close(maps, deconvnet(model, images, unit=("two", 2), channels=None))


def test_a_unit_of_a_layer_without_positions() -> None:
    maps = deconvnet(Stack(), torch.rand(2, 3, 12, 12), unit=("head", 1))
    assert maps.shape == (2, 12, 12)


@pytest.mark.parametrize(("explainer", "passes"), [(guided_backprop, 1), (deconvnet, 1), (guided_gradcam, 2)])
def test_no_pass_is_run_twice(explainer: Any, passes: int) -> None:
    model, images, ran = Stack(), torch.rand(2, 3, 12, 12), []
    model.head.register_forward_hook(lambda *_: ran.append(1))
    maps = explainer(model, images, 1)
    points = {locate(model, None, images): True} if explainer is guided_gradcam else {}
    assert len(ran) == passes + len(points)
    # With a Trace that is shared with other methods, it runs one more pass.
    with Trace.record(model, images, 1, layers=points) as trace:
        assert_same(explainer.attribute(trace, *points), maps)


@pytest.mark.parametrize("name", ["resnet", "vgg_bn", "densenet", "checkpointed"])
def test_units_of_real_models(name: str) -> None:
    kind = animal(name)
    layer = {"resnet": "layer2", "vgg_bn": "features.6", "densenet": "features.norm5", "checkpointed": "block"}[name]
    with unchanged(kind.model):
        maps = [deconvnet(kind.model, kind.images(), unit=(layer, channel)) for channel in range(4)]
    assert torch.stack(maps).any()
    assert torch.stack(maps).isfinite().all()


def test_units_under_inference_mode_and_predict() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Stack()

    model, images = Holder(), torch.rand(2, 3, 12, 12)
    expected = deconvnet(model.net, images, unit=("two", 1))
    with torch.inference_mode():
        got = deconvnet(model, images, unit=("net.two", 1), predict=lambda model, images: model.net(images))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 1, "unit": ("two", 0)}, "pass targets or unit, not both"),
        ({"unit": ("three", 0)}, "there is no layer 'three' in Stack"),
        ({"unit": ("two", 4)}, r"the layer 'two' gives activations \(2, 4, 2, 2\); there is no channel 4"),
        ({"unit": ("two", -1)}, "there is no channel -1"),
        ({"unit": "two"}, r"unit takes \(layer, channel\), got 'two'"),
        ({"unit": ("two", 1.5)}, r"unit takes \(layer, channel\), got \('two', 1.5\)"),
        ({"unit": ("two", True)}, r"unit takes \(layer, channel\), got \('two', True\)"),
        ({"unit": ("two", 1), "channels": "mean"}, "channels takes 'max_abs', 'sum' or None, got 'mean'"),
    ],
)
def test_units_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with unchanged(model := Stack()), pytest.raises(ConfigurationError, match=message):
        deconvnet(model, torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)), **options)


def test_a_unit_behind_another_activation_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 64, 2))
    with pytest.raises(ConfigurationError, match="'gelu' is not a ReLU"):
        deconvnet(model, torch.rand(1, 3, 12, 12), unit=("2", 1))
