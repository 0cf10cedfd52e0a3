"""One contract, run over everything that ``explain`` exports and over a zoo of models."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_interp import explain
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import Explainer, gradcam
from tests.helpers import references
from tests.helpers.references import properties_of
from tests.helpers.states import assert_same, unchanged, unsettle
from tests.helpers.zoo import ANIMALS, CLASSES, Animal, Checkpointed, Net, animal

EXPLAINERS = list(explain.explainers().values())
# Fewer passes where a method runs many.
FAST: dict[str, Any] = {"n_samples": 2, "n_channels": 3, "n_steps": 3, "n_masks": 4, "patch": 0.5, "stride": 0.25}
# Too many channels for a slow reference with a pass for each; test_gradient_free.py compares with pytorch-grad-cam.
WIDE = {"mobilenet_v3", "resnet"}
# So many layers that the slow reference of occlusion gets fewer patches.
DEEP = {"resnet", "squeezenet", "densenet"}
# The first model once more: what differs is the output's form, or what requires a gradient.
WRAPPED = {"object", "tuple", "one_logit_flat", "frozen"}

over_all = pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda explainer: explainer.name)
# Methods for any convolutional network; test_attention.py tests the same of the others.
over_explainers = pytest.mark.parametrize(
    "explainer",
    [explainer for explainer in EXPLAINERS if explainer.family != "attention"],
    ids=lambda explainer: explainer.name,
)
# Dynamo's warning, where it compiles a part of a model.
quiet_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
over_zoo = pytest.mark.parametrize("kind", ANIMALS, ids=lambda kind: kind.name)


def fast(explainer: Explainer, kind: Animal | None = None) -> dict[str, Any]:
    options = FAST | ({"stride": 0.5} if kind is not None and kind.name in DEEP else {})
    return {name: value for name, value in options.items() if name in explainer.options}


def impossible(explainer: Explainer, kind: Animal) -> str | None:
    """The error by which a method says that it cannot explain such a model."""
    if explainer.layer is not None and not kind.spatial:
        return r"has no spatial layer: .*name a layer that gives \(N, C, h, w\) activations, or tokens, with layer="
    return properties_of(explainer.name).refusal(kind)


def takes_any_layer(explainer: Explainer) -> bool:
    return explainer.layer is not None and not properties_of(explainer.name).classes_of_gap_head


def over_pairs(
    chosen: Callable[[Animal, int], bool], but: Callable[[Explainer, Animal], object] = impossible
) -> pytest.MarkDecorator:
    """Every explainer with every model that it can explain; the pairs that are not chosen join in the matrix only."""
    return pytest.mark.parametrize(
        ("explainer", "kind"),
        [
            pytest.param(
                explainer,
                kind,
                id=f"{explainer.name}-{kind.name}",
                marks=[] if chosen(kind, row + column) else [pytest.mark.matrix],
            )
            for row, explainer in enumerate(EXPLAINERS)
            for column, kind in enumerate(ANIMALS)
            if not but(explainer, kind)
        ],
    )


# Every explainer and every model, but only a third of the pairs.
over_a_slice = over_pairs(lambda kind, number: number % 3 == 0)
over_a_slice_with_refusals = over_pairs(lambda kind, number: number % 3 == 0, but=lambda explainer, kind: False)
# A third of the pairs with those models that are another in a wrapper.
over_most = over_pairs(lambda kind, number: number % 3 == 0 or kind.name not in WRAPPED)


def check_maps(maps: Tensor, images: Tensor, explainer: Explainer) -> None:
    assert maps.shape == (len(images), *images.shape[2:])
    assert maps.dtype == torch.float32
    assert maps.device == images.device
    assert maps.isfinite().all()
    assert not maps.requires_grad


def logits_of(kind: Animal) -> Tensor:
    """(N, K) of its images, taken out of its output by hand."""
    with torch.no_grad():
        output: Any = kind.model.eval()(kind.images())
    if isinstance(output, dict):
        output = output["logits"]
    elif not isinstance(output, Tensor):
        output = output.logits if hasattr(output, "logits") else output[0]
    return output if output.ndim == 2 else output[:, None]


def test_every_export_is_an_explainer_with_a_slow_reference() -> None:
    defined = {name for name, value in vars(explain).items() if isinstance(value, Explainer)}
    assert defined == {explainer.name for explainer in EXPLAINERS}
    assert [name for name in defined if not hasattr(references, name)] == []


@over_all
def test_maps_have_the_declared_sign(explainer: Explainer) -> None:
    kind = animal("vit" if explainer.family == "attention" else "plain")
    maps = [explainer(kind.model, kind.images(), target, **fast(explainer)) for target in range(CLASSES)]
    if explainer.has_zero:
        assert bool((torch.stack(maps) < 0).any()) is explainer.signed


@over_all
def test_more_passes_are_run_where_they_are_declared(explainer: Explainer) -> None:
    kind = animal("vit" if explainer.family == "attention" else "plain")
    passes = 0

    def predict(model: nn.Module, images: Tensor) -> Any:
        nonlocal passes
        passes += 1
        return model(images)

    many = {"n_samples": 9, "n_steps": 9, "n_channels": 3, "n_masks": 40}
    options = {name: value for name, value in many.items() if name in explainer.options}
    options |= {"layer": kind.layer} if explainer.layer else {}
    explainer(kind.model, kind.images(), 1, predict=predict, **options)
    assert (passes > 2) is explainer.perturbed


@over_all
@over_zoo
def test_explains_and_leaves_no_trace(kind: Animal, explainer: Explainer) -> None:
    model, images, options = kind.model, kind.images(), fast(explainer, kind)
    unsettle(model)
    before = images.clone()
    targets = torch.tensor([0, 1, 1 if "one_logit" in kind.name else 2])
    with unchanged(model):
        if error := impossible(explainer, kind):
            with pytest.raises(ConfigurationError, match=error):
                explainer(model, images, targets, **options)
            return
        maps = explainer(model, images, targets, **options)
    assert torch.equal(images, before)
    check_maps(maps, images, explainer)
    is_empty = properties_of(explainer.name).zero_if_linear and kind.activations == "none"
    assert bool(maps.any()) is not is_empty
    if explainer.layer is None:
        assert_same(maps, getattr(references, explainer.name)(model, images, targets, **options))
        return
    small = explainer(model, images, targets, upsample=False, **options)
    assert small.dtype == torch.float32
    resized = F.interpolate(small[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    assert_same(maps, resized, 1e-5)
    if kind.layer is not None:
        has_pass_for_each_channel = explainer.perturbed and "n_channels" not in explainer.options
        if kind.name not in WIDE or not has_pass_for_each_channel:
            assert_same(small, getattr(references, explainer.name)(model, images, targets, kind.layer, **options))
        named = explainer(model, images, targets, layer=kind.layer, upsample=False, **options)
        assert_same(small, named, 1e-5)


@over_a_slice_with_refusals
def test_leaves_no_trace_when_it_fails(kind: Animal, explainer: Explainer) -> None:
    def fail(*args: Any) -> Tensor:
        raise ArithmeticError

    model = kind.model
    unsettle(model)
    properties = properties_of(explainer.name)
    refusal = impossible(explainer, kind)  # raised before the score is computed
    if properties.classes_of_gap_head and kind.spatial:
        refusal = f"{explainer.name} explains the classes of a GAP . linear head, not a callable's scores"
    elif properties.modifies_relu and explainer.layer is not None and kind.spatial:
        refusal = None  # it computes the layer's gradient first
    predict = None
    if properties.class_agnostic:  # no score is computed: the model's pass fails
        refusal, predict = None, fail
    expected = pytest.raises(ConfigurationError, match=refusal) if refusal else pytest.raises(ArithmeticError)
    with unchanged(model), expected:
        explainer(model, kind.images(), fail, predict=predict, **fast(explainer))


@over_all
def test_a_pass_that_fails_later_leaves_no_trace(explainer: Explainer) -> None:
    kind = animal("vit" if explainer.family == "attention" else "plain")
    passes, last = 0, math.inf

    def predict(model: nn.Module, images: Tensor) -> Any:
        nonlocal passes
        passes += 1
        output = model(images)
        if passes >= last:
            raise ArithmeticError
        return output

    explainer(kind.model, kind.images(), 1, predict=predict, **fast(explainer))
    for failing in range(1, min(passes, 4) + 1):
        passes, last = 0, failing
        with unchanged(kind.model), pytest.raises(ArithmeticError):
            explainer(kind.model, kind.images(), 1, predict=predict, **fast(explainer))


@over_most
def test_chunks_change_nothing(kind: Animal, explainer: Explainer) -> None:
    model, images, targets, options = kind.model, kind.images(7), torch.arange(7) % 2, fast(explainer, kind)
    # Some of so many ReLUs are so near their kink that float32 rounds to either side.
    if kind.name in DEEP or properties_of(explainer.name).needs_double:
        model, images = copy.deepcopy(model).double(), images.double()
    whole = explainer(model, images, targets, **options)
    assert whole.shape == (7, *kind.size)
    for part in (
        explainer(model, images, targets, batch_size=3, **options),
        explainer(model, images[:1], targets[:1], **options),
    ):
        assert_same(part, whole[: len(part)], 1e-5)


@over_most
def test_predicted_classes_are_the_default(kind: Animal, explainer: Explainer) -> None:
    model, images, options = kind.model, kind.images(), fast(explainer, kind)
    predicted = logits_of(kind).argmax(1) if "one_logit" not in kind.name else (logits_of(kind)[:, 0] > 0).long()
    assert_same(explainer(model, images, **options), explainer(model, images, predicted, **options), 1e-5)


@over_a_slice
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_in_every_grad_mode(kind: Animal, explainer: Explainer, mode: type) -> None:
    model, classes, options = kind.model, [1, 1, 0], fast(explainer, kind)
    expected = explainer(model, kind.images(), torch.tensor(classes), **options)
    with mode():
        images, targets = kind.images(), torch.tensor(classes)  # inference tensors, in the one mode
        before = images.clone()
        with unchanged(model):
            maps = explainer(model, images, targets, **options)
        assert torch.equal(images, before)
        check_maps(maps, images, explainer)
    assert_same(maps, expected, 1e-5)


@over_explainers
def test_explains_a_model_made_in_inference_mode(explainer: Explainer) -> None:
    images = torch.rand(2, 3, 8, 8)
    torch.manual_seed(1)
    expected = explainer(Net(), images, 1, **fast(explainer))
    torch.manual_seed(1)
    model = Net()
    with torch.inference_mode():
        model.first[1].running_mean = torch.zeros(6)  # as a metric or a norm may rebind its buffers in validation
        model.head.weight.grad = torch.ones_like(model.head.weight)
    with unchanged(model):
        maps = explainer(model, images, 1, **fast(explainer))
    assert_same(maps, expected, 1e-5)


@over_explainers
@pytest.mark.parametrize("kind", [animal("plain"), animal("densenet")], ids=lambda kind: kind.name)
def test_works_under_autocast(kind: Animal, explainer: Explainer) -> None:
    images, targets = kind.images(), torch.tensor([0, 1, 2])
    expected = explainer(kind.model, images, targets, **fast(explainer))
    with unchanged(kind.model), torch.autocast("cpu", torch.bfloat16):
        maps = explainer(kind.model, images, targets, **fast(explainer))
    check_maps(maps, images, explainer)
    assert (maps - expected).norm() < 0.3 * expected.norm()
    assert not torch.equal(maps, expected)


@over_explainers
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.3), (torch.float64, 1e-4)])
def test_works_in_other_precisions(explainer: Explainer, dtype: torch.dtype, share: float) -> None:
    model, images = Net(), torch.rand(2, 3, 9, 9).bfloat16()  # numbers that all precisions have
    expected = explainer(model, images.float(), 1, **fast(explainer))
    model, images = copy.deepcopy(model).to(dtype), images.to(dtype)
    with unchanged(model):
        maps = explainer(model, images, 1, **fast(explainer))
    check_maps(maps, images, explainer)
    assert (maps - expected).norm() < share * expected.norm()


@over_explainers
def test_targets_come_in_every_form(explainer: Explainer) -> None:
    kind = animal("plain")
    maps = explainer(kind.model, kind.images(), torch.tensor([2, 2, 2]), **fast(explainer))
    for targets in (2, torch.tensor(2), torch.tensor([2, 2, 2], dtype=torch.int32)):
        assert torch.equal(explainer(kind.model, kind.images(), targets, **fast(explainer)), maps)
    if not properties_of(explainer.name).classes_of_gap_head:
        by_score = explainer(kind.model, kind.images(), lambda output: output[:, 2], **fast(explainer))
        assert_same(by_score, maps, 1e-5)
        chunked = explainer(kind.model, kind.images(), lambda output: output[:, 2], batch_size=2, **fast(explainer))
        assert_same(chunked, maps, 1e-5)


class Segmenter(Net):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        classes = self.head(self.features(images).movedim(1, 3)).movedim(3, 1)
        return {"out": F.interpolate(classes, images.shape[2:])}


class Detector(Net):
    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        return [{"scores": row.sigmoid(), "boxes": row.new_zeros(3, 4)} for row in super().forward(images)]


@over_explainers
@pytest.mark.parametrize(
    ("build", "score"),
    [
        pytest.param(Segmenter, lambda output: output["out"][:, 1].mean((1, 2)), id="segmentation"),
        pytest.param(Detector, lambda output: torch.stack([row["scores"].amax() for row in output]), id="detection"),
        pytest.param(partial(Net, wrap=lambda logits: logits[:, 0]), lambda values: values, id="regression"),
        pytest.param(Net, lambda vectors: F.cosine_similarity(vectors, torch.tensor([[1.0, 2, -1]])), id="embedding"),
    ],
)
def test_callables_score_what_is_no_class(
    explainer: Explainer, build: Callable[[], nn.Module], score: Callable[[Any], Tensor]
) -> None:
    if properties_of(explainer.name).classes_of_gap_head:
        return

    class Scored(nn.Module):
        """The same, with the score as its one logit."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            return score(self.net(images))[:, None]

    model, images = build(), torch.rand(3, 3, 12, 12)
    options, inside = ({"layer": "second"}, {"layer": "net.second"}) if explainer.layer else ({}, {})
    expected = explainer(Scored(model), images, 1, **inside, **fast(explainer))
    with unchanged(model):
        maps = explainer(model, images, score, **options, **fast(explainer))
    assert_same(maps, expected, 1e-5)
    assert_same(explainer(model, images, score, batch_size=2, **options, **fast(explainer)), expected, 1e-5)


