from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.locate import locate
from lightning_interp.model.trace import Trace
from tests.helpers.states import unchanged
from tests.helpers.zoo import CountingNet, Net, animal

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_the_tensors_are_those_of_autograd(model: Net) -> None:
    point = locate(model, "second")
    with Trace.record(model, IMAGES, torch.tensor([0, 1, 2, 0]), layers={point: True}, input_gradients=True) as trace:
        got = trace.logits, trace.scores, trace.activations(point), trace.gradients(point), trace.input_gradients()
    model.eval()
    images = IMAGES.clone().requires_grad_()
    activations = model.features(images)
    logits = model.head(activations.mean((2, 3)))
    scores = logits[torch.arange(4), torch.tensor([0, 1, 2, 0])]
    gradients = torch.autograd.grad(scores.sum(), [activations, images])
    for one, other in zip(got, (logits, scores, activations, *gradients), strict=True):
        torch.testing.assert_close(one, other)


def test_one_forward_pass_serves_all_layers_and_targets() -> None:
    model = CountingNet()
    points = [locate(model, "first"), locate(model, "second")]
    CountingNet.calls = 0
    with Trace.record(model, IMAGES, 1, layers=dict.fromkeys(points, True), input_gradients=True) as trace:
        gradients = [trace.gradients(point) for point in points]
        assert trace.gradients(points[0]) is gradients[0]
        other = trace.with_targets(2)
        assert not torch.equal(other.gradients(points[1]), gradients[1])
        assert torch.equal(trace.with_targets(torch.tensor([1, 1, 1, 1])).gradients(points[1]), gradients[1])
        assert torch.equal(other.with_targets(1).input_gradients(), trace.input_gradients())
        assert torch.equal(other.targets, torch.full((4,), 2))
        assert torch.equal(trace.targets, torch.full((4,), 1))
    assert CountingNet.calls == 1
    with Trace.record(model, IMAGES, 2, layers={points[1]: True}) as trace:
        assert torch.equal(trace.gradients(points[1]), trace.with_targets(2).gradients(points[1]))


def test_another_pass_on_perturbed_images_keeps_the_targets(model: Net) -> None:
    with (
        Trace.record(model, IMAGES, None, first_index=3) as trace,
        trace.on_images(IMAGES + 1) as other,
    ):
        assert torch.equal(other.targets, trace.logits.argmax(1))
        assert other.input_gradients().shape == IMAGES.shape
        assert other.first_index == 3
    with unchanged(model):
        pass


def test_a_pass_runs_within_its_context(model: Net) -> None:
    events = []

    @contextmanager
    def context() -> Iterator[str]:
        events.append("enter")
        try:
            yield "its value"
        finally:
            events.append("exit")

    with Trace.record(model, IMAGES, 2, first_index=3) as trace:
        assert (trace.context, trace.mode, trace.requested_targets) == (None, None, 2)
        with trace.rerun_in(context, input_gradients=True) as rerun:
            assert (rerun.context, rerun.mode, rerun.requested_targets, rerun.first_index) == (
                context,
                "its value",
                2,
                3,
            )
            assert rerun.input_gradients().shape == IMAGES.shape
            assert events == ["enter"]
    assert events == ["enter", "exit"]
    assert rerun.mode is None
    with (
        pytest.raises(ConfigurationError, match="target 77"),
        Trace.record(model, IMAGES, 77, context=context) as rerun,
    ):
        rerun.scores  # noqa: B018
    assert events == ["enter", "exit"] * 2


def test_a_point_can_reshape_its_tensor(model: Net) -> None:
    point = HookPoint("second", model.second, reshape=lambda tensor: tensor.mT)
    with Trace.record(model, IMAGES, 1, layers={point: True, locate(model, "second"): True}) as trace:
        plain = locate(model, "second")
        assert torch.equal(trace.activations(point), trace.activations(plain).mT)
        assert torch.equal(trace.gradients(point), trace.gradients(plain).mT)
        assert torch.equal(trace.raw_activations(point), trace.activations(plain))


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


# ---- patched layers


@pytest.mark.parametrize("with_gradient", [False, True])
def test_scores_with_other_tensors_as_a_layers_output(model: Net, with_gradient: bool) -> None:
    point, others = locate(model, "second"), torch.rand(5, 8, 5, 5)
    before = others.clone()
    with (
        unchanged(model),
        Trace.record(model, IMAGES, torch.tensor([0, 1, 2, 0]), layers={point: with_gradient}) as trace,
    ):
        for row, target in enumerate([0, 1, 2, 0]):
            expected = model.head(others.mean((2, 3)))[:, target]
            torch.testing.assert_close(trace.scores_with_patched(point, others, row), expected)
        unchanged_scores = trace.scores_with_patched(point, trace.raw_activations(point)[2:3], 2)
        torch.testing.assert_close(unchanged_scores, trace.scores[2:3].detach())
        by_score = trace.with_targets(lambda output: output.amax(1)).scores_with_patched(point, others, 1)
        torch.testing.assert_close(by_score, model.head(others.mean((2, 3))).amax(1))
        if with_gradient:
            assert trace.gradients(point).shape == (4, 8, 5, 5)  # the graph of the pass is still complete
    assert torch.equal(others, before)


