from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import (
    input_gradients,
    input_x_gradient,
    integrated_gradients,
    rise,
    saliency,
    smoothgrad,
    vargrad,
)
from tests import references
from tests.states import unchanged
from tests.zoo import Net, animal

TARGETS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("name", ["plain", "flattening", "resnet", "vgg_bn", "densenet", "convnext", "swin", "vit"])
def test_saliency_is_captums(name: str) -> None:
    kind = animal(name)
    expected = Saliency(kind.model.eval()).attribute(kind.images().requires_grad_(), TARGETS).amax(1)
    torch.testing.assert_close(saliency(kind.model, kind.images(), TARGETS), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "flattening", "resnet", "vgg_bn", "densenet", "convnext", "swin", "vit"])
def test_input_x_gradient_is_captums(name: str) -> None:
    kind = animal(name)
    expected = InputXGradient(kind.model.eval()).attribute(kind.images().requires_grad_(), TARGETS).sum(1).detach()
    torch.testing.assert_close(input_x_gradient(kind.model, kind.images(), TARGETS), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("baseline", [0.0, 0.3])
@pytest.mark.parametrize("name", ["plain", "flattening", "resnet", "vgg_bn", "densenet", "convnext", "swin", "vit"])
def test_integrated_gradients_are_captums(name: str, baseline: float) -> None:
    kind = animal(name)
    expected, delta = IntegratedGradients(kind.model.eval()).attribute(
        kind.images(), baseline, TARGETS, n_steps=12, return_convergence_delta=True
    )
    maps, error = integrated_gradients(
        kind.model, kind.images(), TARGETS, n_steps=12, baselines=baseline, return_error=True, batch_size=2
    )
    torch.testing.assert_close(maps, expected.sum(1).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(error, delta.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("channels", ["max_abs", "sum", None])
@pytest.mark.parametrize("name", ["plain", "flattening"])
def test_channels(name: str, channels: Any) -> None:
    kind = animal(name)
    noisy = {"n_samples": 3, "noise_level": 0.3}
    for explainer, options in (
        (saliency, {}),
        (smoothgrad, noisy),
        (vargrad, noisy),
        (input_x_gradient, {}),
        (integrated_gradients, {"n_steps": 3}),
    ):
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


def test_vargrad_is_the_variance_that_smoothgrad_averages_over() -> None:
    kind = animal("plain")
    images = kind.images(2)
    options: dict[str, Any] = {"n_samples": 5, "channels": None}
    spread = 0.15 * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    streams = [torch.Generator().manual_seed(number) for number in range(2)]
    gradients = []
    for _ in range(5):
        noise = torch.stack([torch.randn(images.shape[1:], generator=stream) for stream in streams])
        gradients.append(saliency(kind.model, images + spread.view(-1, 1, 1, 1) * noise, 1, channels=None))
    all_of_them = torch.stack(gradients)
    torch.testing.assert_close(smoothgrad(kind.model, images, 1, **options), all_of_them.mean(0))
    torch.testing.assert_close(vargrad(kind.model, images, 1, **options), all_of_them.var(0, correction=0))


@pytest.mark.parametrize("explainer", [smoothgrad, vargrad, integrated_gradients])
def test_a_callable_may_score_images_by_their_place(explainer: Any) -> None:
    kind = animal("plain")
    options = {name: 3 for name in ("n_samples", "n_steps") if name in explainer.options}
    by_place = explainer(kind.model, kind.images(), lambda output: output[torch.arange(3), TARGETS], **options)
    torch.testing.assert_close(by_place, explainer(kind.model, kind.images(), TARGETS, **options))


@pytest.mark.parametrize("explainer", [smoothgrad, vargrad, integrated_gradients])
def test_other_machines_are_filled_with_more_copies(explainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, seen = Net(), torch.rand(3, 3, 9, 9), list[int]()
    model.head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    options = {name: 24 for name in ("n_samples", "n_steps") if name in explainer.options}
    expected = explainer(model, images, 1, **options)
    assert seen == [3, *[6] * 12]
    monkeypatch.setattr(input_gradients, "_ROWS_AND_COPIES", {})  # no machine is known
    seen.clear()
    torch.testing.assert_close(explainer(model, images, 1, **options), expected, atol=1e-6, rtol=1e-4)
    assert seen == [3, 48, 24]


@pytest.mark.parametrize("explainer", [smoothgrad, vargrad, integrated_gradients])
def test_channels_are_checked_before_the_passes(explainer: Any) -> None:
    model, ran = Net(), []
    model.head.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ConfigurationError, match="channels takes 'max_abs', 'sum' or None, got 'mean'"):
        explainer(model, torch.rand(1, 3, 9, 9), 1, channels="mean")
    assert len(ran) == 1  # the look at the images themselves


def test_draws_are_the_cpus_whatever_device_is_the_default() -> None:
    model, images = Net(), torch.rand(2, 3, 9, 9)
    generator = torch.Generator()

    def maps() -> list[torch.Tensor]:
        return [
            smoothgrad(model, images, 1, n_samples=2, generator=generator.manual_seed(0)),
            vargrad(model, images, 1, n_samples=2),
            integrated_gradients(model, images, 1, n_steps=2, baselines=["uniform", "noise"]),
            rise(model, images, 1, n_masks=3),
        ]

    expected = maps()
    with torch.device("meta"):
        got = maps()
    torch.testing.assert_close(got, expected)


def test_numpys_numbers_will_do() -> None:
    model, images = Net(), torch.rand(2, 3, 9, 9)
    got = smoothgrad(model, images, 1, n_samples=np.int64(2), noise_level=np.float32(0.5))
    torch.testing.assert_close(got, smoothgrad(model, images, 1, n_samples=2, noise_level=0.5))
    got = integrated_gradients(model, images, 1, n_steps=np.int32(3), baselines=np.float64(0.5))
    torch.testing.assert_close(got, integrated_gradients(model, images, 1, n_steps=3, baselines=0.5))


# ---- integrated gradients


BASELINES = [None, "zeros", 0.5, "mean", "blur", "uniform", "noise", torch.rand(3, 1, 1), [0.0, "mean", "uniform"]]


@pytest.mark.parametrize("baselines", BASELINES, ids=str)
@pytest.mark.parametrize("name", ["plain", pytest.param("resnet", marks=pytest.mark.matrix), "flattening"])
def test_attributions_sum_to_the_difference_of_the_scores(name: str, baselines: Any) -> None:
    kind = animal(name)
    maps, error = integrated_gradients(
        kind.model, kind.images(), TARGETS, n_steps=200, baselines=baselines, return_error=True
    )
    scores = kind.model.eval()(kind.images()).detach()[torch.arange(3), TARGETS]
    scale = maps.abs().sum((1, 2)) + scores.abs()
    assert (error.abs() < 4e-3 * scale).all()
    if baselines in (None, "zeros"):
        black = kind.model(torch.zeros_like(kind.images())).detach()[torch.arange(3), TARGETS]
        torch.testing.assert_close(maps.sum((1, 2)), scores - black + error, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["gausslegendre", "midpoint", "trapezoid"])
def test_every_rule_is_exact_for_a_linear_model(method: Any) -> None:
    # captum's trapezoid weights sum to 1 - 1/n, so that it misses this.
    kind = animal("mlp")
    _, error = integrated_gradients(
        kind.model, kind.images(), TARGETS, n_steps=4, method=method, baselines=0.2, return_error=True
    )
    assert (error.abs() < 1e-5).all()


@pytest.mark.parametrize("channels", ["sum", "max_abs", None])
def test_the_error_does_not_depend_on_how_maps_are_reduced(channels: Any) -> None:
    kind = animal("plain")
    _, expected = integrated_gradients(kind.model, kind.images(), 1, n_steps=3, return_error=True)
    maps, error = integrated_gradients(kind.model, kind.images(), 1, n_steps=3, channels=channels, return_error=True)
    assert maps.ndim == (4 if channels is None else 3)
    torch.testing.assert_close(error, expected)


def test_several_baselines_are_averaged() -> None:
    kind = animal("plain")
    options: dict[str, Any] = {"n_steps": 3}
    several = integrated_gradients(kind.model, kind.images(), 1, baselines=[0.0, "mean"], **options)
    alone = [integrated_gradients(kind.model, kind.images(), 1, baselines=each, **options) for each in (0.0, "mean")]
    torch.testing.assert_close(several, (alone[0] + alone[1]) / 2)


def test_baselines_are_what_they_are_called() -> None:
    kind = animal("plain")
    images = kind.images()

    def maps(baselines: Any, **options: Any) -> torch.Tensor:
        return integrated_gradients(kind.model, images, 1, n_steps=3, baselines=baselines, **options)

    torch.testing.assert_close(maps("mean"), maps(images.mean((2, 3), keepdim=True)))
    torch.testing.assert_close(maps(0.25), maps(torch.tensor(0.25)))
    torch.testing.assert_close(maps(0.25), maps(np.full((3, 1, 1), 0.25)))
    own = images.flip(0)  # one for each image, cut up as they are
    torch.testing.assert_close(maps(own), maps(own, batch_size=2))
    for random in ("uniform", "noise"):
        assert torch.equal(maps(random), maps(random))
        torch.testing.assert_close(maps(random), maps(random, batch_size=2))
        drawn = [maps(random, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        assert not torch.equal(*drawn)


@pytest.mark.parametrize(
    ("explainer", "options", "message"),
    [
        (saliency, {"channels": "mean"}, "channels takes 'max_abs', 'sum' or None, got 'mean'"),
        (smoothgrad, {"channels": "mean", "n_samples": 1}, "channels takes 'max_abs', 'sum' or None, got 'mean'"),
        (smoothgrad, {"n_samples": 0}, "n_samples takes a positive integer, got 0"),
        (smoothgrad, {"n_samples": 2.5}, r"n_samples takes a positive integer, got 2\.5"),
        (smoothgrad, {"noise_level": -0.1}, r"noise_level takes a share of the image's range, at least 0, got -0\.1"),
        (smoothgrad, {"noise_level": float("nan")}, "noise_level takes .*, got nan"),
        (smoothgrad, {"noise_level": "a"}, "noise_level takes a share of the image's range, at least 0, got 'a'"),
        (smoothgrad, {"noise_level": True}, "noise_level takes .*, got True"),
        (vargrad, {"n_samples": 0}, "n_samples takes a positive integer, got 0"),
        (vargrad, {"n_samples": True}, "n_samples takes a positive integer, got True"),
        (integrated_gradients, {"n_steps": True}, "n_steps takes a positive integer, got True"),
        (input_x_gradient, {"channels": "mean"}, "channels takes 'max_abs', 'sum' or None, got 'mean'"),
        (integrated_gradients, {"n_steps": 0}, "n_steps takes a positive integer, got 0"),
        (integrated_gradients, {"n_steps": 1, "method": "trapezoid"}, "n_steps takes an integer of at least 2, got 1"),
        (integrated_gradients, {"method": "simpson"}, "method takes 'gausslegendre', .*, got 'simpson'"),
        (
            integrated_gradients,
            {"baselines": "grey"},
            "baselines takes None, 'zeros', .* or a list of these, got 'grey'",
        ),
        (integrated_gradients, {"baselines": []}, "baselines takes at least one baseline, got an empty list"),
        (
            integrated_gradients,
            {"baselines": torch.zeros(5)},
            r"expands to the images \(2, 3, 9, 9\), got float32 \(5,\)",
        ),
        (
            integrated_gradients,
            {"baselines": torch.zeros(3, 3, 9, 9), "images": torch.rand(4, 3, 9, 9), "batch_size": 3},
            "a baseline for each image, or one for all, is expected; got 3 for at least 4 images",
        ),
    ],
)
def test_options_out_of_range(explainer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        explainer(Net(), options.pop("images", torch.rand(2, 3, 9, 9)), 1, **options)