@over_explainers
def test_one_logit_speaks_for_class_one_against_class_zero(explainer: Explainer) -> None:
    if not properties_of(explainer.name).linear:
        return
    kind = animal("one_logit")
    options = fast(explainer) | ({"channels": "sum"} if "channels" in explainer.options else {})
    one, zero = (explainer(kind.model, kind.images(), target, **options) for target in (1, 0))
    assert_same(one, -zero, 1e-5)


@over_explainers
def test_nothing_random_is_explained(explainer: Explainer) -> None:
    model, images = nn.Sequential(Net(), nn.Dropout(0.9)).train(), torch.rand(2, 3, 9, 9)
    options = fast(explainer) | ({"layer": "0.second"} if explainer.layer else {})
    assert torch.equal(explainer(model, images, 1, **options), explainer(model, images, 1, **options))


@over_explainers
def test_a_layer_that_follows_no_module_is_found(explainer: Explainer) -> None:
    if not takes_any_layer(explainer):
        return
    kind = animal("densenet")

    class Visible(nn.Module):
        """The same, with the functional activation as a module."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.relu = kind.model.features, nn.ReLU()
            self.classifier = kind.model.classifier

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(self.relu(self.features(images)).mean((2, 3)))

    assert_same(
        explainer(kind.model, kind.images(), 1, **fast(explainer)),
        explainer(Visible(), kind.images(), 1, layer="relu", **fast(explainer)),
        1e-5,
    )


@pytest.mark.parametrize(
    "explainer", explain.explainers("class_activation").values(), ids=lambda explainer: explainer.name
)
def test_channels_may_come_last(explainer: Explainer) -> None:
    model, images = animal("swin").model, torch.rand(2, 3, 32, 48)  # neither layer is square
    last, first = (
        explainer(model, images, 1, layer=layer, upsample=False, **fast(explainer)) for layer in ("norm", "permute")
    )
    assert last.shape == (2, 4, 6)
    assert_same(last, first, 1e-5)


@over_explainers
def test_call_index_chooses_a_call(explainer: Explainer) -> None:
    kind = animal("repeating")
    if not explainer.upsampled or not takes_any_layer(explainer):
        return
    options = {"layer": "block", "upsample": False, **fast(explainer)}
    first, last = (explainer(kind.model, kind.images(), 1, call_index=index, **options) for index in (0, -1))
    assert (first.shape[-1], last.shape[-1]) == (28, 26)


# ---- what surrounds a model in real life


class Module(pl.LightningModule):
    """Logs and updates metrics in its forward pass, and overrides train()."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.mean = torchmetrics.MeanMetric()
        self.kept = torchmetrics.CatMetric()
        self.both = torchmetrics.MetricCollection(
            [torchmetrics.Accuracy("multiclass", num_classes=CLASSES), torchmetrics.Recall("multiclass", num_classes=3)]
        )
        self.switched = 0
        self.logged: list[str] = []

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.logged.append(name)

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.extend(dictionary)

    def train(self, mode: bool = True) -> Module:
        self.switched += 1
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        self.mean.update(images.mean())
        self.kept(logits.detach().flatten())
        self.both.update(logits.detach(), logits.detach().argmax(1))
        self.log("mean", images.mean())
        self.log_dict({"a": 1, "b": 2})
        return logits


