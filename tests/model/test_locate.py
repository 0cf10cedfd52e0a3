from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.locate import (
    find_layer,
    first_convolution,
    layer_name,
    linear_heads,
    plain_name,
    unwrap_compiled,
)
from tests.helpers.zoo import Net, animal


@pytest.fixture
def model() -> Net:
    return Net()


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
