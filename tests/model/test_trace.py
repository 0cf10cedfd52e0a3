from __future__ import annotations

import gc
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.hooks import HookPoint, replace, run_until
from lightning_interp.model.locate import locate, locate_features, locate_last_convolution
from lightning_interp.model.outputs import output_logits
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.trace import Trace
from tests.helpers.states import unchanged
from tests.helpers.zoo import Net, animal, swin, vgg

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Net:
    return Net()


class Counting(Net):
    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(images)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ---- what it answers


def test_answers_what_autograd_by_hand_answers(model: Net) -> None:
    site = locate(model, "second")
    with Trace.record(model, IMAGES, torch.tensor([0, 1, 2, 0]), layers={site: True}, input_gradients=True) as trace:
        got = trace.logits, trace.scores, trace.activations(site), trace.gradients(site), trace.input_gradients()
    model.eval()
    images = IMAGES.clone().requires_grad_()
    activations = model.features(images)
    logits = model.head(activations.mean((2, 3)))
    scores = logits[torch.arange(4), torch.tensor([0, 1, 2, 0])]
    gradients = torch.autograd.grad(scores.sum(), [activations, images])
    for one, other in zip(got, (logits, scores, activations, *gradients), strict=True):
        torch.testing.assert_close(one, other)


def test_an_activation_in_place_does_not_overwrite_what_is_tapped(model: Net) -> None:
    for wanted in (False, True):
        site = locate(model, "first.1")
        with Trace.record(model, IMAGES, 0, layers={site: wanted}) as trace:
            assert (trace.activations(site) < 0).any()


@pytest.mark.parametrize("kind", [tuple, list, namedtuple("Pair", ["hidden", "weights"])])
def test_layers_that_give_several_things(kind: Callable[..., Any]) -> None:
    class Attending(nn.Module):
        def forward(self, x: Tensor) -> Any:
            pair = (x * 2, None)
            return kind(*pair) if hasattr(kind, "_fields") else kind(pair)

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.attend = Attending()

        def features(self, images: Tensor) -> Tensor:
            given = self.attend(super().features(images))
            assert type(given) is kind
            return given[0]

    model = Model()
    site = locate(model, "attend")
    with Trace.record(model, IMAGES, 1, layers={site: True}) as trace:
        assert trace.gradients(site).shape == trace.activations(site).shape == (4, 8, 5, 5)


def test_lstms_and_attention_layers_can_be_tapped() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3 * 12, 6, batch_first=True)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, 2)

        def forward(self, images: Tensor) -> Tensor:
            x, _ = self.lstm(images.permute(0, 2, 1, 3).flatten(2))
            x, _ = self.attention(x, x, x)
            return self.head(x.mean(1))

    model = Model()
    sites = {locate(model, name): True for name in ("lstm", "attention")}
    with unchanged(model), Trace.record(model, IMAGES, 1, layers=sites) as trace:
        for site in sites:
            assert trace.raw_activations(site).shape == (4, 12, 6)
            assert trace.gradients(site).shape == trace.activations(site).shape


def test_every_use_of_a_layer_can_be_asked_for() -> None:
    model, images = animal("repeating").model, animal("repeating").images()
    first, last, second = (locate(model, "block", call_index=use) for use in (0, -1, 1))
    with Trace.record(model, images, 1, layers={first: True, last: True, second: True}) as trace:
        assert trace.activations(first).shape[-1] == 28
        assert torch.equal(trace.activations(last), trace.activations(second))
        assert torch.equal(trace.gradients(last), trace.gradients(second))
        torch.testing.assert_close(model.block(trace.activations(first)), trace.activations(last))
    beyond = locate(model, "block", call_index=2)
    with (
        pytest.raises(ConfigurationError, match="the layer 'block' ran 2 times; there is no call 2"),
        Trace.record(model, images, 1, layers={beyond: True}) as trace,
    ):
        trace.activations(beyond)


# ---- what it costs


