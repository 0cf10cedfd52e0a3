from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

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
from tests.helpers import references
from tests.helpers.states import assert_same, unchanged
from tests.helpers.zoo import Net, animal

TARGETS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("name", ["plain", "flattening", "resnet", "vgg_bn", "densenet", "convnext", "swin", "vit"])
def test_saliency_is_captums(name: str) -> None:
    kind = animal(name)
    expected = Saliency(kind.model.eval()).attribute(kind.images().requires_grad_(), TARGETS).amax(1)
    assert_same(saliency(kind.model, kind.images(), TARGETS), expected)


@pytest.mark.parametrize("name", ["plain", "flattening", "resnet", "vgg_bn", "densenet", "convnext", "swin", "vit"])
def test_input_x_gradient_is_captums(name: str) -> None:
    kind = animal(name)
    expected = InputXGradient(kind.model.eval()).attribute(kind.images().requires_grad_(), TARGETS).sum(1).detach()
    assert_same(input_x_gradient(kind.model, kind.images(), TARGETS), expected)


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
    assert_same(maps, expected.sum(1).float())
    assert ((error - delta).abs() < 1e-5 * expected.abs().sum((1, 2, 3))).all()


def test_midpoints_are_captums() -> None:
    kind = animal("flattening")
    expected = IntegratedGradients(kind.model.eval()).attribute(
        kind.images(), 0.3, TARGETS, n_steps=5, method="riemann_middle"
    )
    got = integrated_gradients(kind.model, kind.images(), TARGETS, n_steps=5, method="midpoint", baselines=0.3)
    assert_same(got, expected.sum(1).float())


@pytest.mark.parametrize("n_steps", [4, 10])
def test_captums_trapezoid_is_too_small_by_one_part_in_its_steps(n_steps: int) -> None:
    # Its n points are 1 / (n - 1) apart, and its weights those of points 1 / n apart: they sum to 1 - 1 / n. So a
    # linear model's attributions, which any rule should give, miss their sum by as much.
    kind = animal("mlp")
    captums = IntegratedGradients(kind.model.eval())
    theirs = captums.attribute(kind.images(), 0.2, TARGETS, n_steps=n_steps, method="riemann_trapezoid").sum(1).float()
    options: dict[str, Any] = {"n_steps": n_steps, "baselines": 0.2}
    ours = integrated_gradients(kind.model, kind.images(), TARGETS, method="trapezoid", **options)
    assert_same(ours, integrated_gradients(kind.model, kind.images(), TARGETS, **options))
    assert_same(theirs, (1 - 1 / n_steps) * ours)


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
        assert_same(got, expected)
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
    assert_same(smoothgrad(kind.model, images, 1, **options), all_of_them.mean(0))
    assert_same(vargrad(kind.model, images, 1, **options), all_of_them.var(0, correction=0))


@pytest.mark.parametrize("explainer", [smoothgrad, vargrad, integrated_gradients])
def test_a_callable_may_score_images_by_their_index(explainer: Any) -> None:
    kind = animal("plain")
    options = {name: 3 for name in ("n_samples", "n_steps") if name in explainer.options}
    by_index = explainer(kind.model, kind.images(), lambda output: output[torch.arange(3), TARGETS], **options)
    assert_same(by_index, explainer(kind.model, kind.images(), TARGETS, **options))


@pytest.mark.parametrize("explainer", [smoothgrad, vargrad, integrated_gradients])
def test_more_copies_run_at_once_on_other_devices(explainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, counts = Net(), torch.rand(3, 3, 9, 9), list[int]()
    model.head.register_forward_hook(lambda module, args, output: counts.append(len(output)))
    options = {name: 24 for name in ("n_samples", "n_steps") if name in explainer.options}
    expected = explainer(model, images, 1, **options)
    assert counts == [3, *[6] * 12]
    monkeypatch.setattr(input_gradients, "rows_per_pass", lambda device, cpu, other: other)
    counts.clear()
    assert_same(explainer(model, images, 1, **options), expected)
    assert counts == [3, 48, 24]


@pytest.mark.parametrize("explainer", [smoothgrad, vargrad, integrated_gradients])
def test_channels_are_checked_before_the_passes(explainer: Any) -> None:
    model, ran = Net(), []
    model.head.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ConfigurationError, match="channels takes 'max_abs', 'sum' or None, got 'mean'"):
        explainer(model, torch.rand(1, 3, 9, 9), 1, channels="mean")
    assert len(ran) == 1  # the pass on the images themselves


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
    for maps_of_method, expected_maps in zip(got, expected, strict=True):
        assert_same(maps_of_method, expected_maps)


def test_numpys_numbers_will_do() -> None:
    model, images = Net(), torch.rand(2, 3, 9, 9)
    got = smoothgrad(model, images, 1, n_samples=np.int64(2), noise_level=np.float32(0.5))
    assert_same(got, smoothgrad(model, images, 1, n_samples=2, noise_level=0.5))
    got = integrated_gradients(model, images, 1, n_steps=np.int32(3), baselines=np.float64(0.5))
    assert_same(got, integrated_gradients(model, images, 1, n_steps=3, baselines=0.5))


