"""When monitors look: each rule alone, several at once, and what may not be written twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_interp import (
    CAMMonitor,
    ConfigurationError,
    FilterMonitor,
    NormMonitor,
    SaliencyMonitor,
    WeightHistogramMonitor,
)
from lightning_interp.sinks import MemorySink
from tests.helpers.runs import Net, dataset, fit, loader, steps, tags

WEIGHTS = "weights/not_finite"


def watch(**options: Any) -> WeightHistogramMonitor:
    return WeightHistogramMonitor(parameters="net.0.*", on_error="raise", **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Three batches an epoch, four epochs, which end at the steps 2, 5, 8 and 11.
        ({}, [0, 2, 5, 8, 11]),
        ({"at_start": False}, [2, 5, 8, 11]),
        ({"every_n_epochs": 2}, [0, 5, 11]),
        ({"every_n_epochs": 5}, [0]),
        ({"at_epochs": [0, 3, 9]}, [0, 2, 11]),
        ({"at_epochs": [1], "at_start": False}, [5]),
        ({"every_n_train_steps": 5}, [0, 4, 9]),
        ({"every_n_train_steps": 4, "at_start": False}, [3, 7, 11]),
        ({"every_n_train_steps": 100}, [0]),
    ],
)
def test_each_rule(memory: MemorySink, options: dict[str, Any], expected: list[int]) -> None:
    fit([watch(**options)], max_epochs=4)
    assert steps(memory, WEIGHTS) == expected


def test_steps_are_optimiser_steps_under_accumulation(memory: MemorySink) -> None:
    # Six batches an epoch are three steps; Lightning counts x in steps as well.
    fit([watch(every_n_train_steps=2, at_start=False)], train=loader(dataset(24)), accumulate_grad_batches=2)
    assert steps(memory, WEIGHTS) == [1, 3, 5]


def test_a_short_accumulation_at_the_end_of_an_epoch_is_a_step(memory: MemorySink) -> None:
    monitors = [watch(every_n_train_steps=2, at_start=False), watch(at_start=False, name="epochs")]
    trainer = fit(monitors, train=loader(dataset(12)), accumulate_grad_batches=2)
    assert trainer.global_step == 4
    assert steps(memory, WEIGHTS) == [1, 3]
    assert steps(memory, "weights-epochs/not_finite") == [1, 3]


class Pair(Net):
    """Two optimisers, one for each half, stepped by hand."""

    def __init__(self) -> None:
        super().__init__(plain=True)
        self.automatic_optimization = False
        self.gradient: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
        self.gradient = self.net[7].weight.grad.clone()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[:3].parameters(), 0.1), torch.optim.SGD(self.net[3:].parameters(), 0.1)]


def test_manual_optimisation_with_two_optimisers(memory: MemorySink) -> None:
    module = Pair()
    monitors = [
        watch(every_n_train_steps=4, at_start=False),
        NormMonitor(at_start=False, on_error="raise"),
        WeightHistogramMonitor(name="all", gradients=True, at_start=False, on_error="raise"),
    ]
    trainer = fit(monitors, module)
    assert trainer.global_step == 12
    # Steps 4, 8 and 12 are the second optimiser's in the batches 1, 3 and 5.
    assert steps(memory, WEIGHTS) == [1, 3, 5]
    for layer in ("net.0", "net.3", "net.7", "total"):
        assert steps(memory, f"norms/gradient/{layer}") == steps(memory, f"norms/update_ratio/{layer}") == [2, 5]
    (last,) = [r for step, r in memory.records if step == 5 and getattr(r, "tag", "") == "gradients-all/net.7.weight"]
    assert module.gradient is not None
    assert last.total == pytest.approx(float(module.gradient.sum()), rel=1e-4, abs=1e-7)


def test_several_schedules_at_once(memory: MemorySink) -> None:
    monitors = [
        CAMMonitor(probe=2, at_epochs=[2], on_error="raise"),
        SaliencyMonitor(probe=2, every_n_epochs=2, at_start=False, on_error="raise"),
        FilterMonitor(every_n_train_steps=7, on_error="raise"),
        NormMonitor(on_error="raise"),
        watch(at_epochs=[0], at_start=False),
    ]
    fit(monitors, max_epochs=4)
    assert steps(memory, "cam/gradcam") == [0, 8]
    assert steps(memory, "saliency/saliency") == [5, 11]
    assert steps(memory, "filters/net.0") == [0, 6]
    assert steps(memory, "norms/weight/total") == [0, 2, 5, 8, 11]
    assert steps(memory, "norms/gradient/total") == [2, 5, 8, 11]
    assert steps(memory, WEIGHTS) == [2]


def test_several_of_a_class_are_told_apart_by_name(memory: MemorySink) -> None:
    monitors = [
        CAMMonitor(probe=2, at_epochs=[0]),
        CAMMonitor(probe=2, at_epochs=[0], name="label", target="label"),
        CAMMonitor(probe=2, at_epochs=[0], method="cam"),
        FilterMonitor(layers=["net.0"]),
        FilterMonitor(layers=["net.4"], name="deep"),
        NormMonitor(),
        NormMonitor(name="largest", ord=float("inf")),
    ]
    fit(monitors, max_epochs=1)
    assert {"cam/gradcam", "cam-label/gradcam", "cam/cam", "filters/net.0", "filters-deep/net.4"} <= tags(memory)
    assert {"norms/weight/total", "norms-largest/weight/total", "norms-largest/update_ratio"} <= tags(memory)


@pytest.mark.parametrize(
    "monitors",
    [
        lambda: [CAMMonitor(), CAMMonitor(target="label")],
        lambda: [CAMMonitor(name="a"), CAMMonitor(name="a", every_n_epochs=2)],
        lambda: [FilterMonitor(), FilterMonitor(layers=["net.0"])],
        lambda: [WeightHistogramMonitor(parameters="net.0.*"), WeightHistogramMonitor(parameters="net.4.*")],
        lambda: [NormMonitor(), NormMonitor(ord=1, every_n_epochs=2)],
    ],
    ids=["cam", "same name", "filters", "histograms", "norms"],
)
def test_two_that_would_write_the_same_tag_are_refused(memory: MemorySink, monitors: Any) -> None:
    module = Net()
    with pytest.raises(ConfigurationError, match=r"two monitors would write .*name="):
        fit(monitors(), module)
    assert module.trained == 0
    assert not memory.records


def test_what_does_not_collide_is_not_refused(memory: MemorySink) -> None:
    monitors = [
        FilterMonitor(layers=["net.0"]),
        FilterMonitor(layers=["net.4"]),
        NormMonitor(gradients=False, updates=False),
        NormMonitor(weights=False, updates=False, every_n_train_steps=2),
    ]
    fit(monitors, max_epochs=1)
    assert {"filters/net.0", "filters/net.4", "norms/weight/total", "norms/gradient/total"} <= tags(memory)


def test_stopping_by_number_of_steps_ends_an_epoch(memory: MemorySink) -> None:
    fit([watch(at_start=False), NormMonitor(at_start=False, on_error="raise")], max_epochs=-1, max_steps=4)
    assert steps(memory, WEIGHTS) == [2, 3]
    assert steps(memory, "norms/gradient/total") == [2, 3]