def test_the_graph_starts_at_the_lowest_tapped_layer(model: Net) -> None:
    seen: dict[str, bool] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.requires_grad}))
    with Trace.record(
        model, IMAGES, 1, layers={locate(model, "second.0"): True, locate(model, "first"): False}
    ) as trace:
        assert trace.gradients(locate(model, "second.0")).shape == (4, 8, 5, 5)
    assert not any(value for name, value in seen.items() if name.startswith("first"))
    assert seen["second.1"]
    assert seen["head"]
    with Trace.record(model, IMAGES, 1, layers={locate(model, "second.0"): False}) as trace:
        assert not trace.logits.requires_grad


def test_what_is_below_the_lowest_tapped_layer_saves_nothing(model: Net) -> None:
    saved: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        Trace.record(model, IMAGES, 1, layers={locate(model, "second"): True}),
    ):
        assert not any(shape[2:] == (12, 12) for shape in saved)


def test_no_parameter_takes_part(model: Net) -> None:
    with Trace.record(model, IMAGES, 1, input_gradients=True) as trace:
        nodes, queue = set(), [trace.scores.grad_fn]
        while queue:
            node = queue.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                queue += [each for each, _ in node.next_functions]
        leaves = [node.variable for node in nodes if hasattr(node, "variable")]
        assert [leaf.shape for leaf in leaves] == [IMAGES.shape]


def test_one_forward_pass_serves_every_question() -> None:
    model = Counting()
    sites = [locate(model, "first"), locate(model, "second")]
    Counting.calls = 0
    with Trace.record(model, IMAGES, 1, layers=dict.fromkeys(sites, True), input_gradients=True) as trace:
        gradients = [trace.gradients(site) for site in sites]
        assert trace.gradients(sites[0]) is gradients[0]
        other = trace.with_targets(2)
        assert not torch.equal(other.gradients(sites[1]), gradients[1])
        assert torch.equal(trace.with_targets(torch.tensor([1, 1, 1, 1])).gradients(sites[1]), gradients[1])
        assert torch.equal(other.with_targets(1).input_gradients(), trace.input_gradients())
        assert torch.equal(other.targets, torch.full((4,), 2))
        assert torch.equal(trace.targets, torch.full((4,), 1))
    assert Counting.calls == 1
    with Trace.record(model, IMAGES, 2, layers={sites[1]: True}) as trace:
        assert torch.equal(trace.gradients(sites[1]), trace.with_targets(2).gradients(sites[1]))


def test_again_looks_at_changed_images_of_the_same_targets(model: Net) -> None:
    with (
        Trace.record(model, IMAGES, None, first_index=3) as trace,
        trace.on_images(IMAGES + 1) as other,
    ):
        assert torch.equal(other.targets, trace.logits.argmax(1))
        assert other.input_gradients().shape == IMAGES.shape
        assert other.first_index == 3
    with unchanged(model):
        pass


def test_a_look_lives_within_its_context(model: Net) -> None:
    said = []

    @contextmanager
    def context() -> Iterator[str]:
        said.append("in")
        try:
            yield "what it gives"
        finally:
            said.append("out")

    with Trace.record(model, IMAGES, 2, first_index=3) as trace:
        assert (trace.context, trace.mode, trace.requested_targets) == (None, None, 2)
        with trace.rerun_in(context, input_gradients=True) as look:
            assert (look.context, look.mode, look.requested_targets, look.first_index) == (
                context,
                "what it gives",
                2,
                3,
            )
            assert look.input_gradients().shape == IMAGES.shape
            assert said == ["in"]
    assert said == ["in", "out"]
    assert look.mode is None
    with pytest.raises(ConfigurationError, match="target 77"), Trace.record(model, IMAGES, 77, context=context) as look:
        look.scores  # noqa: B018
    assert said == ["in", "out"] * 2


