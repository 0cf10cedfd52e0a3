from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from docs import localizers
from lightning_interp.errors import ConfigurationError
from lightning_interp.localize import GAPClassifier
from tests.helpers.states import unchanged
from tests.helpers.zoo import ANIMALS, CLASSES, Animal, Checkpointed, Flattening, Net, animal, convnext, swin, vgg, vit

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
adapt = GAPClassifier.from_classifier
# Whose head is more than pooling and one linear layer.
NEW_HEADS = {"vgg_bn", "mobilenet_v3", "flattening", "vit", "timm_vit"}


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a new head of")
        yield


def resnet() -> nn.Module:
    return localizers.calibrated(models.resnet18(num_classes=CLASSES))


def logits_of(output: object) -> Tensor:
    logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) else logits
    assert isinstance(logits, Tensor)
    return logits[:, None] if logits.ndim == 1 else logits


@torch.no_grad()
def check_identity(adapted: GAPClassifier, images: Tensor) -> None:
    adapted.eval()
    if "a new head" in adapted.summary:  # which starts with zeros
        nn.init.normal_(adapted.head.weight)
        nn.init.normal_(adapted.head.bias)
    logits, maps = adapted.forward_with_maps(images.clone())
    bias = 0 if adapted.head.bias is None else adapted.head.bias
    assert maps.ndim == 4
    assert maps.shape[2:].numel() > 1
    assert (maps.mean((2, 3)) + bias - logits).abs().max() <= 1e-4 * logits.abs().max()
    assert torch.equal(adapted(images.clone()), logits)


# ---- adapted classifiers


@pytest.mark.parametrize("kind", [animal for animal in ANIMALS if animal.name != "mlp"], ids=lambda animal: animal.name)
def test_the_mean_of_a_map_is_its_logit(kind: Animal) -> None:
    model, images = kind.model, kind.images()
    with unchanged(model):
        adapted = adapt(model, sample=images[:1])
    check_identity(adapted, images)
    if kind.name in NEW_HEADS:
        assert "a new head" in adapted.summary
        return
    model.eval()
    with torch.no_grad():
        expected = logits_of(model(images.clone()))
        logits = adapted(images.clone())
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("library", "name"),
    [*(("torchvision", name) for name in localizers.TORCHVISION), *(("timm", name) for name in localizers.TIMM)],
)
def test_the_zoo(library: str, name: str) -> None:
    model, images = localizers.classifier(library, name), localizers.pictures(2)
    adapted = adapt(model, sample=images[:1])
    check_identity(adapted, images)
    with torch.no_grad():
        expected, logits = model(images), adapted(images)
    assert expected.abs().max() > 1e-3
    if "a new head" not in adapted.summary:
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert adapted.features(images).shape[2:].numel() >= 16


def test_the_table_has_every_family_of_torchvision() -> None:
    families = {getattr(models, name).__module__ for name in models.list_models(module=models)}
    assert {getattr(models, name).__module__ for name in localizers.TORCHVISION} == families


def test_maps_are_the_weighted_sum_of_the_features() -> None:
    adapted = adapt(resnet(), sample=IMAGES)
    features, (_, maps) = adapted.features(IMAGES), adapted.forward_with_maps(IMAGES)
    expected = torch.einsum("kc,nchw->nkhw", adapted.head.weight, features)
    torch.testing.assert_close(maps, expected)


def test_a_norm_between_pooling_and_linear_is_part_of_the_maps() -> None:
    model = convnext()
    nn.init.normal_(model.classifier[0].weight)
    nn.init.normal_(model.classifier[0].bias)
    adapted = adapt(model, sample=IMAGES)
    assert adapted.head.norm is not None
    check_identity(adapted, IMAGES)
    torch.testing.assert_close(adapted(IMAGES), model.eval()(IMAGES))


class BatchNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_mean = torch.randn(8)
        self.norm.running_var = torch.rand(8) + 0.5
        nn.init.normal_(self.norm.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images).mean((2, 3))))


