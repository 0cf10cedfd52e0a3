from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import ablationcam, eigencam, gradient_free, scorecam
from lightning_interp.model.locate import locate
from lightning_interp.model.trace import Trace
from tests.explain.test_activation_maps import as_peers, averaged, grid, peers
from tests.helpers import references
from tests.helpers.states import assert_same, unchanged
from tests.helpers.zoo import Net, animal

TARGETS = torch.tensor([0, 1, 2])


class Counting(Net):
    """Counts the images that pass below and above the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[tuple[int, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        self.counts.append((len(images), len(features)))
        return self.head(features.mean((2, 3)))


# ---- EigenCAM


@pytest.mark.parametrize("name", ["plain", "resnet", "vgg_bn", "squeezenet"])
def test_eigencam_agrees_with_pytorch_grad_cam_but_for_its_arbitrary_sign(name: str) -> None:
    kind = animal(name)
    assert kind.layer is not None
    maps = eigencam(kind.model, kind.images(), upsample=False)
    theirs = peers("EigenCAM", kind, [kind.layer], [0, 0, 0])
    assert (theirs.amax((1, 2)) > 0).all()
    for ours, other in zip(maps, theirs, strict=True):
        distances = [(as_peers(sign * ours[None], kind.size)[0] - other).abs().max() for sign in (1, -1)]
        assert min(distances) < 1e-5


def test_eigencam_is_the_same_for_more_positions_than_channels() -> None:
    kind = animal("plain")  # 8 channels; 48 positions, or 6 after a pooling
    for layer in ("first.0", "second"):
        expected = references.eigencam(kind.model, kind.images(), TARGETS, layer)
        torch.testing.assert_close(
            eigencam(kind.model, kind.images(), layer=layer, upsample=False), expected, atol=1e-5, rtol=1e-4
        )


def test_eigencams_sign_is_no_chance_where_activations_are_equally_strong_everywhere() -> None:
    # After a layer norm the channels of every position sum to zero, which decides no sign.
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.norm(images.movedim(1, -1)).mean((1, 2)))

    model, images = Normed(), torch.randn(1, 8, 6, 6) * 0.1
    images[:, 0] += 1
    images[:, :2, 2, 3] = torch.tensor([-9.0, 3.0])  # an outlier
    for noise in torch.randn(20, 1, 8, 6, 6) * 1e-6:
        maps = eigencam(model, images + noise, layer="norm", reshape=lambda x: x.movedim(-1, 1), upsample=False)
        assert int(maps.flatten().argmax()) == 2 * 6 + 3


def test_eigencams_sign_follows_the_activations_and_targets_change_nothing() -> None:
    kind = animal("resnet")
    point = locate(kind.model, "layer3")
    with Trace.record(kind.model, kind.images(), 0, layers={point: False}) as trace:
        strength = trace.activations(point).sum(1)
    maps = eigencam(kind.model, kind.images(), 0, layer="layer3", upsample=False)
    assert ((maps * strength).sum((1, 2)) > 0).all()
    assert torch.equal(maps, eigencam(kind.model, kind.images(), 2, layer="layer3", upsample=False))


@pytest.mark.parametrize("layer", ["first.0", "second"])  # more positions than channels, and fewer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_image_that_is_not_finite_leaves_the_eigencams_of_others(layer: str, bad: float) -> None:
    kind = animal("plain")
    images = kind.images()
    expected = eigencam(kind.model, images, layer=layer)
    images[1] = bad
    maps = eigencam(kind.model, images, layer=layer)
    torch.testing.assert_close(maps[::2], expected[::2])
    assert maps[1].isnan().all()


# ---- Score-CAM


@pytest.mark.parametrize("name", ["plain", "vgg_bn"])
def test_scorecam_agrees_with_pytorch_grad_cam(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It resizes the masks so that corners meet corners; Score-CAM's authors, and we, by the pixels' areas.
    def resize(size: Any) -> nn.Module:
        return nn.Upsample(tuple(size), mode="bilinear", align_corners=False)

    monkeypatch.setattr(torch.nn, "UpsamplingBilinear2d", resize)
    kind = animal(name)
    assert kind.layer is not None
    theirs = peers("ScoreCAM", kind, [kind.layer], [0, 1, 2])
    assert (theirs.amax((1, 2)) > 0).all()
    got = as_peers(scorecam(kind.model, kind.images(), TARGETS, upsample=False), kind.size)
    torch.testing.assert_close(got, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "n_channels"),
    [
        *itertools.product(["plain", "vgg_bn", "flattening", "convnext", "vit", "one_logit"], [None, 4]),
        *(("resnet", 4), pytest.param("resnet", None, marks=pytest.mark.matrix)),
    ],
)
def test_scorecam_is_the_papers(name: str, n_channels: int | None) -> None:
    kind = animal(name)
    layer, targets = kind.layer or "conv2", torch.tensor([0, 1, 1])
    expected = references.scorecam(kind.model, kind.images(), targets, layer, n_channels=n_channels)
    assert expected.any()
    assert_same(
        scorecam(kind.model, kind.images(), targets, layer=layer, n_channels=n_channels, upsample=False), expected
    )


def test_scorecams_chunks_change_nothing_and_constant_channels_share_a_pass() -> None:
    model, images = Counting().eval(), torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        model.second[0].bias[:3] = -10  # three channels that are nowhere above zero
        model.second[0].bias[3:] = 1
    whole = scorecam(model, images, 1, layer="second", upsample=False)
    model.counts.clear()
    torch.testing.assert_close(scorecam(model, images, 1, layer="second", chunk_size=2, upsample=False), whole)
    assert [n for n, _ in model.counts[1:]] == [1, 2, 2, 1] * 2
    torch.testing.assert_close(whole, references.scorecam(model, images, torch.tensor([1, 1]), "second"))


def test_scorecam_runs_more_images_at_once_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_free, "rows_per_pass", lambda device, cpu, other: other)
    model, images = Counting(), torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        model.second[0].bias.fill_(1)  # every channel varies
        model.second[0].weight.mul_(0.1)
    scorecam(model, images, 1, layer="second")
    assert [n for n, _ in model.counts[1:]] == [8, 8]
    monkeypatch.setattr(gradient_free, "rows_per_pass", lambda device, cpu, other: 4)
    scorecam(model, images, 1, layer="second")
    assert [n for n, _ in model.counts[-4:]] == [4, 4, 4, 4]


@pytest.mark.parametrize("explainer", [scorecam, ablationcam], ids=lambda explainer: explainer.name)
def test_a_callable_scores_each_row_by_itself(explainer: Any) -> None:
    kind = animal("plain")
    maps = explainer(kind.model, kind.images(), lambda output: output[:, 1])
    torch.testing.assert_close(maps, explainer(kind.model, kind.images(), 1))


def test_scorecam_of_a_model_that_views_its_activations() -> None:
    class Viewing(Net):
        def forward(self, images: Tensor) -> Tensor:
            features = self.features(images)
            return self.head(features.view(len(images), 8, -1).view(-1).view(len(images), 8, -1).mean(2))

    images = torch.rand(2, 3, 9, 9)
    torch.manual_seed(0)
    expected = scorecam(Net(), images, 1, layer="second")
    torch.manual_seed(0)
    torch.testing.assert_close(scorecam(Viewing(), images, 1, layer="second"), expected)


def test_an_error_of_the_models_own_is_raised_by_scorecams_first_run() -> None:
    runs = []

    class Failing(Net):
        def features(self, images: Tensor) -> Tensor:
            if len(images) > 2:
                runs.append(len(images))
                raise RuntimeError("too many images")
            return super().features(images)

    model, images = Failing(), torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        model.second[0].bias.fill_(1)  # every channel varies
        model.second[0].weight.mul_(0.1)
    with unchanged(model), pytest.raises(RuntimeError, match="too many images"):
        scorecam(model, images, 1, layer="second")
    assert runs == [8]


# ---- Ablation-CAM


@pytest.mark.parametrize("name", ["plain", "resnet", "vgg_bn"])
def test_ablationcam_agrees_with_pytorch_grad_cam(name: str) -> None:
    kind = animal(name)
    assert kind.layer is not None
    theirs = peers("AblationCAM", kind, [kind.layer], [0, 1, 2])
    assert (theirs.amax((1, 2)) > 0).all()
    got = as_peers(ablationcam(kind.model, kind.images(), TARGETS, upsample=False), kind.size)
    torch.testing.assert_close(got, theirs, atol=1e-5, rtol=1e-4)


class _Zeroing(AblationLayerVit):
    """pytorch-grad-cam's, which puts ten million below the smallest where activations may be negative: here zero."""

    def __call__(self, x: Tensor) -> Tensor:
        for row, channel in enumerate(self.indices[: len(self.activations)]):
            self.activations[row, :, channel] = 0
        return self.activations


