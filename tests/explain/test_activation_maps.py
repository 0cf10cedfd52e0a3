from __future__ import annotations

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import cam, gradcam
from tests.zoo import ANIMALS, Animal, Net, animal

GAPS = [each for each in ANIMALS if each.gap and each.name not in {"squeezenet", "one_logit", "one_logit_flat"}]


@pytest.mark.parametrize("kind", GAPS, ids=lambda each: each.name)
def test_gradcam_of_a_gap_model_is_its_cam_by_the_number_of_places(kind: Animal) -> None:
    exact = cam(kind.model, kind.images(), 1, upsample=False)
    by_gradient = gradcam(kind.model, kind.images(), 1, upsample=False)
    torch.testing.assert_close(by_gradient, exact / exact[0].numel(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "resnet", "swin", "repeating"])
def test_the_mean_of_a_cam_and_the_bias_are_the_logit(name: str) -> None:
    kind = animal(name)
    head = next(each for each in reversed(list(kind.model.modules())) if isinstance(each, nn.Linear))
    logits = kind.model.eval()(kind.images())
    for target in range(3):
        maps = cam(kind.model, kind.images(), target, upsample=False)
        torch.testing.assert_close(maps.mean((1, 2)) + head.bias[target], logits[:, target], atol=1e-5, rtol=1e-5)


def test_the_cam_of_pooled_class_maps_is_the_class_map() -> None:
    kind = animal("squeezenet")
    maps = cam(kind.model, kind.images(), 2, upsample=False)
    torch.testing.assert_close(maps.mean((1, 2)), kind.model.eval()(kind.images())[:, 2])


def test_a_head_without_bias_will_do() -> None:
    model = Net()
    model.head = nn.Linear(8, 3, bias=False)
    maps = cam(model, torch.rand(2, 3, 9, 9), 1, upsample=False)
    assert maps.shape == (2, 4, 4)


def test_a_wrong_head_is_not_used() -> None:
    class Scaled(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.features(images).mean((2, 3)) * 2)

    class Maximal(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.features(images).amax((2, 3)))

    for model in (Scaled(), Maximal()):
        with pytest.raises(
            ConfigurationError, match=r"has no head of .* on 'second.1', .*; use gradcam, which works on"
        ):
            cam(model, torch.rand(2, 3, 9, 9), 1)
    with pytest.raises(ConfigurationError, match=r"on 'first', .*use gradcam"):
        cam(Net(), torch.rand(2, 3, 9, 9), 1, layer="first")


def test_cam_explains_classes_only() -> None:
    with pytest.raises(ConfigurationError, match="not a callable's scores; use gradcam"):
        cam(Net(), torch.rand(2, 3, 9, 9), lambda output: output[:, 0])


@pytest.mark.parametrize("name", ["plain", "resnet", "vgg_bn", "mobilenet_v3", "convnext", "swin"])
def test_gradcam_is_captums(name: str) -> None:
    kind = animal(name)
    assert kind.layer is not None
    model, targets = kind.model.eval(), torch.tensor([0, 1, 2])
    expected = LayerGradCam(model, model.get_submodule(kind.layer)).attribute(
        kind.images().requires_grad_(), targets, relu_attributions=False
    )
    got = gradcam(model, kind.images(), targets, upsample=False)
    torch.testing.assert_close(got, expected.detach()[:, 0], atol=1e-5, rtol=1e-4)
    for parameter in model.parameters():
        parameter.grad = None


def test_gradcam_takes_any_spatial_layer() -> None:
    kind = animal("resnet")
    sizes = [
        gradcam(kind.model, kind.images(), 1, layer=name, upsample=False).shape[-1]
        for name in ("conv1", "layer1", "layer2.0.relu", "layer3", "layer4")
    ]
    assert sizes == [32, 16, 8, 4, 2]