def test_so_is_a_batch_norm() -> None:
    model = BatchNormed().eval()
    adapted = adapt(model, sample=IMAGES)
    torch.testing.assert_close(adapted.eval()(IMAGES), model(IMAGES))
    check_identity(adapted, IMAGES)


def test_a_fully_convolutional_head_keeps_its_rectifier_in_the_maps() -> None:
    model = animal("squeezenet").model.eval()
    adapted = adapt(model, sample=torch.rand(1, 3, 64, 64))
    assert adapted.head.bias is None
    _, maps = adapted.forward_with_maps(torch.rand(2, 3, 64, 64))
    assert maps.shape[1] == CLASSES
    assert (maps >= 0).all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_new_head_for_it_stands_on_features_not_on_maps_of_old_classes(dropout: float) -> None:
    adapted = adapt(animal("squeezenet").model, 5, sample=torch.rand(1, 3, 64, 64), dropout=dropout)
    assert adapted.head.weight.shape == (5, 512)
    assert "input of classifier.1" in adapted.summary


def test_class_tokens_are_left_out_of_the_pooling() -> None:
    model = vit().eval()
    adapted = adapt(model, 2, sample=IMAGES)
    tokens = []
    handle = model.encoder.register_forward_hook(lambda module, args, output: tokens.append(output))
    model(IMAGES)
    handle.remove()
    torch.testing.assert_close(adapted.eval().features(IMAGES).flatten(2).transpose(1, 2), tokens[0][:, 1:])


class Auxiliary(nn.Module):
    """Like GoogLeNet: more outputs in training, and functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 6, 3)
        self.aux, self.head = nn.Linear(4, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.first(images))
        aux = self.aux(x.mean((2, 3))) if self.training else None
        x = F.dropout(F.relu(self.second(x)), 0.5, training=self.training)
        logits = self.head(x.mean((2, 3)))
        return logits if aux is None else (logits, aux)


def test_auxiliary_heads_are_dropped_and_dropout_by_function_follows_the_mode() -> None:
    adapted = adapt(Auxiliary(), sample=IMAGES)
    assert isinstance(adapted.train()(IMAGES), Tensor)
    assert not any("aux" in name for name, _ in adapted.named_parameters())
    assert (adapted.features(IMAGES) == 0).float().mean() > 0.4
    adapted.eval()
    assert torch.equal(adapted(IMAGES), adapted(IMAGES))


class Deciding(Net):
    """No graph can be made of it."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        if x.sum() > -1e9:
            x = x * 1.0
        return self.head(x.mean((2, 3)))