def test_ablationcam_of_tokens_agrees_with_pytorch_grad_cams() -> None:
    kind = animal("vit")
    assert kind.layer is not None
    model = copy.deepcopy(kind.model).eval()
    assert issubclass(_Zeroing, AblationLayer)
    with pytorch_grad_cam.AblationCAM(
        model,
        [model.get_submodule(kind.layer)],
        reshape_transform=grid,
        ablation_layer=_Zeroing(),
        batch_size=4,
    ) as peer:
        theirs = torch.from_numpy(
            peer(kind.images(), [lambda logits, target=target: logits[target] for target in (0, 1, 2)])
        )
    assert (theirs.amax((1, 2)) > 0).all()
    got = ablationcam(kind.model, kind.images(), TARGETS, upsample=False)
    torch.testing.assert_close(as_peers(got, kind.size), theirs, atol=1e-4, rtol=1e-3)
    assert_same(got, references.ablationcam(kind.model, kind.images(), TARGETS, kind.layer))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_what_is_below_the_layer_runs_once_for_a_chunk(chunk_size: int | None) -> None:
    model, images = Counting().eval(), torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        model.second[0].bias[:1] = -10  # without it nothing changes, so it is not run
        model.second[0].bias[1:] = 1
    got = ablationcam(model, images, 1, layer="second", chunk_size=chunk_size, upsample=False)
    chunks = {None: [7], 1: [1] * 7, 3: [3, 3, 1], 100: [7]}[chunk_size]
    assert model.counts == [(2, 2), *((1, n) for n in chunks), *((1, n) for n in chunks)]
    torch.testing.assert_close(got, references.ablationcam(model, images, torch.tensor([1, 1]), "second"))