@over_explainers
@pytest.mark.parametrize("used", [False, True])
def test_a_lightning_module_logs_nothing(explainer: Explainer, used: bool) -> None:
    module = Module()
    if used:
        module(torch.rand(2, 3, 9, 9))
        module.mean.compute()
    switched, logged = module.switched, list(module.logged)
    images = torch.rand(2, 3, 9, 9)
    with unchanged(module):
        check_maps(explainer(module, images, 1, **fast(explainer)), images, explainer)
    assert (module.switched, module.logged) == (switched, logged)
    assert module.mean.update_count == module.kept.update_count == int(used)
    module(torch.rand(2, 3, 9, 9))
    assert module.both.compute() == {
        "MulticlassAccuracy": 1,
        "MulticlassRecall": module.both["MulticlassRecall"].compute(),
    }
    assert module.both["MulticlassAccuracy"].tp.sum() == 2 * (1 + used)
    assert module.logged == [*logged, "mean", "a", "b"]


@quiet_dynamo
@over_explainers
def test_compiled_models_run_eagerly_and_are_not_recompiled(explainer: Explainer) -> None:
    # Every explainer compiles anew: a forward pass in training mode, the explanation, and the same pass again.
    torch._dynamo.reset()
    torch.manual_seed(0)
    inner = Net().train()
    frames = 0

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        nonlocal frames
        frames += 1
        return graph.forward

    model = torch.compile(inner, backend=backend)
    images = torch.rand(2, 3, 9, 9)
    model(images).sum().backward()
    compiled = frames
    assert compiled > 0
    with unchanged(model):
        maps = explainer(model, images, 1, **fast(explainer))
    assert frames == compiled
    assert_same(maps, explainer(inner, images, 1, **fast(explainer)), 1e-5)
    if explainer.layer is not None:
        for layer in ("second", "_orig_mod.second", inner.second):
            assert_same(explainer(model, images, 1, layer=layer, **fast(explainer)), maps, 1e-5)
    model(images).sum().backward()
    assert frames == compiled
    torch._dynamo.reset()