class Stash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class Stashing(Deciding):
    """It keeps a tensor, which is a proxy while it is traced, and then cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(self.second, Stash())


class TwoWays(Net):
    """Its graphs of the two modes differ by more than flags."""

    def __init__(self) -> None:
        super().__init__()
        self.second[2].p = 0.0

    def features(self, images: Tensor) -> Tensor:
        return super().features(images.flip(3) if self.training else images)


BUILDS: list[Callable[[], nn.Module]] = [
    *(Net, Flattening, Deciding, Auxiliary, vgg, convnext, vit, swin, partial(Checkpointed, use_reentrant=False)),
    partial(models.squeezenet1_1, num_classes=CLASSES),
]
over_builds = pytest.mark.parametrize("build", BUILDS, ids=lambda build: getattr(build, "__name__", "partial"))


@over_builds
def test_every_parameter_learns(build: Callable[[], nn.Module]) -> None:
    # Otherwise DDP waits for gradients that never come.
    adapted = adapt(build(), 4, sample=IMAGES).train()
    nn.init.normal_(adapted.head.weight)
    F.cross_entropy(adapted(torch.cat([IMAGES, IMAGES])), torch.tensor([0, 1, 2, 3])).backward()
    assert [name for name, parameter in adapted.named_parameters() if parameter.grad is None] == []


@over_builds
def test_lives_like_any_module(build: Callable[[], nn.Module]) -> None:
    adapted = adapt(build(), 4, sample=IMAGES).eval()
    nn.init.normal_(adapted.head.weight)
    expected = adapted(IMAGES)
    for copied in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        torch.testing.assert_close(copied(IMAGES), expected)
    assert list(copied.state_dict()) == list(adapted.state_dict())
    buffer = io.BytesIO()
    torch.save(adapted.state_dict(), buffer)
    buffer.seek(0)
    other = adapt(build(), 4, sample=IMAGES).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other(IMAGES), expected)


@pytest.mark.parametrize("build", [Net, vgg, vit, resnet], ids=lambda build: build.__name__)
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning", "ignore::FutureWarning")
def test_exports_and_compiles(build: Callable[[], nn.Module]) -> None:
    adapted = adapt(build(), 4, sample=IMAGES).eval()
    nn.init.normal_(adapted.head.weight)
    expected = adapted(IMAGES)
    torch.testing.assert_close(torch.export.export(adapted, (IMAGES,)).module()(IMAGES), expected)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), expected)


def test_trains_under_bf16_autocast() -> None:
    adapted = adapt(resnet(), 4, sample=IMAGES).train()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    before = adapted.head.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(adapted(IMAGES), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    assert not torch.equal(adapted.head.weight, before)


def test_a_proxy_of_the_trace_does_not_stay_on_the_model() -> None:
    adapted = adapt(Stashing(), 4, sample=IMAGES)
    stash = next(module for module in adapted.modules() if isinstance(module, Stash))
    assert not isinstance(getattr(stash, "last", None), torch.fx.Proxy)


def test_modes_that_differ_by_more_than_flags_are_both_kept() -> None:
    model = TwoWays()
    adapted = adapt(model, 4, sample=IMAGES)
    for training in (False, True):
        features = adapted.train(training).features(IMAGES)
        torch.testing.assert_close(features, model.train(training).features(IMAGES))


# ---- what is kept


def test_keeps_frozen_parts_and_modes() -> None:
    model = Net().train()
    model.first[1].eval()
    model.first[0].weight.requires_grad = False
    model.head.bias.requires_grad = False
    adapted = adapt(model, sample=IMAGES)
    assert adapted.training
    assert adapted.features.training
    assert not adapted.features.get_submodule("first.1").training
    assert not adapted.features.get_parameter("first.0.weight").requires_grad
    assert adapted.features.get_parameter("second.0.weight").requires_grad
    assert adapted.head.weight.requires_grad
    assert not adapted.head.bias.requires_grad


def test_keeps_names_dtype_and_memory_format() -> None:
    model = Net().to(torch.float64).to(memory_format=torch.channels_last)
    adapted = adapt(model, 4, sample=IMAGES.double())
    weight = adapted.features.get_parameter("first.0.weight")
    assert weight.dtype == adapted.head.weight.dtype == torch.float64
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert adapt(Net().bfloat16()).head.weight.dtype == torch.bfloat16


def test_a_kept_head_draws_no_random_number() -> None:
    model = Net()
    state = torch.get_rng_state()
    adapt(model, sample=IMAGES)
    assert torch.equal(torch.get_rng_state(), state)


def test_adapting_twice_changes_nothing() -> None:
    once = adapt(resnet(), 4, sample=IMAGES).eval()
    twice = adapt(once, sample=IMAGES)
    assert list(twice.state_dict()) == list(once.state_dict())
    torch.testing.assert_close(twice(IMAGES), once(IMAGES))
    other = adapt(once, 7, sample=IMAGES).eval()
    assert list(other.state_dict()) == list(once.state_dict())
    torch.testing.assert_close(other.features(IMAGES), once.features(IMAGES))
    assert other(IMAGES).shape == (2, 7)


# ---- options


def test_conv_channels_adds_the_papers_convolution() -> None:
    adapted = adapt(vgg(), 4, sample=IMAGES, conv_channels=16, dropout=0.3)
    assert adapted.features(torch.rand(1, 3, 64, 64)).shape == (1, 16, 16, 16)
    assert (adapted.features(IMAGES) >= 0).all()
    assert adapted.head.dropout.p == 0.3
    check_identity(adapted, IMAGES)


def test_cuts_at_a_layer_by_name_and_by_module() -> None:
    model = resnet()
    for layer in ("layer3", model.layer3):
        adapted = adapt(model, 4, sample=IMAGES, layer=layer)
        assert adapted.features(IMAGES).shape == (2, 256, 2, 2)
        assert "'layer3'" in adapted.summary


STRIDED: dict[str, Callable[[], nn.Module]] = {
    "resnet18": models.resnet18,
    "resnet50": models.resnet50,
    "densenet121": models.densenet121,
    "googlenet": partial(models.googlenet, init_weights=False),
    "mobilenet_v2": models.mobilenet_v2,
    "shufflenet": models.shufflenet_v2_x0_5,
    "squeezenet1_1": models.squeezenet1_1,
    "regnet_x": models.regnet_x_400mf,
    "convnext": models.convnext_tiny,
}


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("resnet18", "shufflenet", "squeezenet1_1") else [pytest.mark.matrix])
        for name in STRIDED
    ],
)
@torch.no_grad()
def test_finer_maps_hold_the_coarse_ones(name: str, stride: int) -> None:
    model, images = localizers.calibrated(STRIDED[name]()), localizers.pictures(1, 128)
    coarse = adapt(model, 2, sample=images).features(images)
    fine = adapt(model, 2, sample=images, output_stride=stride).features(images)
    step = (16 if name == "squeezenet1_1" else 32) // stride
    matching = fine[..., ::step, ::step][..., : coarse.shape[2], : coarse.shape[3]]
    assert matching.shape == coarse.shape
    assert (matching - coarse).abs().max() <= 1e-4 * coarse.abs().max()


@pytest.mark.parametrize(
    "build", [pytest.param(models.vgg11_bn, marks=pytest.mark.matrix), models.alexnet], ids=["vgg", "alexnet"]
)
def test_a_last_pooling_is_dropped(build: Callable[[], nn.Module]) -> None:
    model, images = build(), localizers.pictures(1, 128)
    coarse, fine = (adapt(model, 2, sample=images, output_stride=stride).eval() for stride in (None, 16))
    last = coarse.features(images)
    pool = next(module for module in reversed(list(model.features)) if isinstance(module, nn.MaxPool2d))
    torch.testing.assert_close(pool(fine.features(images)), last)


@pytest.mark.parametrize("build", [vit, swin], ids=["vit", "swin"])
def test_transformers_have_no_finer_maps(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ConfigurationError, match=r"output_stride=8 is for convolutional models; .* has attention"):
        adapt(build(), 2, sample=IMAGES, output_stride=8)


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes takes a positive integer, got 0"),
        ({"num_classes": 2.0}, "num_classes takes a positive integer, got 2.0"),
        ({"conv_channels": -1}, "conv_channels takes a positive integer, got -1"),
        ({"output_stride": 4}, "output_stride takes 8, 16 or None, got 4"),
        ({"dropout": 1.0}, "dropout takes a probability"),
        ({"layer": "layer5"}, "there is no layer 'layer5' in ResNet; did you mean 'layer4'"),
        ({"layer": "fc"}, r"'fc' gives \(2, 3\), which has no spatial positions"),
        ({"sample": torch.rand(3, 32, 32)}, "images are a floating tensor"),
    ],
)
def test_wrong_arguments_say_what_to_do(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        adapt(resnet(), **{"sample": IMAGES, **options})


def test_models_that_cannot_be_adapted_say_why() -> None:
    with pytest.raises(ConfigurationError, match="Sequential has no spatial layer"):
        adapt(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), sample=IMAGES)
    with pytest.raises(ConfigurationError, match=r"does not run on images.*Pass sample="):
        adapt(Flattening())
    with pytest.raises(ConfigurationError, match="model is a classifier"):
        adapt("resnet18")  # type: ignore[arg-type]


def test_says_when_a_trained_head_is_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            UserWarning, match=r"VGG is cut at 'features'; a new head of 3 classes replaces .* num_classes"
        ):
            adapt(vgg(), sample=IMAGES)
        adapt(vgg(), 3, sample=IMAGES)
        adapt(resnet(), sample=torch.rand(1, 3, 64, 64))