def test_attention_asks_for_a_gradient_while_the_graph_is_made() -> None:
    # Without it, torch multiplies transposed tokens by a frozen weight one position after another.
    kind = animal("vit")
    model, images = kind.model, kind.images()
    early, late = (each.self_attention.in_proj_weight for each in model.encoder.layers)  # type: ignore[union-attr]
    site = locate(model, "encoder.layers.encoder_layer_0.mlp")

    def asked(model: nn.Module, images: Tensor) -> Any:
        output = model(images)
        seen.append((early.requires_grad, late.requires_grad))
        return output

    seen: list[tuple[bool, bool]] = []
    with unchanged(model), preserve_state(model):
        for options in ({}, {"layers": {site: False}}, {"layers": {site: True}}, {"input_gradients": True}):
            with Trace.record(model, images, 1, predict=asked, **options) as trace:
                if options.get("input_gradients"):
                    assert trace.input_gradients().any()
            assert not early.requires_grad
            assert early.grad is None
        with pytest.raises(ConfigurationError), Trace.record(model, images, 77, input_gradients=True) as trace:
            trace.scores  # noqa: B018
        assert not late.requires_grad
        with torch.autocast("cpu", torch.bfloat16), Trace.record(model, images, 1, predict=asked, input_gradients=True):
            pass
    quick, usual = (True, True), (False, False)
    assert seen == [usual, usual, quick, quick, usual]
    with Trace.record(model, images, 1, layers={site: True}) as trace:
        assert trace._pass._kept[site][0].grad_fn is None  # the graph starts at the layer


def test_a_flag_changes_the_way_and_the_last_layer_is_found_anew() -> None:
    class Forked(nn.Module):
        short = True

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.first(images)
            return self.head((maps if self.short else self.second(maps)).mean((2, 3)))

    model = Forked()
    model.short = True
    assert locate(model, None, IMAGES).name == "first"
    model.short = False
    assert locate(model, None, IMAGES).name == "second"


def test_a_model_that_its_layers_know_is_freed() -> None:
    model = Net()
    model.second[1].parents = [model]  # type: ignore[assignment]
    assert locate(model, None, IMAGES).module is model.second[1]
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None


# ---- what it leaves


def test_hooks_and_graph_are_gone_after_closing(model: Net) -> None:
    site = locate(model, "first")
    with unchanged(model):
        with Trace.record(model, IMAGES, 1, layers={site: True}, input_gradients=True) as trace:
            assert hooks(model) == 1
            aimed = trace.with_targets(2)
            dead = [
                weakref.ref(each)
                for each in (trace.logits, trace._pass._kept[site][0], trace.gradients(site), aimed.gradients(site))
            ]
        assert hooks(model) == 0
    gc.collect()
    assert [each() for each in dead] == [None] * len(dead)  # though both are still here
    assert trace is not aimed


@pytest.mark.parametrize("where", ["forward", "block", "contract"])
def test_hooks_are_gone_after_errors(model: Net, where: str) -> None:
    def run(model: nn.Module, images: Tensor) -> Tensor:
        output = model(images)
        if where == "forward":
            raise ArithmeticError
        return output[:1] if where == "contract" else output

    def look() -> None:
        with Trace.record(model, IMAGES, 1, layers={locate(model, "first"): True}, predict=run):
            assert hooks(model) == 1
            raise ArithmeticError

    with unchanged(model), pytest.raises((ArithmeticError, ConfigurationError)):
        look()
    assert hooks(model) == 0


