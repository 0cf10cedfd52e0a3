from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_grad_cam
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torchcam.methods import GradCAMpp

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import (
    Explainer,
    cam,
    gradcam,
    gradcam_plus_plus,
    hirescam,
    layercam,
    saliency,
    xgradcam,
)
from lightning_interp.model.locate import locate
from lightning_interp.model.trace import Trace
from tests.helpers import references
from tests.helpers.states import assert_same
from tests.helpers.zoo import ANIMALS, CLASSES, Animal, Net, animal

TARGETS = torch.tensor([0, 1, 2])
GAPS = [kind for kind in ANIMALS if kind.gap and kind.name not in {"squeezenet", "one_logit", "one_logit_flat"}]


@pytest.mark.parametrize("kind", GAPS, ids=lambda kind: kind.name)
def test_gradcam_of_a_gap_model_is_its_cam_by_the_number_of_positions(kind: Animal) -> None:
    exact = cam(kind.model, kind.images(), 1, upsample=False)
    by_gradient = gradcam(kind.model, kind.images(), 1, upsample=False)
    assert_same(by_gradient, exact / exact[0].numel())


@pytest.mark.parametrize("name", ["plain", "resnet", "swin", "repeating"])
def test_the_mean_of_a_cam_and_the_bias_are_the_logit(name: str) -> None:
    kind = animal(name)
    head = next(module for module in reversed(list(kind.model.modules())) if isinstance(module, nn.Linear))
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


class Square(Net):
    """As many classes as channels, which the logits must not be taken for."""

    def __init__(self) -> None:
        super().__init__(classes=8)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images).mean((2, 3))))


def shrunk(model: Net, factor: float) -> Net:
    with torch.no_grad():
        model.head.weight.mul_(factor)
        model.head.bias.mul_(factor)
    return model