def test_channels_are_ablated_however_they_lie_in_memory() -> None:
    class Wide(Net):  # as many columns as channels
        def features(self, images: Tensor) -> Tensor:
            return super().features(images).contiguous(memory_format=torch.channels_last)

    model, images = Wide(), torch.rand(2, 3, 9, 17)
    model.second.append(nn.Identity())
    expected = ablationcam(model, images, 1, layer="second.0", upsample=False)
    assert expected.shape == (2, 4, 8)
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    got = ablationcam(model, images, 1, layer="second.0", reshape=lambda t: t.contiguous(), upsample=False)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_layers_before_the_last_are_ablated() -> None:
    kind = animal("plain")
    expected = references.ablationcam(kind.model, kind.images(), TARGETS, "first")
    torch.testing.assert_close(
        ablationcam(kind.model, kind.images(), TARGETS, layer="first", upsample=False), expected, atol=1e-5, rtol=1e-4
    )


def test_a_function_that_is_no_module_is_ablated() -> None:
    kind = animal("densenet")
    model, images = kind.model.eval(), kind.images()
    activations = model.features(images).relu().detach()
    score = model(images)[:, 1].detach()
    weights = []
    for channel in range(activations.shape[1]):
        without = activations.clone()
        without[:, channel] = 0
        weights.append((score - model.classifier(without.mean((2, 3)))[:, 1].detach()) / score)
    expected = torch.einsum("cn,nchw->nhw", torch.stack(weights), activations)
    torch.testing.assert_close(ablationcam(model, images, 1, upsample=False), expected, atol=1e-5, rtol=1e-4)


def test_of_a_linear_head_the_weights_are_its_shares() -> None:
    kind = animal("plain")
    point = locate(kind.model, "second")
    with Trace.record(kind.model, kind.images(), 1, layers={point: False}) as trace:
        activations, scores = trace.activations(point), trace.scores
    shares = kind.model.head.weight[1] * activations.mean((2, 3)) / scores[:, None]
    expected = torch.einsum("nc,nchw->nhw", shares, activations).detach()
    torch.testing.assert_close(ablationcam(kind.model, kind.images(), 1, upsample=False), expected)


def test_a_score_of_zero_gives_no_weights() -> None:
    model = Net()
    nn.init.zeros_(model.head.bias)
    nn.init.zeros_(model.head.weight)
    assert not ablationcam(model, torch.rand(2, 3, 9, 9), 1).any()


def test_negative_scores_turn_the_sign() -> None:
    kind = animal("one_logit")
    one, zero = (ablationcam(kind.model, kind.images(), target) for target in (1, 0))
    torch.testing.assert_close(one, zero)


@pytest.mark.parametrize("explainer", [eigencam, scorecam, ablationcam], ids=lambda explainer: explainer.name)
def test_several_layers(explainer: Any) -> None:
    kind, layers = animal("plain"), ["first", "second"]
    with unchanged(kind.model):
        maps = explainer(kind.model, kind.images(), 1, layer=layers)
    torch.testing.assert_close(maps, averaged(explainer, kind, layers))


@pytest.mark.parametrize(
    ("explainer", "options", "message"),
    [
        (scorecam, {"n_channels": 0}, "n_channels takes a positive integer, got 0"),
        (scorecam, {"chunk_size": 1.5}, r"chunk_size takes a positive integer, got 1\.5"),
        (scorecam, {"n_channels": True}, "n_channels takes a positive integer, got True"),
        (ablationcam, {"chunk_size": True}, "chunk_size takes a positive integer, got True"),
        (ablationcam, {"reshape": lambda x: x[:, :3]}, r"finds no channels to ablate in .*\(2, 8, 4, 4\): expected 3"),
    ],
)
def test_options_out_of_range(explainer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        explainer(Net(), torch.rand(2, 3, 9, 9), 1, **options)


def test_numpys_integers_will_do() -> None:
    kind = animal("plain")
    got = scorecam(kind.model, kind.images(), 1, n_channels=np.int64(3), chunk_size=np.int32(2))
    torch.testing.assert_close(got, scorecam(kind.model, kind.images(), 1, n_channels=3))
    got = ablationcam(kind.model, kind.images(), 1, chunk_size=np.int64(2))
    torch.testing.assert_close(got, ablationcam(kind.model, kind.images(), 1))