def test_the_search_for_the_last_layer_leaves_no_hook_and_keeps_no_model() -> None:
    model = animal("resnet").build()
    with unchanged(model):
        locate(model, None, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    locate(model, None, torch.rand(1, 3, 64, 64), predict=lambda _, images, held=model: held(images))
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None


def test_the_search_is_made_once_for_a_model() -> None:
    model = Counting()
    Counting.calls = 0
    for _ in range(3):
        assert locate(model, None, IMAGES).name == "second.1"
    assert Counting.calls == 1
    model.second = nn.Sequential(model.second, nn.ReLU())
    assert locate(model, None, IMAGES).name == "second"
    assert Counting.calls == 2


# ---- targets


def test_targets() -> None:
    model = Net()
    with Trace.record(model, IMAGES) as trace:
        assert torch.equal(trace.targets, trace.logits.argmax(1))
        assert torch.equal(trace.scores, trace.logits.amax(1))
        assert torch.equal(trace.resolve_targets(2), torch.full((4,), 2))
        assert torch.equal(
            trace.resolve_targets(torch.tensor([0, 1, 2, 1], dtype=torch.uint8)), torch.tensor([0, 1, 2, 1])
        )
        best: Callable[[Any], Tensor] = lambda output: output.amax(1)  # noqa: E731
        assert trace.resolve_targets(best) is best
        assert torch.equal(trace.with_targets(best).scores, trace.scores)


def test_one_logit_has_two_classes() -> None:
    model = Net(classes=1)
    with Trace.record(model, IMAGES) as trace:
        assert torch.equal(trace.targets, (trace.logits[:, 0] > 0).long())
        assert (trace.scores >= 0).all()
        assert torch.equal(trace.with_targets(0).scores, -trace.with_targets(1).scores)
        with pytest.raises(ConfigurationError, match="target 2 is out of range; the model has the classes 0 to 1"):
            trace.resolve_targets(2)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (3, "target 3 is out of range; the model has the classes 0 to 2"),
        (torch.tensor([0, 1, -5, 2]), "target -5 is out of range"),
        (torch.tensor([0, 1]), r"targets has shape \(2,\), expected one class for each of the 4 images"),
        (1.5, r"targets are class numbers \(int64\), got torch.float32"),
        (True, "got torch.bool"),
        (lambda output: output, r"callable given as targets gave float32 \(4, 3\), expected scores \(4,\)"),
        (lambda output: 1.0, r"callable given as targets gave float, expected scores \(4,\)"),
        (lambda output: output[:, 0].detach(), "the explained score carries no gradient: the model computes it under"),
    ],
)
def test_targets_that_do_not_fit(model: Net, targets: Any, message: str) -> None:
    with (
        pytest.raises(ConfigurationError, match=message),
        Trace.record(model, IMAGES, targets, input_gradients=True) as trace,
    ):
        trace.input_gradients()


def test_outputs_without_classes_take_a_callable() -> None:
    model = nn.Conv2d(3, 2, 3)
    with Trace.record(model, IMAGES, lambda output: output[:, 1].mean((1, 2)), input_gradients=True) as trace:
        assert trace.input_gradients().shape == IMAGES.shape
        with pytest.raises(ConfigurationError, match=r"output \(4, 2, 10, 10\) holds no class scores .* as a callable"):
            trace.resolve_targets(1)


# ---- errors that help


def test_layers_that_cannot_be_tapped(model: Net) -> None:
    model.unused, model.strings = nn.ReLU(), nn.Identity()
    with (
        pytest.raises(ConfigurationError, match="the layer 'unused' did not run in the model's forward pass; choose"),
        Trace.record(model, IMAGES, layers={locate(model, "unused"): True}),
    ):
        pass

    def run(model: Any, images: Tensor) -> Tensor:
        model.strings("text")
        return model(images)

    with (
        pytest.raises(ConfigurationError, match="the layer 'strings' gives str, not a tensor; choose another layer"),
        Trace.record(model, IMAGES, layers={locate(model, "strings"): False}, predict=run),
    ):
        pass


def test_questions_that_it_was_not_opened_for(model: Net) -> None:
    first, second = locate(model, "first"), locate(model, "second")
    with Trace.record(model, IMAGES, 1, layers={first: True, second: False}) as trace:
        for ask, name in (
            (lambda: trace.gradients(second), "the layer 'second'"),
            (trace.input_gradients, "the images"),
        ):
            with pytest.raises(ConfigurationError, match=f"this Trace was not opened for the gradient towards {name}"):
                ask()


def test_scores_that_depend_on_nothing(model: Net) -> None:
    site = locate(model, "second")
    with (
        pytest.raises(ConfigurationError, match="score does not depend on the layer 'second'; choose another layer"),
        Trace.record(
            model, IMAGES, lambda output: model.other.sum((1, 2, 3)), layers={site: True}, predict=_shortcut
        ) as trace,
    ):
        trace.gradients(site)


def _shortcut(model: Any, images: Tensor) -> Tensor:
    model.other = images.clone().requires_grad_()
    return model(images)


