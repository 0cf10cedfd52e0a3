"""Monitors with passes of their own: when they run, what they run on, and what becomes of failures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_interp import Probe
from lightning_interp.callbacks import MeasureData, MeasureMonitor
from lightning_interp.sinks import MemorySink, Scalar
from tests.helpers.runs import (
    Log,
    Net,
    Stream,
    dataset,
    differences,
    fingerprint,
    fit,
    loader,
    make_trainer,
    seed,
    steps,
)


class Brightness(MeasureMonitor):
    """The mean of the probe's images, and how often it was measured."""

    kind = "brightness"

    def __init__(self, fails: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.fails, self.calls = fails, 0

    def items(self, module: nn.Module, data: MeasureData) -> Any:
        self.fail("items")
        return super().items(module, data)

    def measure(self, module: nn.Module, data: MeasureData, share: Any) -> Any:
        self.fail("measure")
        self.calls += 1
        assert not module.training
        assert len(data.predict(module, data.probe.images[:2].to(data.device))) == 2
        images = data.probe.subset(list(share)).images
        for parameter in module.parameters():  # put back afterwards
            parameter.data.zero_()
        return {"total": images.sum(), "pixels": images.numel()}

    def merge(self, partials: Any) -> float:
        self.fail("merge")
        return float(sum(part["total"] for part in partials)) / sum(part["pixels"] for part in partials)

    def scalar_names(self, probe: Any) -> list[str]:
        return ["mean"]

    def scalars(self, result: float) -> dict[str, float]:
        self.fail("scalars")
        return {"mean": result}

    def records(self, result: float, step: int) -> Any:
        self.fail("records")
        yield Scalar(self.tag("record"), result)

    def fail(self, where: str) -> None:
        if where == self.fails:
            raise ValueError(f"no {where} today")


def run(monitor: Any, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    seed()
    log = Log("brightness")
    return fit([monitor, log], Net(), **options), log.epochs


def test_numbers_and_records_come_at_the_validations(memory: MemorySink) -> None:
    probe = Probe(*dataset(7).tensors)
    monitor = Brightness(probe=probe, on_error="raise")
    _, epochs = run(monitor)
    assert [each["mean"] for each in epochs] == pytest.approx([float(probe.images.mean())] * 2)
    assert steps(memory, "brightness/record") == [0, 2, 5]
    assert monitor.calls == 3


def test_training_is_the_same_although_parameters_were_changed(memory: MemorySink) -> None:
    seed()
    alone = fingerprint(fit([], Net()))
    seed()
    measured = fingerprint(fit([Brightness(on_error="raise")], Net()))
    assert differences(alone, measured) == []


def test_without_validation_the_end_of_the_epoch_counts(memory: MemorySink) -> None:
    trainer, _ = run(Brightness(on_error="raise"), val=None)
    assert steps(memory, "brightness/record") == [0, 2, 5]
    assert 0 < float(trainer.callback_metrics["brightness/mean"]) < 1


def test_between_due_epochs_and_before_the_first(memory: MemorySink) -> None:
    monitor = Brightness(at_epochs=[2], at_start=False, on_error="raise")
    _, epochs = run(monitor, max_epochs=4)
    assert len({each["mean"] for each in epochs}) == 1
    assert steps(memory, "brightness/record") == [2, 8], "the first validation, and the due one"


def test_an_evaluation_alone(memory: MemorySink) -> None:
    monitor = Brightness(on_error="raise")
    trainer, module = make_trainer([monitor]), Net()
    trainer.validate(module, loader(dataset(8)), verbose=False)
    trainer.test(module, loader(dataset(8)), verbose=False)
    assert steps(memory, "brightness/record") == [0]
    assert steps(memory, "brightness-test/record") == [0]
    assert "brightness-test/mean" in trainer.callback_metrics


def test_a_probe_from_the_first_batch(memory: MemorySink) -> None:
    monitor = Brightness(probe=3, on_error="raise")
    run(monitor, train=loader(Stream(12)), val=loader(Stream(8)), max_epochs=1)
    assert steps(memory, "brightness/record") == [0, 2]


@pytest.mark.parametrize("where", ["items", "measure", "merge", "scalars", "records"])
def test_a_failure_disables_the_monitor_alone(memory: MemorySink, where: str) -> None:
    with pytest.warns(UserWarning, match=f"no {where} today") as caught:
        trainer, epochs = run(Brightness(fails=where), max_epochs=3)
    assert len([each for each in caught if "is disabled from here on" in str(each.message)]) == 1
    assert trainer.lightning_module.trained == 9
    assert len(epochs) == 3
    assert all(math.isnan(each["mean"]) == (where != "records") for each in epochs)


def test_a_failure_can_end_the_run(memory: MemorySink) -> None:
    with pytest.raises(ValueError, match="no merge today"):
        run(Brightness(fails="merge", on_error="raise"))


def test_tensors_of_partial_results_come_to_the_cpu(memory: MemorySink) -> None:
    given: list[Any] = []

    class Keeping(Brightness):
        def merge(self, partials: Any) -> float:
            given.extend(partials)
            return super().merge(partials)

    run(Keeping(on_error="raise"), max_epochs=1)
    assert all(isinstance(part["total"], torch.Tensor) and not part["total"].requires_grad for part in given)
