"""Training with monitors is, bit for bit, the training without them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import lightning_interp
from lightning_interp import CAMMonitor, SaliencyMonitor, default_monitors
from lightning_interp.callbacks import Monitor
from lightning_interp.sinks import MemorySink
from tests.helpers.runs import Augmented, Net, differences, fingerprint, fit, loader, seed, steps

PUBLIC = [getattr(lightning_interp, name) for name in lightning_interp.__all__]
MONITORS: list[type[Monitor]] = [each for each in PUBLIC if isinstance(each, type) and issubclass(each, Monitor)]


class Delicate(Net):
    """Part of it is frozen, and one part is in eval mode throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1].eval()
        self.net[4].bias.requires_grad_(False)


def train(callbacks: Sequence[Any]) -> dict[str, Any]:
    seed(3)
    # Two gradients are accumulated, so that at most batches' ends there is one to be lost.
    trainer = fit(
        callbacks,
        Delicate(),
        train=loader(Augmented(20), shuffle=True),
        val=loader(Augmented(8)),
        accumulate_grad_batches=2,
    )
    return fingerprint(trainer)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What is left by a training without callbacks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = train([])
    torch.set_num_threads(threads)
    return found


def test_the_list_of_monitors_is_not_empty() -> None:
    assert len(MONITORS) >= 5


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("kind", MONITORS, ids=lambda kind: kind.__name__)
def test_a_monitor_leaves_no_trace(
    memory: MemorySink, alone: dict[str, Any], kind: type[Monitor], options: dict[str, Any]
) -> None:
    assert differences(alone, train([kind(on_error="raise", **options)])) == []
    assert len({step for step, _ in memory.records}) == (6 if options else 3)


def test_all_monitors_together_leave_no_trace(memory: MemorySink, alone: dict[str, Any]) -> None:
    monitors = [
        *default_monitors(on_error="raise"),
        CAMMonitor(method="cam", on_error="raise"),
        SaliencyMonitor(method="smoothgrad", method_options={"n_samples": 2}, on_error="raise"),
    ]
    assert differences(alone, train(monitors)) == []
    assert steps(memory, "saliency/smoothgrad") == [0, 2, 5]


class Vandal:
    """An explanation that changes what it can, and fails the second time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, model: Any, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        torch.rand(3)
        np.random.rand()
        random.random()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model(images).sum().backward()
        with torch.no_grad():
            model.net[0].weight.zero_()
            model.net[1].running_mean.fill_(7)
        model.net[0].register_forward_hook(lambda *args: None)
        model.train()
        if self.asked == 2:
            raise ValueError("no explanation today")
        return torch.zeros(len(images), *images.shape[2:])


def test_a_failing_explanation_warns_once_rests_and_leaves_no_trace(memory: MemorySink, alone: dict[str, Any]) -> None:
    vandal = Vandal()
    monitors = [*default_monitors(on_error="raise"), CAMMonitor(method=vandal, name="rash")]
    with pytest.warns(UserWarning, match="is disabled from here on") as caught:
        left = train(monitors)
    assert differences(alone, left) == []
    (warning,) = [each for each in caught if "disabled" in str(each.message)]
    for part in ("CAMMonitor('rash')", "Traceback", "ValueError: no explanation today", "on_error='raise'"):
        assert part in str(warning.message)
    assert vandal.asked == 2
    assert steps(memory, "cam-rash/Vandal") == [0]
    for tag in ("cam/gradcam", "saliency/saliency", "filters/net.0", "weights/not_finite", "norms/weight/total"):
        assert steps(memory, tag) == [0, 2, 5], tag


def test_running_statistics_are_put_back_where_an_explanation_trains_the_model(
    memory: MemorySink, alone: dict[str, Any]
) -> None:
    def method(model: Any, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        model.train()
        model(images)
        return torch.zeros(len(images), *images.shape[2:])

    assert differences(alone, train([CAMMonitor(method=method, on_error="raise")])) == []


def test_a_failing_explanation_ends_the_training_where_that_was_asked_for(memory: MemorySink) -> None:
    module = Net()
    with pytest.raises(ValueError, match="no explanation today"):
        fit([CAMMonitor(method=Vandal(), on_error="raise")], module)
    assert module.trained == 3


def draw_torch() -> None:
    torch.rand(1)


def draw_numpy() -> None:
    np.random.rand()


def draw_python() -> None:
    random.random()


@pytest.mark.parametrize("draw", [draw_torch, draw_numpy, draw_python])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end", "on_train_epoch_end"])
def test_the_comparison_notices_a_single_random_number(
    alone: dict[str, Any], draw: Callable[[], None], hook: str
) -> None:
    callback = pl.Callback()
    setattr(callback, hook, lambda *args: draw())
    assert differences(alone, train([callback])) != []


def forget_eval(trainer: Any, module: Any) -> None:
    module.net[6].eval()


def forget_hook(trainer: Any, module: Any) -> None:
    module.net[0].register_forward_hook(lambda *args: None)


def forget_gradient(trainer: Any, module: Any) -> None:
    module.net[0].weight.grad = torch.zeros_like(module.net[0].weight)


def forget_freezing(trainer: Any, module: Any) -> None:
    module.net[4].bias.requires_grad_(True)


@pytest.mark.parametrize("forget", [forget_eval, forget_hook, forget_gradient, forget_freezing])
def test_the_comparison_notices_what_is_not_put_back(alone: dict[str, Any], forget: Callable[..., None]) -> None:
    callback = pl.Callback()
    callback.on_train_epoch_end = forget  # type: ignore[method-assign]
    assert differences(alone, train([callback])) != []


def test_two_trainings_without_callbacks_are_the_same(alone: dict[str, Any]) -> None:
    assert differences(alone, train([])) == []