def test_functions_inside_checkpointed_blocks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def block(self, images: Tensor) -> Tensor:
            return self.head(self.convolution(images).tanh().mean((2, 3)).tanh())

        def forward(self, images: Tensor) -> Tensor:
            return checkpoint(self.block, images, use_reentrant=False)

    site = locate(model := Net(), None, IMAGES)
    message = "'input of mean' is a function inside a checkpointed block"
    with pytest.raises(ConfigurationError, match=message), Trace.record(model, IMAGES, 1, layers={site: True}) as trace:
        trace.gradients(site)
    with Trace.record(model, IMAGES, 1, layers={(site := locate(model, "convolution")): True}) as trace:
        assert trace.gradients(site).any()


def test_layers_under_no_grad(model: Net) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"'second' runs without gradients inside .*\(torch.no_grad"),
        Trace.record(
            model, IMAGES, 1, layers={locate(model, "second"): True}, predict=torch.no_grad()(lambda m, x: m(x))
        ),
    ):
        pass


def test_outputs_of_another_length(model: Net) -> None:
    with (
        pytest.raises(ConfigurationError, match="the model gave 1 outputs for 4 images; expected one for each"),
        Trace.record(model, IMAGES, predict=lambda model, images: model(images)[:1]) as trace,
    ):
        trace.logits  # noqa: B018


def test_an_error_of_the_users_own_is_not_disguised() -> None:
    class Unfinished(Net):
        def forward(self, images: Tensor) -> Tensor:
            raise NotImplementedError("soon")

    with pytest.raises(NotImplementedError, match="soon"), Trace.record(Unfinished(), IMAGES):
        pass


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (torch.zeros(2, 5), (2, 5)),
        (torch.zeros(2), (2, 1)),
        ({"a": torch.zeros(2, 1), "logits": torch.zeros(2, 5)}, (2, 5)),
        ({"out": torch.zeros(2, 5), "aux": torch.zeros(2, 4)}, (2, 5)),
        ({"anything": torch.zeros(2, 5), "loss": None}, (2, 5)),
        ((torch.zeros(2, 5), torch.zeros(2, 4)), (2, 5)),
        ([None, torch.zeros(2, 5)], (2, 5)),
        (namedtuple("Output", ["aux", "logits"])(torch.zeros(2, 4), torch.zeros(2, 5)), (2, 5)),
    ],
)
def test_logits_are_found_in_outputs(output: Any, shape: tuple[int, ...]) -> None:
    assert output_logits(output).shape == shape


# ---- layer=None


def alexnet() -> nn.Module:
    return models.alexnet(num_classes=3)


