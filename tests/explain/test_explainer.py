"""What the explainers have in common, for models that test_contract.py does not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import eigencam, gradcam, guided_gradcam, saliency, scorecam
from tests.helpers.states import assert_same, unchanged
from tests.helpers.zoo import Net

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class OneByOne(Net):
    """Runs its images one after another."""

    def forward(self, images: Tensor) -> Any:
        return torch.cat([Net.forward(self, image) for image in images.split(1)])


class TwoViews(Net):
    """Averages the scores of an image and its mirror image."""

    def forward(self, images: Tensor) -> Any:
        return Net.forward(self, torch.cat([images, images.flip(3)])).unflatten(0, (2, -1)).mean(0)


@pytest.mark.parametrize(
    "explainer", [gradcam, eigencam, scorecam, guided_gradcam], ids=lambda explainer: explainer.name
)
@pytest.mark.parametrize(("model", "count"), [(OneByOne, 1), (TwoViews, 8)])
def test_maps_that_are_not_one_for_each_image_are_refused(model: Any, count: int, explainer: Any) -> None:
    message = f"'second' gives {count} maps for 4 images, expected one for each; pass batch_size=1"
    with unchanged(net := model()), pytest.raises(ConfigurationError, match=message):
        explainer(net, IMAGES, 1, layer="second")
    if model is OneByOne:
        expected = torch.cat([explainer(net, image, 1, layer="second") for image in IMAGES.split(1)])
        assert_same(explainer(net, IMAGES, 1, layer="second", batch_size=1), expected)


def test_several_layers_of_coloured_maps_are_scaled_by_their_maxima() -> None:
    model = Net()
    parts = [guided_gradcam(model, IMAGES, 1, layer=layer, channels=None).relu() for layer in ("first", "second")]
    assert all(maps.amax((1, 2, 3)).all() for maps in parts)
    expected = torch.stack([maps / maps.amax((1, 2, 3), keepdim=True) for maps in parts]).mean(0)
    torch.testing.assert_close(guided_gradcam(model, IMAGES, 1, layer=["first", "second"], channels=None), expected)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_classes_come_in_lists_and_arrays(kind: Any) -> None:
    targets = kind([0, 1, 2, 0])
    expected = gradcam(model := Net(), IMAGES, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(gradcam(model, IMAGES, targets, batch_size=3), expected)
    torch.testing.assert_close(gradcam(model, IMAGES, np.int64(1)), gradcam(model, IMAGES, 1))


@pytest.mark.parametrize(("targets", "came"), [("cat", "str"), ([[0], [1, 2]], "list"), ({}, "dict")])
def test_targets_that_are_no_classes(targets: Any, came: str) -> None:
    with pytest.raises(ConfigurationError, match=f"targets takes None, a class, .*, got {came}"):
        saliency(Net(), IMAGES, targets)


@pytest.mark.parametrize(
    ("explainer", "options", "message"),
    [
        (gradcam, {"call_index": 1}, r"call_index=1 is a call of the layer that is named; pass layer="),
        (saliency, {"call_index": 5}, "saliency explains pixels and takes no call_index; leave call_index=5 out"),
        (saliency, {"reshape": abs}, "saliency explains pixels and takes no reshape"),
    ],
)
def test_what_would_be_ignored_is_refused(explainer: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        explainer(Net(), IMAGES, 1, **options)
    saliency(Net(), IMAGES, 1, layer=None, call_index=-1, reshape=None, upsample=False)  # the defaults


@pytest.mark.parametrize(
    ("wrap", "score"),
    [
        (lambda x: {"embedding": x, "projection": 2 * x}, lambda output: output["embedding"][:, 1]),
        (lambda x: [{"scores": scores} for scores in x], lambda output: torch.stack([o["scores"][1] for o in output])),
        (lambda x: (x.sum(), x), lambda output: output[1][:, 1]),
    ],
    ids=["embeddings", "detections", "loss first"],
)
def test_a_callable_reads_what_it_likes(wrap: Any, score: Any) -> None:
    torch.manual_seed(0)
    plain = Net()
    model = Net(wrap)
    model.load_state_dict(plain.state_dict())
    for explainer in (gradcam, saliency, scorecam):
        torch.testing.assert_close(explainer(model, IMAGES, score), explainer(plain, IMAGES, 1))
    with pytest.raises(ConfigurationError, match=r"no logits found|the model gave"):
        gradcam(model, IMAGES)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_part_is_no_obstacle() -> None:
    convolution, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    plain = nn.Sequential(convolution, norm, nn.ReLU(), head)
    scripted = nn.Sequential(convolution, torch.jit.script(norm), nn.ReLU(), head)
    for explainer in (saliency, gradcam):
        torch.testing.assert_close(explainer(scripted, IMAGES), explainer(plain, IMAGES))