def test_models_that_count_their_images_run_on_as_many_copies() -> None:
    class Counting(Net):
        counts: list[int]

        def forward(self, images: Tensor) -> Tensor:
            self.counts.append(len(images))
            return self.head(self.features(images).reshape(len(images), 8, -1).mean(2))

    model = Counting()
    model.counts = []
    point, others = locate(model, "second"), torch.rand(21, 8, 5, 5)
    with Trace.record(model, IMAGES, 1, layers={point: False}) as trace:
        got = trace.scores_with_patched(point, others, 0)
        torch.testing.assert_close(got, model.head(others.mean((2, 3)))[:, 1])
        assert model.counts == [4, 1, 16, 5]  # at most 16 copies in one pass


def test_the_last_of_several_calls_is_patched() -> None:
    model, images = animal("repeating").model, animal("repeating").images()
    for index in (-1, 1):
        point = locate(model, "block", call_index=index)
        with Trace.record(model, images, 1, layers={point: False}) as trace:
            zeros = torch.zeros_like(trace.raw_activations(point)[:1])
            torch.testing.assert_close(trace.scores_with_patched(point, zeros, 0), model.head.bias[1:2])


def test_an_error_of_the_model_is_raised_unchanged(model: Net) -> None:
    point = locate(model, "second")

    def predict(model: nn.Module, images: Tensor) -> Tensor:
        if broken:
            raise ArithmeticError
        return model(images)

    broken = False
    with unchanged(model), Trace.record(model, IMAGES, 1, layers={point: False}, predict=predict) as trace:
        broken = True
        with pytest.raises(ArithmeticError):
            trace.scores_with_patched(point, torch.rand(5, 8, 5, 5, generator=torch.Generator().manual_seed(0)), 0)
        broken = False
        with pytest.raises(ConfigurationError, match="the model gave 2 outputs for 5 tensors at 'second'"):
            Trace.scores_with_patched(_halved(trace), point, torch.ones(5, 8, 5, 5), 0)


def _halved(trace: Trace) -> Trace:
    other = trace.with_targets(1)
    other._pass.predict = lambda model, images: model(images)[:2]
    return other


def test_an_error_that_is_not_about_shapes_is_raised_by_the_first_run(model: Net) -> None:
    point, runs = locate(model, "second"), 0

    def predict(model: nn.Module, images: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs > 1:
            raise RuntimeError("the driver is gone")
        return model(images)

    with (
        unchanged(model),
        Trace.record(model, IMAGES, 1, layers={point: False}, predict=predict) as trace,
        pytest.raises(RuntimeError, match="the driver is gone"),
    ):
        trace.scores_with_patched(point, torch.ones(5, 8, 5, 5), 0)
    assert runs == 2


@pytest.mark.parametrize(
    "count",
    [
        lambda tensor, n: tensor.view(n, 8, 5, 5),
        lambda tensor, n: torch.cat([tensor, torch.zeros(n, 1, 5, 5)], 1)[:, :8],
        lambda tensor, n: torch.zeros(n, 8, 5, 5).add_(tensor),
        lambda tensor, n: torch.stack([tensor, torch.zeros(n, 8, 5, 5)])[0],
        lambda tensor, n: torch.bmm(tensor.flatten(2), torch.eye(25).expand(n, 25, 25)).view(-1, 8, 5, 5),
        lambda tensor, n: tensor.split([n])[0],
        lambda tensor, n: tensor[:n],
    ],
    ids=["view", "cat", "in place", "stack", "bmm", "split", "one output"],
)
def test_a_model_may_count_its_images_in_any_way(count: Callable[[Tensor, int], Tensor]) -> None:
    class Model(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(count(self.features(images), len(images)).mean((2, 3)))

    model = Model()
    point, others = locate(model, "second"), torch.rand(5, 8, 5, 5)
    with Trace.record(model, IMAGES, 1, layers={point: False}) as trace:
        scores = trace.scores_with_patched(point, others, 0)
    torch.testing.assert_close(scores, model.head(others.mean((2, 3)))[:, 1].detach())