def regnet() -> nn.Module:
    with torch.device("cpu"):  # its builder computes widths with tensors
        return models.regnet_y_400mf(num_classes=3).to("meta")


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(200, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "size", "name"),
    [
        (models.resnet18, 64, "layer4"),
        (models.resnext50_32x4d, 64, "layer4"),
        (vgg, 64, "features"),
        (vgg, 16, "features"),
        (models.vgg11, 64, "features"),
        (alexnet, 96, "features"),
        (alexnet, 64, "features"),
        (models.densenet121, 64, "input of adaptive_avg_pool2d"),
        (models.squeezenet1_1, 64, "classifier.2"),
        (models.mobilenet_v2, 64, "features"),
        (models.mobilenet_v3_small, 64, "features"),
        (models.efficientnet_b0, 64, "features"),
        (models.shufflenet_v2_x0_5, 64, "conv5"),
        (models.mnasnet0_5, 64, "layers"),
        (regnet, 64, "trunk_output"),
        (models.convnext_tiny, 64, "features"),
        (models.googlenet, 64, "inception5b"),
        (models.inception_v3, 107, "Mixed_7c"),
        (models.swin_t, 64, "permute"),
        (models.maxvit_t, 224, "blocks.3"),
        (swin, 32, "permute"),
        (lenet, 32, "5"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_the_last_spatial_layer_is_found(build: Callable[[], nn.Module], size: int, name: str) -> None:
    # Shapes tell it, so no value is ever computed.
    with torch.device("meta"):
        site = locate(build(), None, torch.empty(2, 3, size, size))
    assert site.name == name


class FlattensTwice(nn.Module):
    """Calls the function that its maps enter on something else, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 36, 2)
        self.pixels = nn.Linear(3 * 64, 2)

    def forward(self, images: Tensor) -> Tensor:
        before = images.flatten(1)
        maps = self.head((2 * self.convolution(images)).flatten(1))
        return maps + self.pixels(before) + self.pixels(images.flatten(1))


def test_a_function_called_before_and_on_the_images_after_is_no_obstacle() -> None:
    model, images = FlattensTwice(), torch.rand(2, 3, 8, 8)
    site = locate(model, None, images)
    assert (site.module, site.call_index) == (None, 1)
    with Trace.record(model, images, layers={site: True}) as trace:
        torch.testing.assert_close(trace.activations(site), 2 * model.convolution(images))
        assert trace.gradients(site).shape == (2, 4, 6, 6)


def test_a_functional_activation_before_the_pooling_is_tapped() -> None:
    model, images = animal("densenet").model, animal("densenet").images()
    site = locate(model, None, images)
    with Trace.record(model, images, 1, layers={site: True}) as trace:
        expected = model.features(images).relu()
        assert torch.equal(trace.activations(site), expected)
        assert trace.gradients(site).shape == expected.shape
    assert site.module is None


def test_functional_layers_of_a_flattening_net_are_tapped() -> None:
    model, images = animal("flattening").model, animal("flattening").images()
    site = locate(model, None, images)
    with Trace.record(model, images, 1, layers={site: True}) as trace:
        assert trace.activations(site).shape == (3, 8, 5, 5)
        logits = model.fc2(model.fc1(trace.activations(site).flatten(1)).relu())
        torch.testing.assert_close(logits, trace.logits)


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.AvgPool2d(8), nn.Flatten()])
def test_pooling_comes_in_many_kinds(pool: nn.Module) -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    model = nn.Sequential(body, pool, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 10, 10))
    assert locate(model, None, torch.rand(2, 3, 10, 10)).name == "0"


@pytest.mark.parametrize("take", ["mean", "sum", "amax", "logsumexp", "view", "reshape", "chained"])
def test_pooling_by_methods(take: str) -> None:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda x: x.mean([2, 3]),
        "sum": lambda x: x.sum((2, 3)),
        "amax": lambda x: x.amax(dim=(-2, -1)),
        "logsumexp": lambda x: x.logsumexp((2, 3)),
        "view": lambda x: x.view(len(x), 8, -1).mean(-1),
        "reshape": lambda x: x.reshape(len(x), 8, -1).mean(-1),
        "chained": lambda x: x.mean(3).mean(2),
    }

    class Model(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(ways[take](self.features(images)))

    assert locate(Model(), None, IMAGES).name == "second.1"  # its dropout does nothing


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: animal("mlp").model, "Sequential has no spatial layer: no convolution's output .*name a layer that"),
        (
            lambda: models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2),
            r"output of LRASPP is itself spatial, float32 \(1, 2, 32, 32\).*name a layer that",
        ),
    ],
    ids=["mlp", "segmentation"],
)
def test_models_without_a_final_pooling(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        locate(build(), None, torch.rand(2, 3, 32, 32))


def test_searching_needs_images(model: Net) -> None:
    with pytest.raises(ConfigurationError, match="to find the last spatial layer, locate needs images"):
        locate(model)
    assert locate(model, "first") == HookPoint("first", model.first)


# ---- what a model gives in place of what it gave


def test_replacing_changes_what_passes_and_goes_again(model: Net) -> None:
    model.eval()
    features, expected = model.features(IMAGES), model(IMAGES)
    with unchanged(model), replace(locate(model, "first"), lambda tensor: 0 * tensor):
        torch.testing.assert_close(model(IMAGES), model(0 * IMAGES)[:1].expand(4, -1))
    with replace(locate(model, "second"), lambda tensor: 2 * tensor):
        torch.testing.assert_close(model(IMAGES), model.head(2 * features.mean((2, 3))))
    assert torch.equal(model(IMAGES), expected)
    assert hooks(model) == 0


def test_replacing_goes_again_after_errors(model: Net) -> None:
    def fail(tensor: Tensor) -> Tensor:
        raise ArithmeticError

    model.eval()
    with unchanged(model), pytest.raises(ArithmeticError), replace(locate(model, "first"), fail):
        model(IMAGES)
    assert hooks(model) == 0


def test_replacing_what_enters_a_function() -> None:
    model, images = animal("densenet").model.eval(), animal("densenet").images()
    with unchanged(model), replace(locate(model, None, images), lambda tensor: tensor + 1):
        expected = model.classifier(model.features(images).relu().mean((2, 3)) + 1)
        torch.testing.assert_close(model(images), expected)


def test_replacing_one_of_several_uses() -> None:
    model, images = animal("repeating").model.eval(), animal("repeating").images()
    with replace(locate(model, "block", call_index=0), lambda tensor: 0 * tensor):
        got = model(images)
    torch.testing.assert_close(got, model.head(model.block(0 * model.block(model.stem(images))).mean((2, 3))))


@pytest.mark.parametrize("kind", [tuple, list])
def test_replacing_the_tensor_among_several_things(kind: Callable[..., Any]) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return kind((x, "text"))

    model = Several()
    with replace(HookPoint("", model), lambda tensor: tensor + 1):
        got = model(torch.zeros(2))
    assert type(got) is kind
    assert (got[0].tolist(), got[1]) == ([1, 1], "text")


@pytest.mark.parametrize("name", ["first", "second"])
def test_run_until_stops_where_it_is_told(model: Net, name: str) -> None:
    ran = []
    model.eval()
    for each, module in model.named_children():
        module.register_forward_hook(lambda module, args, output, each=each: ran.append(each))
    got = run_until(model, IMAGES, locate(model, name))
    assert "head" not in ran
    expected = model.first(IMAGES) if name == "first" else model.features(IMAGES)
    torch.testing.assert_close(got, expected)
    assert got.requires_grad
    assert hooks(model) == 3  # the test's own


def test_run_until_a_function() -> None:
    model, images = animal("densenet").model.eval(), animal("densenet").images()
    with unchanged(model):
        got = run_until(model, images, locate(model, None, images))
    torch.testing.assert_close(got, model.features(images).relu())


def test_run_until_what_never_comes(model: Net) -> None:
    model.unused = nn.ReLU()
    with pytest.raises(ConfigurationError, match="the layer 'unused' did not run in the model's forward pass; choose"):
        run_until(model, IMAGES, locate(model, "unused"))
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("build", "name", "shape"),
    [
        (lambda: animal("plain").model, "second.1", (1, 8, 15, 15)),
        (lambda: animal("vit").model, "encoder", (1, 17, 8)),
        (lambda: animal("timm_vit").model, "norm", (1, 17, 8)),
        (lambda: animal("swin").model, "permute", (1, 16, 4, 4)),
    ],
    ids=["plain", "vit", "timm_vit", "swin"],
)
def test_the_features_that_enter_the_head_are_found(
    build: Callable[[], nn.Module], name: str, shape: tuple[int, ...]
) -> None:
    # Of a transformer: the tokens of which the first is taken, not those that enter the last attention.
    model, images = build(), torch.rand(2, 3, 32, 32)
    site = locate_features(model, images)
    assert site.name == name
    assert run_until(model.eval(), images[:1], site).shape == shape


def test_features_that_are_not_there() -> None:
    with pytest.raises(ConfigurationError, match=r"Sequential has no spatial layer: .*name a layer that"):
        locate_features(animal("mlp").model, torch.rand(2, 3, 32, 32))


def test_what_enters_the_last_convolution_is_found() -> None:
    model, images = animal("squeezenet").model.eval(), animal("squeezenet").images()
    with unchanged(model):
        site = locate_last_convolution(model, images)
    assert site.name == "input of classifier.1"
    torch.testing.assert_close(run_until(model, images, site), model.features(images))
    plain = animal("plain")
    site = locate_last_convolution(plain.model, plain.images())
    assert site.name == "input of second.0"
    torch.testing.assert_close(run_until(plain.model.eval(), plain.images(), site), plain.model.first(plain.images()))


# ---- what a look tells of other images and other activations


@pytest.mark.parametrize("wanted", [False, True])
def test_other_tensors_in_place_of_an_images_own(model: Net, wanted: bool) -> None:
    site, others = locate(model, "second"), torch.rand(5, 8, 5, 5)
    before = others.clone()
    with unchanged(model), Trace.record(model, IMAGES, torch.tensor([0, 1, 2, 0]), layers={site: wanted}) as trace:
        for row, target in enumerate([0, 1, 2, 0]):
            expected = model.head(others.mean((2, 3)))[:, target]
            torch.testing.assert_close(trace.scores_with_patched(site, others, row), expected)
        own = trace.scores_with_patched(site, trace.raw_activations(site)[2:3], 2)
        torch.testing.assert_close(own, trace.scores[2:3].detach())
        by_score = trace.with_targets(lambda output: output.amax(1)).scores_with_patched(site, others, 1)
        torch.testing.assert_close(by_score, model.head(others.mean((2, 3))).amax(1))
        if wanted:
            assert trace.gradients(site).shape == (4, 8, 5, 5)  # its own graph is whole
    assert torch.equal(others, before)


def test_models_that_count_their_images_are_run_with_as_many() -> None:
    class Counting(Net):
        seen: list[int]

        def forward(self, images: Tensor) -> Tensor:
            self.seen.append(len(images))
            return self.head(self.features(images).reshape(len(images), 8, -1).mean(2))

    model = Counting()
    model.seen = []
    site, others = locate(model, "second"), torch.rand(21, 8, 5, 5)
    with Trace.record(model, IMAGES, 1, layers={site: False}) as trace:
        got = trace.scores_with_patched(site, others, 0)
        torch.testing.assert_close(got, model.head(others.mean((2, 3)))[:, 1])
        assert model.seen == [4, 1, 16, 5]  # no more at once than memory is made for


def test_the_last_of_several_uses_is_replaced() -> None:
    model, images = animal("repeating").model, animal("repeating").images()
    for use in (-1, 1):
        site = locate(model, "block", call_index=use)
        with Trace.record(model, images, 1, layers={site: False}) as trace:
            zeros = torch.zeros_like(trace.raw_activations(site)[:1])
            torch.testing.assert_close(trace.scores_with_patched(site, zeros, 0), model.head.bias[1:2])


def test_an_error_of_the_models_own_comes_through(model: Net) -> None:
    site = locate(model, "second")

    def predict(model: nn.Module, images: Tensor) -> Tensor:
        if broken:
            raise ArithmeticError
        return model(images)

    broken = False
    with unchanged(model), Trace.record(model, IMAGES, 1, layers={site: False}, predict=predict) as trace:
        broken = True
        with pytest.raises(ArithmeticError):
            trace.scores_with_patched(site, torch.rand(5, 8, 5, 5, generator=torch.Generator().manual_seed(0)), 0)
        broken = False
        with pytest.raises(ConfigurationError, match="the model gave 2 outputs for 5 tensors at 'second'"):
            Trace.scores_with_patched(_halved(trace), site, torch.ones(5, 8, 5, 5), 0)


def _halved(trace: Trace) -> Trace:
    other = trace.with_targets(1)
    other._pass.predict = lambda model, images: model(images)[:2]
    return other


def test_passes_without_gradients_leave_an_open_look_alone(model: Net) -> None:
    site = locate(model, "second")
    with Trace.record(model, IMAGES, 1, layers={site: True}) as trace:
        with trace.on_images(IMAGES + 1, input_gradients=False) as other:
            assert not other.scores.requires_grad
        assert trace.gradients(site).shape == (4, 8, 5, 5)


def test_a_site_can_say_how_its_places_are_ordered(model: Net) -> None:
    site = HookPoint("second", model.second, reshape=lambda tensor: tensor.mT)
    with Trace.record(model, IMAGES, 1, layers={site: True, locate(model, "second"): True}) as trace:
        plain = locate(model, "second")
        assert torch.equal(trace.activations(site), trace.activations(plain).mT)
        assert torch.equal(trace.gradients(site), trace.gradients(plain).mT)
        assert torch.equal(trace.raw_activations(site), trace.activations(plain))