@quiet_dynamo
@over_explainers
@pytest.mark.parametrize("compiled", ["in place", "inside"])
def test_compiled_parts_are_tapped(explainer: Explainer, compiled: str) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    expected = explainer(model, images := torch.rand(2, 3, 9, 9), 1, **fast(explainer))
    if compiled == "in place":
        model.compile(backend="eager")
    else:
        model.second = torch.compile(model.second, backend="eager")
    model(images)
    for layer in (None, "second") if explainer.layer else (None,):
        options = {"layer": layer} if layer else {}
        with unchanged(model):
            maps = explainer(model, images, 1, **options, **fast(explainer))
        assert_same(maps, expected, 1e-5)
    torch._dynamo.reset()


@quiet_dynamo
@pytest.mark.parametrize("fails", [False, True], ids=["after an explanation", "after a failure"])
def test_compiled_code_runs_again_afterwards(fails: bool) -> None:
    torch._dynamo.reset()
    runs = 0

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal runs
            runs += 1
            return graph.forward(*args)

        return run

    def fail(output: Tensor) -> Tensor:
        raise ArithmeticError

    model, images = torch.compile(Net().eval(), backend=backend), torch.rand(2, 3, 9, 9)
    model(images)
    once = runs
    assert once > 0
    with pytest.raises(ArithmeticError) if fails else nullcontext():
        gradcam(model, images, fail if fails else 1)
    assert runs == once
    model(images)
    assert runs == 2 * once
    torch._dynamo.reset()


