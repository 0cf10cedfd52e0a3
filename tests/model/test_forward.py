from __future__ import annotations

import gc
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.locate import locate
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.trace import Trace
from tests.helpers.states import hook_count, unchanged
from tests.helpers.zoo import Net, animal

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_an_activation_in_place_does_not_overwrite_what_is_tapped(model: Net) -> None:
    for with_gradient in (False, True):
        point = locate(model, "first.1")
        with Trace.record(model, IMAGES, 0, layers={point: with_gradient}) as trace:
            assert (trace.activations(point) < 0).any()


@pytest.mark.parametrize("kind", [tuple, list, namedtuple("Pair", ["hidden", "weights"])])
def test_layers_that_return_several_things(kind: Callable[..., Any]) -> None:
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
    point = locate(model, "attend")
    with Trace.record(model, IMAGES, 1, layers={point: True}) as trace:
        assert trace.gradients(point).shape == trace.activations(point).shape == (4, 8, 5, 5)


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
    points = {locate(model, name): True for name in ("lstm", "attention")}
    with unchanged(model), Trace.record(model, IMAGES, 1, layers=points) as trace:
        for point in points:
            assert trace.raw_activations(point).shape == (4, 12, 6)
            assert trace.gradients(point).shape == trace.activations(point).shape


def test_every_call_of_a_layer_can_be_tapped() -> None:
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


# ---- cost


def test_the_graph_starts_at_the_lowest_tapped_layer(model: Net) -> None:
    requires_grad: dict[str, bool] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, output, name=name: requires_grad.update({name: output.requires_grad})
        )
    with Trace.record(
        model, IMAGES, 1, layers={locate(model, "second.0"): True, locate(model, "first"): False}
    ) as trace:
        assert trace.gradients(locate(model, "second.0")).shape == (4, 8, 5, 5)
    assert not any(value for name, value in requires_grad.items() if name.startswith("first"))
    assert requires_grad["second.1"]
    assert requires_grad["head"]
    with Trace.record(model, IMAGES, 1, layers={locate(model, "second.0"): False}) as trace:
        assert not trace.logits.requires_grad


def test_layers_below_the_lowest_tapped_one_save_nothing(model: Net) -> None:
    saved: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        Trace.record(model, IMAGES, 1, layers={locate(model, "second"): True}),
    ):
        assert not any(shape[2:] == (12, 12) for shape in saved)


def test_no_parameter_is_part_of_the_graph(model: Net) -> None:
    with Trace.record(model, IMAGES, 1, input_gradients=True) as trace:
        nodes, queue = set(), [trace.scores.grad_fn]
        while queue:
            node = queue.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                queue += [function for function, _ in node.next_functions]
        leaves = [node.variable for node in nodes if hasattr(node, "variable")]
        assert [leaf.shape for leaf in leaves] == [IMAGES.shape]


def test_attention_weights_require_a_gradient_while_the_graph_is_built() -> None:
    # Without it, torch multiplies transposed tokens by a frozen weight one position after another.
    kind = animal("vit")
    model, images = kind.model, kind.images()
    early, late = (block.self_attention.in_proj_weight for block in model.encoder.layers)  # type: ignore[union-attr]
    point = locate(model, "encoder.layers.encoder_layer_0.mlp")

    def predict(model: nn.Module, images: Tensor) -> Any:
        output = model(images)
        recorded.append((early.requires_grad, late.requires_grad))
        return output

    recorded: list[tuple[bool, bool]] = []
    with unchanged(model), preserve_state(model):
        for options in ({}, {"layers": {point: False}}, {"layers": {point: True}}, {"input_gradients": True}):
            with Trace.record(model, images, 1, predict=predict, **options) as trace:
                if options.get("input_gradients"):
                    assert trace.input_gradients().any()
            assert not early.requires_grad
            assert early.grad is None
        with pytest.raises(ConfigurationError), Trace.record(model, images, 77, input_gradients=True) as trace:
            trace.scores  # noqa: B018
        assert not late.requires_grad
        with (
            torch.autocast("cpu", torch.bfloat16),
            Trace.record(model, images, 1, predict=predict, input_gradients=True),
        ):
            pass
    quick, usual = (True, True), (False, False)
    assert recorded == [usual, usual, quick, quick, usual]
    with Trace.record(model, images, 1, layers={point: True}) as trace:
        assert trace._pass._kept[point][0].grad_fn is None  # the graph starts at the layer


# ---- cleaning up


def test_hooks_and_graph_are_gone_after_closing(model: Net) -> None:
    point = locate(model, "first")
    with unchanged(model):
        with Trace.record(model, IMAGES, 1, layers={point: True}, input_gradients=True) as trace:
            assert hook_count(model) == 1
            other = trace.with_targets(2)
            dead = [
                weakref.ref(tensor)
                for tensor in (
                    trace.logits,
                    trace._pass._kept[point][0],
                    trace.gradients(point),
                    other.gradients(point),
                )
            ]
        assert hook_count(model) == 0
    gc.collect()
    assert [reference() for reference in dead] == [None] * len(dead)  # though both are still here
    assert trace is not other


@pytest.mark.parametrize("where", ["forward", "block", "contract"])
def test_hooks_are_gone_after_errors(model: Net, where: str) -> None:
    def run(model: nn.Module, images: Tensor) -> Tensor:
        output = model(images)
        if where == "forward":
            raise ArithmeticError
        return output[:1] if where == "contract" else output

    def explain() -> None:
        with Trace.record(model, IMAGES, 1, layers={locate(model, "first"): True}, predict=run):
            assert hook_count(model) == 1
            raise ArithmeticError

    with unchanged(model), pytest.raises((ArithmeticError, ConfigurationError)):
        explain()
    assert hook_count(model) == 0


def test_passes_without_gradients_leave_an_open_one_unchanged(model: Net) -> None:
    point = locate(model, "second")
    with Trace.record(model, IMAGES, 1, layers={point: True}) as trace:
        with trace.on_images(IMAGES + 1, input_gradients=False) as other:
            assert not other.scores.requires_grad
        assert trace.gradients(point).shape == (4, 8, 5, 5)


# ---- errors


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


def test_gradients_that_were_not_requested(model: Net) -> None:
    first, second = locate(model, "first"), locate(model, "second")
    with Trace.record(model, IMAGES, 1, layers={first: True, second: False}) as trace:
        for gradient, name in (
            (lambda: trace.gradients(second), "the layer 'second'"),
            (trace.input_gradients, "the images"),
        ):
            message = f"this Trace was not opened for the gradient with respect to {name}"
            with pytest.raises(ConfigurationError, match=message):
                gradient()


def test_scores_that_do_not_depend_on_the_layer(model: Net) -> None:
    point = locate(model, "second")
    with (
        pytest.raises(ConfigurationError, match="score does not depend on the layer 'second'; choose another layer"),
        Trace.record(
            model, IMAGES, lambda output: model.other.sum((1, 2, 3)), layers={point: True}, predict=_shortcut
        ) as trace,
    ):
        trace.gradients(point)


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

    point = locate(model := Net(), None, IMAGES)
    message = "'input of mean' is a function inside a checkpointed block"
    with (
        pytest.raises(ConfigurationError, match=message),
        Trace.record(model, IMAGES, 1, layers={point: True}) as trace,
    ):
        trace.gradients(point)
    with Trace.record(model, IMAGES, 1, layers={(point := locate(model, "convolution")): True}) as trace:
        assert trace.gradients(point).any()


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