# ---- integrated gradients


COLOUR = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1)
BASELINES = [None, "zeros", 0.5, "mean", "blur", "uniform", "noise", COLOUR, [0.0, "mean", "uniform"]]


@pytest.mark.parametrize("baselines", BASELINES, ids=str)
@pytest.mark.parametrize(
    ("name", "n_steps", "share"),
    # Deeper models have more kinks along the path, for which a quadrature of smooth functions is inexact.
    [("plain", 60, 4e-3), ("flattening", 60, 4e-3), pytest.param("resnet", 200, 2e-2, marks=pytest.mark.matrix)],
)
def test_attributions_sum_to_the_difference_of_the_scores(
    name: str, n_steps: int, share: float, baselines: Any
) -> None:
    kind = animal(name)
    maps, error = integrated_gradients(
        kind.model, kind.images(), TARGETS, n_steps=n_steps, baselines=baselines, return_error=True
    )
    scores = kind.model.eval()(kind.images()).detach()[torch.arange(3), TARGETS]
    scale = maps.abs().sum((1, 2)) + scores.abs()
    assert (error.abs() < share * scale).all()
    if baselines in (None, "zeros"):
        black = kind.model(torch.zeros_like(kind.images())).detach()[torch.arange(3), TARGETS]
        torch.testing.assert_close(maps.sum((1, 2)), scores - black + error, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["gausslegendre", "midpoint", "trapezoid"])
def test_every_rule_is_exact_for_a_linear_model(method: Any) -> None:
    kind = animal("mlp")
    _, error = integrated_gradients(
        kind.model, kind.images(), TARGETS, n_steps=4, method=method, baselines=0.2, return_error=True
    )
    assert (error.abs() < 1e-5).all()


@pytest.mark.parametrize("method", ["gausslegendre", "midpoint", "trapezoid"])
def test_every_rule_is_exact_for_a_quadratic_model(method: Any) -> None:
    # A rule whose points lie askew still is exact for a linear model, whose gradient is the same everywhere.
    class Squares(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.square().sum((1, 2, 3))[:, None]

    images = torch.rand(2, 3, 4, 4)
    maps = integrated_gradients(Squares(), images, 1, n_steps=3, method=method, baselines=0.5)
    assert_same(maps, (images.square() - 0.25).sum(1))


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
    assert_same(several, (alone[0] + alone[1]) / 2)


def baseline(images: Tensor, name: str) -> Tensor:
    """What a name stands for, as the sum of all pixels tells: its attributions are the image less the baseline."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 1, bias=False))
    nn.init.ones_(model[1].weight)
    return images - integrated_gradients(model, images, 1, n_steps=1, baselines=name, channels=None)


def test_baselines_have_the_statistics_of_their_names() -> None:
    images = torch.rand(2, 3, 40, 40) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1) - 0.5
    low, high = images.amin((1, 2, 3)), images.amax((1, 2, 3))
    blurred = baseline(images, "blur")
    for dim in (2, 3):  # smoother down and across, and as bright
        assert (blurred.diff(dim=dim).abs().mean((1, 2, 3)) < 0.1 * images.diff(dim=dim).abs().mean((1, 2, 3))).all()
    torch.testing.assert_close(blurred.mean((2, 3)), images.mean((2, 3)), atol=0.05, rtol=0.05)
    uniform = (baseline(images, "uniform") - low.view(2, 1, 1, 1)) / (high - low).view(2, 1, 1, 1)
    torch.testing.assert_close(uniform.amin((1, 2, 3)), torch.zeros(2), atol=0.01, rtol=0)
    torch.testing.assert_close(uniform.amax((1, 2, 3)), torch.ones(2), atol=0.01, rtol=0)
    torch.testing.assert_close(uniform.mean((1, 2, 3)), torch.full((2,), 0.5), atol=0.02, rtol=0)
    noise = (baseline(images, "noise") - images) / (high - low).view(2, 1, 1, 1)
    torch.testing.assert_close(noise.std((1, 2, 3)), torch.ones(2), atol=0.05, rtol=0)
    torch.testing.assert_close(noise.mean((1, 2, 3)), torch.zeros(2), atol=0.05, rtol=0)


def test_baselines_are_what_they_are_called() -> None:
    kind = animal("plain")
    images = kind.images()

    def maps(baselines: Any, **options: Any) -> torch.Tensor:
        return integrated_gradients(kind.model, images, 1, n_steps=3, baselines=baselines, **options)

    torch.testing.assert_close(maps("mean"), maps(images.mean((2, 3), keepdim=True)))
    torch.testing.assert_close(maps(0.25), maps(torch.tensor(0.25)))
    torch.testing.assert_close(maps(0.25), maps(np.full((3, 1, 1), 0.25)))
    flipped = images.flip(0)  # one for each image, in chunks as they are
    torch.testing.assert_close(maps(flipped), maps(flipped, batch_size=2))
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