@over_explainers
@pytest.mark.parametrize("layer", ["stem", "block.0", "block"])
def test_a_layer_inside_a_checkpoint(explainer: Explainer, layer: str) -> None:
    if not takes_any_layer(explainer):
        return

    class Plain(Checkpointed):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.last(self.block(self.stem(images))).mean((2, 3)))

    model, images = Checkpointed(use_reentrant=False), torch.rand(2, 3, 12, 12)
    plain = Plain(use_reentrant=False)
    plain.load_state_dict(model.state_dict())
    with unchanged(model):
        maps = explainer(model, images, 1, layer=layer, **fast(explainer))
    assert_same(maps, explainer(plain, images, 1, layer=layer, **fast(explainer)), 1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@over_explainers
def test_reentrant_checkpoints_are_refused_where_they_stand_in_the_way(explainer: Explainer) -> None:
    torch.manual_seed(0)
    model, images = Checkpointed(use_reentrant=True), torch.rand(2, 3, 12, 12)
    if explainer.family == "class_activation":
        check_maps(explainer(model, images, 1, layer="last", **fast(explainer)), images, explainer)
    if explainer.layer != "gradients" and explainer.family != "gradients":
        return
    for layer in ("stem", "block.0") if explainer.layer else (None,):
        options = {"layer": layer} if layer else {}
        with unchanged(model), pytest.raises(ConfigurationError, match="use_reentrant=False"):
            explainer(model, images, 1, **options, **fast(explainer))


@over_explainers
def test_a_model_without_forward_takes_predict(explainer: Explainer) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

    class LightningHolder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

    images = torch.rand(2, 3, 9, 9)
    for model in (Holder(), LightningHolder()):
        with unchanged(model), pytest.raises(ConfigurationError, match=r"has no forward\(images\); pass predict="):
            explainer(model, images, 1, **fast(explainer))
        maps = explainer(model, images, 1, predict=lambda model, images: model.net(images), **fast(explainer))
        assert_same(maps, explainer(model.net, images, 1, **fast(explainer)), 1e-5)


@over_explainers
def test_a_forward_that_draws_disturbs_no_stream(explainer: Explainer) -> None:
    class Drawing(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + 0 * torch.rand_like(images))

    with unchanged(model := Drawing()):
        explainer(model, torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)), 1, **fast(explainer))


