from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import Saliency

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import saliency, smoothgrad
from tests import references
from tests.states import unchanged
from tests.zoo import Net, animal

TARGETS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("name", ["plain", "flattening", "resnet", "vgg_bn", "densenet", "convnext", "swin", "vit"])
def test_saliency_is_captums(name: str) -> None:
    kind = animal(name)
    expected = Saliency(kind.model.eval()).attribute(kind.images().requires_grad_(), TARGETS).amax(1)
    torch.testing.assert_close(saliency(kind.model, kind.images(), TARGETS), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", ["max_abs", "sum", None])
@pytest.mark.parametrize("name", ["plain", "flattening"])
def test_channels(name: str, channels: Any) -> None:
    kind = animal(name)
    for explainer, options in ((saliency, {}), (smoothgrad, {"n_samples": 3, "noise_level": 0.3})):
        got = explainer(kind.model, kind.images(), TARGETS, channels=channels, **options)
        reference = getattr(references, explainer.name)
        expected = reference(kind.model, kind.images(), TARGETS, channels=channels, **options)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
        assert got.shape == ((3, 3, *kind.size) if channels is None else (3, *kind.size))


def test_smoothgrad_without_noise_is_saliency() -> None:
    kind = animal("plain")
    torch.testing.assert_close(
        smoothgrad(kind.model, kind.images(), TARGETS, noise_level=0, n_samples=2),
        saliency(kind.model, kind.images(), TARGETS),
    )


def test_smoothgrad_keeps_the_target_of_the_clean_image() -> None:
    kind = animal("plain")
    predicted = kind.model.eval()(kind.images()).argmax(1)
    options: dict[str, Any] = {"noise_level": 5.0, "n_samples": 3}
    assert torch.equal(
        smoothgrad(kind.model, kind.images(), **options), smoothgrad(kind.model, kind.images(), predicted, **options)
    )


def test_smoothgrads_noise_is_the_images_own() -> None:
    kind = animal("plain")
    images = kind.images(5)
    with unchanged(kind.model):
        whole = smoothgrad(kind.model, images, 1, n_samples=2)
        assert torch.equal(whole, smoothgrad(kind.model, images, 1, n_samples=2))
    for size in (1, 2, 4):
        torch.testing.assert_close(whole, smoothgrad(kind.model, images, 1, n_samples=2, batch_size=size))


def test_smoothgrad_draws_from_the_generator_it_is_given() -> None:
    kind = animal("plain")
    images = kind.images(5)

    def maps(seed: int, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return smoothgrad(kind.model, images, 1, n_samples=2, generator=generator, **options)

    with unchanged(kind.model):
        assert torch.equal(maps(1), maps(1))
        assert not torch.equal(maps(1), maps(2))
    torch.testing.assert_close(maps(1), maps(1, batch_size=2))


@pytest.mark.parametrize(
    ("explainer", "options", "message"),
    [
        (saliency, {"channels": "mean"}, "channels takes 'max_abs', 'sum' or None, got 'mean'"),
        (smoothgrad, {"channels": "mean", "n_samples": 1}, "channels takes 'max_abs', 'sum' or None, got 'mean'"),
        (smoothgrad, {"n_samples": 0}, "n_samples takes a positive integer, got 0"),
        (smoothgrad, {"n_samples": 2.5}, r"n_samples takes a positive integer, got 2\.5"),
        (smoothgrad, {"noise_level": -0.1}, r"noise_level takes a share of the image's range, at least 0, got -0\.1"),
        (smoothgrad, {"noise_level": float("nan")}, "noise_level takes .*, got nan"),
    ],
)
def test_options_out_of_range(explainer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        explainer(Net(), torch.rand(2, 3, 9, 9), 1, **options)