@pytest.mark.parametrize("factor", [1e-5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_logits_are_no_class_maps(factor: float, dtype: torch.dtype) -> None:
    model, images = shrunk(Square(), factor), torch.rand(2, 3, 9, 9, dtype=dtype)
    with torch.no_grad():
        for parameter in model.second.parameters():
            parameter.mul_(1e-4)
    model.to(dtype)
    maps = cam(model, images, 1, upsample=False)
    expected = torch.einsum("c,nchw->nhw", model.head.weight[1], model.eval().features(images)).detach()
    torch.testing.assert_close(maps, expected.float(), atol=0, rtol=0.05 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_logits_do_not_hide_a_wrong_head(dtype: torch.dtype) -> None:
    model, images = shrunk(Normed(), 1e-3).to(dtype), torch.rand(2, 3, 9, 9, dtype=dtype)
    with pytest.raises(ConfigurationError, match="has no head of"):
        cam(model, images, 1)


class Moved(Net):
    def forward(self, images: Tensor) -> Tensor:
        return 1.01 * super().forward(images)


def test_a_small_error_is_one_of_fast_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert cam(Moved(), torch.rand(2, 3, 9, 9), 1).any()


def test_a_small_error_is_none_of_double_precision() -> None:
    with pytest.raises(ConfigurationError, match="has no head of"):
        cam(Moved().double(), torch.rand(2, 3, 9, 9).double(), 1)


def test_an_image_that_is_not_finite_leaves_the_maps_of_others() -> None:
    model, images = Net(), torch.rand(3, 3, 9, 9)
    expected = cam(model, images, 1)
    images[1] = torch.nan
    maps = cam(model, images, 1)
    torch.testing.assert_close(maps[::2], expected[::2])
    assert maps[1].isnan().all()


@pytest.mark.parametrize("name", ["plain", "squeezenet"])
def test_a_diverged_model_still_has_its_head(name: str) -> None:
    kind = animal(name)
    assert cam(kind.model, torch.full_like(kind.images(), torch.nan), 1).isnan().all()


def test_cam_explains_classes_only() -> None:
    with pytest.raises(ConfigurationError, match="not a callable's scores; use gradcam"):
        cam(Net(), torch.rand(2, 3, 9, 9), lambda output: output[:, 0])


@pytest.mark.parametrize("name", ["plain", "resnet", "vgg_bn", "mobilenet_v3", "convnext", "swin"])
def test_gradcam_is_captums(name: str) -> None:
    kind = animal(name)
    assert kind.layer is not None
    model = kind.model.eval()
    expected = LayerGradCam(model, model.get_submodule(kind.layer)).attribute(
        kind.images().requires_grad_(), TARGETS, relu_attributions=False
    )
    assert_same(gradcam(model, kind.images(), TARGETS, upsample=False), expected.detach()[:, 0])
    for parameter in model.parameters():
        parameter.grad = None


def test_gradcam_takes_any_spatial_layer() -> None:
    kind = animal("resnet")
    sizes = [
        gradcam(kind.model, kind.images(), 1, layer=name, upsample=False).shape[-1]
        for name in ("conv1", "layer1", "layer2.0.relu", "layer3", "layer4")
    ]
    assert sizes == [32, 16, 8, 4, 2]


# ---- other people's numbers


def grid(tokens: Tensor) -> Tensor:
    """The tokens of the zoo's transformers, of which the first is the class token's."""
    return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)


def peers(name: str, kind: Animal, layers: list[str], targets: list[int], sign: int = 1) -> Tensor:
    """pytorch-grad-cam's maps of the logits times the sign: rectified and scaled to [0, 1]."""
    model = copy.deepcopy(kind.model).eval()  # it leaves gradients, and Ablation-CAM replaces layers
    reshape = {"reshape_transform": grid} if kind.attends else {}
    scores = [lambda logits, target=target: sign * logits[target] for target in targets]
    with getattr(pytorch_grad_cam, name)(model, [model.get_submodule(layer) for layer in layers], **reshape) as peer:
        return torch.from_numpy(peer(kind.images(), scores))


def scaled(maps: Tensor) -> Tensor:
    """As pytorch-grad-cam does it."""
    low = maps.amin((1, 2), keepdim=True)
    return (maps - low) / (1e-7 + (maps - low).amax((1, 2), keepdim=True))


def as_peers(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Rectified and scaled, resized and scaled, in pytorch-grad-cam's order."""
    small = scaled(maps.relu())[:, None]
    return scaled(nn.functional.interpolate(small, size, mode="bilinear", align_corners=False)[:, 0])


@pytest.mark.parametrize("name", ["plain", "resnet", "vgg_bn", "squeezenet", "vit", "timm_vit"])
@pytest.mark.parametrize(
    ("explainer", "peer"),
    [(gradcam, "GradCAM"), (xgradcam, "XGradCAM"), (hirescam, "HiResCAM"), (layercam, "LayerCAM")],
    ids=lambda value: getattr(value, "name", value),
)
def test_agrees_with_pytorch_grad_cam(explainer: Explainer, peer: str, name: str) -> None:
    # A map that is negative everywhere, whose ReLU is zero, is compared for the negative score.
    kind, compared = animal(name), torch.zeros(3, dtype=torch.bool)
    assert kind.layer is not None
    for sign in (1, -1):

        def score(logits: Tensor, sign: int = sign) -> Tensor:
            return sign * logits[torch.arange(3), TARGETS]

        theirs = peers(peer, kind, [kind.layer], TARGETS.tolist(), sign)
        got = as_peers(explainer(kind.model, kind.images(), score, upsample=False), kind.size)
        torch.testing.assert_close(got, theirs, atol=1e-5, rtol=1e-4)
        compared |= theirs.amax((1, 2)) > 0
    assert compared.all()


def test_gradcam_plus_plus_is_the_papers_and_not_torchcams() -> None:
    # torchcam divides a copy by the denominator (``alpha[mask].div_``), and pytorch-grad-cam adds 1e-6 to one that is
    # often smaller; so the reference of tests/references.py decides, in double precision.
    kind = animal("resnet")
    expected = references.gradcam_plus_plus(kind.model, kind.images(), TARGETS, "layer4")
    assert_same(gradcam_plus_plus(kind.model, kind.images(), TARGETS, upsample=False), expected)
    model = copy.deepcopy(kind.model).eval()
    with GradCAMpp(model, "layer4") as peer:
        logits = model(kind.images())
        (theirs,) = peer([0, 1, 2], logits, normalized=False)
    without = _without_denominator(kind, TARGETS)
    torch.testing.assert_close(theirs / theirs.amax((1, 2), True), without / without.amax((1, 2), True))
    ours = expected.relu()
    assert (theirs / theirs.amax((1, 2), True) - ours / ours.amax((1, 2), True)).abs().max() > 0.01


def _without_denominator(kind: Animal, targets: Tensor) -> Tensor:
    point = locate(kind.model, "layer4")
    with Trace.record(kind.model, kind.images(), targets, layers={point: True}) as trace:
        activations, gradients = trace.activations(point), trace.gradients(point)
    weights = (gradients.square() * gradients.relu()).sum((2, 3))
    return torch.einsum("nc,nchw->nhw", weights, activations).relu()


def test_gradcam_plus_plus_survives_gradients_that_float32_cannot_square() -> None:
    model = Net()
    with torch.no_grad():
        model.head.weight.copy_(torch.rand(3, 8) * 1e-25)
    images = torch.rand(2, 3, 9, 9)
    maps = gradcam_plus_plus(model, images, 1, upsample=False)
    assert (maps > 0).any()
    # With no gradient to speak of, the denominator is two.
    torch.testing.assert_close(maps * 1e25, gradcam(model, images, 1, upsample=False) * 1e25 * 8, rtol=1e-4, atol=1e-5)


# captum's one-convolution model, which the field's tests share
class OneConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.relu1 = nn.Conv2d(1, 2, 3), nn.ReLU()
        self.linear, self.relu2 = nn.Linear(8, 4), nn.ReLU()
        with torch.no_grad():
            self.convolution.weight.fill_(1)
            self.convolution.bias.copy_(torch.tensor([-50.0, -75.0]))
            self.linear.weight.copy_(torch.tensor([[1.0] * 5 + [-1.0] * 3] * 4))
            self.linear.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.relu2(self.linear(self.relu1(self.convolution(images)).flatten(1)))


SIXTEEN = torch.arange(16.0).view(1, 1, 4, 4)


def test_gradcam_of_the_one_convolution_model() -> None:
    maps = gradcam(OneConvolution(), SIXTEEN, 0, layer="relu1", upsample=False)
    torch.testing.assert_close(maps, torch.tensor([[[0.0, 4.0], [28.0, 32.5]]]))


def test_the_others_of_the_one_convolution_model() -> None:
    # Its activations are [[0, 4], [40, 49]] - nothing and [[0, 0], [15, 24]]; its gradients rows of the linear layer.
    model = OneConvolution()
    activations = model.relu1(model.convolution(SIXTEEN))[0].detach()
    gradients = torch.tensor([1.0] * 5 + [-1.0] * 3).view(2, 2, 2)
    torch.testing.assert_close(
        hirescam(model, SIXTEEN, 0, layer="relu1", upsample=False)[0], (activations * gradients).sum(0)
    )
    torch.testing.assert_close(
        layercam(model, SIXTEEN, 0, layer="relu1", upsample=False)[0], (activations * gradients.clamp(min=0)).sum(0)
    )
    weights = [(a * g).sum() / a.sum() for a, g in zip(activations, gradients, strict=True)]
    expected = weights[0] * activations[0] + weights[1] * activations[1]
    torch.testing.assert_close(xgradcam(model, SIXTEEN, 0, layer="relu1", upsample=False)[0], expected)


# ---- what calls of layered methods take


@pytest.mark.parametrize("name", ["vit", "timm_vit"])
def test_transformers_are_seen_on_their_grid(name: str) -> None:
    kind = animal(name)
    assert kind.layer is not None
    maps = gradcam(kind.model, kind.images(), 1, upsample=False)
    assert maps.shape == (3, 4, 4)
    torch.testing.assert_close(gradcam(kind.model, kind.images(), 1, reshape=grid, upsample=False), maps)
    named = gradcam(kind.model, kind.images(), 1, layer=kind.layer, reshape=grid, upsample=False)
    torch.testing.assert_close(named, maps)


def test_reshape_takes_any_order() -> None:
    kind = animal("plain")
    turned = gradcam(kind.model, kind.images(), 1, reshape=lambda maps: maps.transpose(2, 3), upsample=False)
    torch.testing.assert_close(turned.mT, gradcam(kind.model, kind.images(), 1, upsample=False))
    with pytest.raises(ConfigurationError, match=r"'second.1' gives activations \(3, 8\), .*reshape="):
        gradcam(kind.model, kind.images(), 1, reshape=lambda maps: maps.mean((2, 3)))


def test_layers_that_fit_no_grid_take_reshape() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.tokens(images).mean(0))

        def tokens(self, images: Tensor) -> Tensor:
            return self.stem(images).flatten(2).permute(2, 0, 1)  # (T, N, C)

    class Model(Sequence):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()

        def tokens(self, images: Tensor) -> Tensor:
            return self.body(super().tokens(images))

    model, images = Model(), torch.rand(2, 3, 16, 8)
    maps = gradcam(
        model, images, 1, layer="body", reshape=lambda x: x.permute(1, 2, 0).unflatten(2, (4, 2)), upsample=False
    )
    torch.testing.assert_close(maps, gradcam(model, images, 1, layer="stem", upsample=False))


def averaged(explainer: Explainer, kind: Animal, layers: list[Any]) -> Tensor:
    """The mean of the layers' maps, each rectified, scaled and resized separately."""
    parts = []
    for layer in layers:
        small = explainer(kind.model, kind.images(), 1, layer=layer, upsample=False).relu()
        peaks = small.amax((1, 2), keepdim=True)
        assert (peaks > 0).all(), "nothing would be compared with nothing"
        parts.append(nn.functional.interpolate((small / peaks)[:, None], kind.size, mode="bilinear")[:, 0])
    return torch.stack(parts).mean(0)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_several_layers_are_averaged(batch_size: int | None) -> None:
    kind, layers = animal("resnet"), ["layer3", "layer4"]
    got = gradcam(kind.model, kind.images(), 1, layer=layers, batch_size=batch_size)
    torch.testing.assert_close(got, averaged(gradcam, kind, layers))


def test_several_layers_are_averaged_as_in_pytorch_grad_cam() -> None:
    kind, layers = animal("resnet"), ["layer2", "layer3"]
    for layer in layers:  # with values below and above zero, so that min-max scaling of the ReLU divides by the maximum
        small = gradcam(kind.model, kind.images(), 1, layer=layer, upsample=False)
        assert ((small.amin((1, 2)) <= 0) & (small.amax((1, 2)) > 0)).all()
    got = scaled(gradcam(kind.model, kind.images(), 1, layer=layers))
    torch.testing.assert_close(got, peers("GradCAM", kind, layers, [1, 1, 1]), atol=1e-5, rtol=1e-4)


def test_one_layer_in_a_list_is_scaled_as_several_are() -> None:
    kind = animal("plain")
    torch.testing.assert_close(gradcam(kind.model, kind.images(), 1, layer=[None]), averaged(gradcam, kind, [None]))


@pytest.mark.parametrize(("layer", "upsample"), [([], True), (["second", "first"], False)])
def test_several_layers_that_do_not_fit(layer: list[str], upsample: bool) -> None:
    with pytest.raises(
        ConfigurationError, match=r"several layers have maps of several sizes.*upsample=True, got layer"
    ):
        gradcam(Net(), torch.rand(2, 3, 9, 9), layer=layer, upsample=upsample)
    with pytest.raises(ConfigurationError, match="takes no layer"):
        saliency(Net(), torch.rand(2, 3, 9, 9), layer=["second"])


# ---- whether to believe them, after Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor]:
    """A small net that tells in which of three colours a patch somewhere in the noise is."""
    stream = torch.Generator().manual_seed(0)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        images, classes = 0.3 * torch.rand(n, 3, 24, 24, generator=stream), torch.arange(n) % CLASSES
        corners = torch.randint(0, 16, (n, 2), generator=stream).tolist()
        for image, kind, (top, left) in zip(images, classes.tolist(), corners, strict=True):
            image[kind, top : top + 8, left : left + 8] += 0.7
        return images, classes

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU()),
            *(
                nn.Conv2d(16, 16, 3, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(16, CLASSES),
            ),
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            images, classes = batch(32)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
    images, classes = batch(16)
    assert (model(images).argmax(1) == classes).float().mean() > 0.9
    return model, images


@pytest.mark.parametrize("explainer", [gradcam, saliency], ids=lambda explainer: explainer.name)
def test_random_top_layers_change_the_maps(explainer: Explainer, trained: tuple[nn.Module, Tensor]) -> None:
    model, images = trained
    targets = model(images).argmax(1)
    options: dict[str, Any] = {"layer": "5"} if explainer.layer else {}
    before = explainer(model, images, targets, **options)
    again = explainer(copy.deepcopy(model), images, targets, **options)
    correlations = []
    for seed in range(5):
        other = copy.deepcopy(model)
        torch.manual_seed(seed)
        for layer in (8, 4, 2):
            other[layer].reset_parameters()
        after = explainer(other, images, targets, **options)
        correlations += [_rank_correlation(one, two) for one, two in zip(before, after, strict=True)]
    assert _rank_correlation(before[0], again[0]) > 0.999
    assert sum(correlations) / len(correlations) < 0.5


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    ranks = [maps.flatten().argsort().argsort().double() for maps in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