@over_explainers
def test_constant_and_dead_models_give_finite_maps(explainer: Explainer) -> None:
    model = Net()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    maps = explainer(model, torch.zeros(2, 3, 9, 9), **fast(explainer))
    assert maps.isfinite().all()


# ---- misuse fails at once, and says what to do


@over_explainers
@pytest.mark.parametrize(
    ("images", "came"),
    [
        (torch.zeros(3, 8, 8), r"float32 \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"uint8 \(2, 3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"float32 \(0, 3, 8, 8\)"),
        ([torch.zeros(3, 8, 8)], "list"),
        (None, "NoneType"),
    ],
)
def test_images_that_do_not_fit(explainer: Explainer, images: Any, came: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"floating tensor \(N, C, H, W\) with at least one image, got {came}"
    ):
        explainer(Net(), images, 1)


@over_explainers
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (3, "target 3 is out of range; the model has the classes 0 to 2"),
        (-1, "target -1 is out of range"),
        (torch.tensor([0, 7]), "target 7 is out of range"),
        (torch.tensor([0, 1, 2]), "targets has 3 entries, expected one class for each of the 2 images"),
        (torch.tensor([[0], [1]]), r"targets has shape \(2, 1\), expected one class for each of the 2 images"),
        (torch.tensor([0.0, 1.0]), r"targets are class numbers \(int64\), got torch.float32"),
        (torch.tensor([True, False]), "got torch.bool"),
    ],
)
def test_targets_that_do_not_fit(explainer: Explainer, targets: Any, message: str) -> None:
    with unchanged(model := Net()), pytest.raises(ConfigurationError, match=message):
        explainer(model, torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), targets)


@over_explainers
@pytest.mark.parametrize("batch_size", [0, -1, 2.0])
def test_batch_sizes_that_do_not_fit(explainer: Explainer, batch_size: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"batch_size takes a positive integer or None, got {batch_size}"):
        explainer(Net(), torch.rand(2, 3, 8, 8), 1, batch_size=batch_size)


@over_explainers
def test_models_that_do_not_fit(explainer: Explainer) -> None:
    with pytest.raises(ConfigurationError, match=r"model is a torch.nn.Module, got a function"):
        explainer(lambda images: images, torch.rand(2, 3, 8, 8))  # type: ignore[arg-type]


@over_explainers
@pytest.mark.parametrize(
    "wrap", [lambda x: {"loss": x.sum(), "other": x}, lambda x: "logits", lambda x: [], lambda x: x.sum()]
)
def test_outputs_without_logits(explainer: Explainer, wrap: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"no logits found in the model's output, .*; expected .*otherwise pass predict="
    ):
        explainer(Net(wrap), torch.rand(2, 3, 8, 8), 0)


@over_explainers
def test_options_that_do_not_exist(explainer: Explainer) -> None:
    with pytest.raises(ConfigurationError, match=f"{explainer.name} has no option 'colour'; it takes "):
        explainer(Net(), torch.rand(2, 3, 8, 8), colour=1)


@over_explainers
def test_layers_that_do_not_fit(explainer: Explainer) -> None:
    images = torch.rand(2, 3, 8, 8)
    if explainer.layer is None:
        with pytest.raises(ConfigurationError, match=f"{explainer.name} explains pixels and takes no layer; leave"):
            explainer(Net(), images, layer="second")
        return
    call = partial(explainer, Net(), images, 1)
    with pytest.raises(ConfigurationError, match=r"there is no layer 'secnd' in Net; did you mean 'second'"):
        call(layer="secnd")
    with pytest.raises(ConfigurationError, match="the layer Conv2d is not part of Net; pass a submodule"):
        call(layer=nn.Conv2d(1, 1, 1))
    with pytest.raises(ConfigurationError, match=r"'head' gives activations \(2, 3\).*choose a layer that gives"):
        call(layer="head")


@over_all
def test_signature_and_pickle(explainer: Explainer) -> None:
    parameters = inspect.signature(explainer).parameters
    assert list(parameters)[:3] == ["model", "images", "targets"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in list(parameters.values())[3:])
    for name in ("layer", "call_index", "reshape"):
        assert (name in parameters) is (explainer.layer is not None)
    assert ("upsample" in parameters) == explainer.upsampled
    assert {"batch_size", "predict", *explainer.options} <= set(parameters)
    assert pickle.loads(pickle.dumps(explainer)) is explainer
    assert repr(explainer) == f"<explainer {explainer.name}>"
    documentation = explainer.__doc__ or ""
    parts = (".. math::", "Args:", "Returns:", "(N, H, W)", "Raises:", "Example:", ">>> ", "Reference:")
    assert [part for part in parts if part not in documentation] == []


def test_the_zoo_is_as_labelled() -> None:
    # What the other tests build on: names resolve, no class is dead, and some models see other classes in other images.
    several = set()
    for kind in ANIMALS:
        if kind.layer is not None:
            kind.model.get_submodule(kind.layer)
        logits = logits_of(kind)
        assert logits.abs().amin() > 1e-3 * logits.abs().amax(), kind.name
        if len(logits.argmax(1).unique()) > 1:
            several.add(kind.name)
    assert len(several) > 2
