"""Monitors of the validation pass: what a batch holds, when results come, and what becomes of failures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from lightning_interp import ConfigurationError
from lightning_interp.callbacks import StreamMonitor
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

IMAGES, LABELS = dataset(10).tensors


class Counting(StreamMonitor):
    """Sums a layer's activations over the images that count."""

    kind = "counting"

    def __init__(self, layer: Any = "net.3", fails: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.layer, self.fails, self.batches = layer, fails, []  # type: ignore[var-annotated]

    def layers(self, module: nn.Module) -> list[Any]:
        return [self.layer]

    def begin(self, module: nn.Module, device: torch.device) -> SumMetric:
        self.fail("begin")
        return SumMetric().to(device)

    def update(self, state: SumMetric, batch: Any) -> None:
        self.fail("update")
        self.batches.append(batch)
        state.update(batch.activations(self.layer).double()[list(batch.counts)].sum())

    def compute(self, state: SumMetric) -> float:
        self.fail("compute")
        return float(state.compute())

    def finish(self, module: nn.Module, result: float, read_images: Any) -> dict[str, Any]:
        self.fail("finish")
        return {"total": result, "images": read_images([7, 2])}

    def scalar_names(self, probe: Any) -> list[str]:
        return ["total"]

    def scalars(self, result: dict[str, Any]) -> dict[str, float]:
        self.fail("scalars")
        return {"total": result["total"]}

    def records(self, result: dict[str, Any], step: int) -> Any:
        self.fail("records")
        yield Scalar(self.tag("mean"), float(result["images"].mean()))

    def fail(self, where: str) -> None:
        if where == self.fails:
            raise ValueError(f"no {where} today")


class Frozen(Net):
    """Learns nothing, so that every validation gives the same."""

    def __init__(self) -> None:
        super().__init__(plain=True, optimizer="sgd")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def expected(module: Net, until: int = 4) -> float:
    with torch.no_grad():
        return float(module.net[:until](IMAGES).double().sum())


def run(monitor: Any, module: Any = None, **options: Any) -> tuple[Any, list[dict[str, float]], Net]:
    seed()
    module, log = module or Frozen(), Log("counting")
    trainer = fit([monitor, log], module, val=options.pop("val", loader(dataset(10))), **options)
    return trainer, log.epochs, module


@pytest.mark.parametrize("layer", ["net.3", None])
def test_a_layer_is_read_in_the_steps_own_pass(memory: MemorySink, layer: Any) -> None:
    monitor = Counting(layer, on_error="raise")
    _, epochs, module = run(monitor, num_sanity_val_steps=0)
    total = expected(module, 4 if layer else 5)
    assert [each["total"] for each in epochs] == pytest.approx([total, total], rel=1e-5)
    # Three batches of training and of validation in each epoch; one pass more to find the last spatial layer.
    assert len(module.looked_at) == 12 + (layer is None)
    assert steps(memory, "counting/mean") == [2, 5]
    assert memory.records[-1][1].value == pytest.approx(float(IMAGES[[7, 2]].mean()))  # type: ignore[union-attr]


def test_what_a_batch_holds(memory: MemorySink) -> None:
    monitor = Counting(on_error="raise")
    _, _, module = run(monitor, max_epochs=1)
    assert [batch.indices for batch in monitor.batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert all(batch.counts == (True,) * len(batch.images) for batch in monitor.batches)
    assert torch.equal(torch.cat([batch.images for batch in monitor.batches]), IMAGES)
    assert torch.equal(torch.cat([batch.labels for batch in monitor.batches]), LABELS)
    assert {batch.module for batch in monitor.batches} == {module}
    assert {batch.logits for batch in monitor.batches} == {None}, "the step returned nothing"


def test_logits_are_those_that_the_step_returned(memory: MemorySink) -> None:
    class Returning(Frozen):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            return {"loss": self.loss(batch), "logits": self(batch[0])}

    monitor = Counting(on_error="raise")
    _, _, module = run(monitor, Returning(), max_epochs=1)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([batch.logits for batch in monitor.batches]), module(IMAGES))


def test_where_the_step_does_not_run_the_layer_it_is_run(memory: MemorySink) -> None:
    class Elsewhere(Frozen):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            batch[0].zero_()

    _, epochs, module = run(Counting(on_error="raise"), Elsewhere())
    assert len(epochs) == 2
    monitor = Counting(on_error="raise")
    _, epochs, module = run(monitor, torch_compiled(Frozen()))
    assert epochs[0]["total"] == pytest.approx(expected(module), rel=1e-5)


def torch_compiled(module: Net) -> Net:
    """A module with a part that was compiled, without compiling it."""
    module.net[0]._compiled_call_impl = module.net[0]._call_impl  # type: ignore[union-attr, operator]
    return module


def test_between_due_epochs_the_last_numbers_are_repeated(memory: MemorySink) -> None:
    monitor = Counting(at_epochs=[2], on_error="raise")
    _, epochs, module = run(monitor, max_epochs=4)
    assert [each["total"] for each in epochs] == pytest.approx([expected(module)] * 4, rel=1e-5)
    assert len(monitor.batches) == 6, "the first validation, and the due one"
    assert steps(memory, "counting/mean") == [2, 8]
    assert monitor.state_dict() == {"scalars": monitor.last_scalars}


@pytest.mark.parametrize("where", ["begin", "update", "compute", "finish", "scalars", "records"])
def test_a_failure_disables_the_monitor_alone(memory: MemorySink, where: str) -> None:
    with pytest.warns(UserWarning, match=f"no {where} today") as caught:
        _, epochs, module = run(Counting(fails=where), max_epochs=3)
    assert len([each for each in caught if "is disabled from here on" in str(each.message)]) == 1
    assert module.trained == 9
    assert len(epochs) == 3
    if where == "records":
        assert not math.isnan(epochs[-1]["total"])
    else:
        assert all(math.isnan(each["total"]) for each in epochs)


def test_single_images_cannot_be_read_of_a_stream(memory: MemorySink) -> None:
    with pytest.warns(UserWarning, match="Stream can only be iterated"):
        run(Counting(), val=loader(Stream(8)), max_epochs=1)


@pytest.mark.parametrize(
    ("layer", "words"), [("net.33", "no layer 'net.33'"), (3, "must return a list of dotted names")]
)
def test_a_layer_that_does_not_exist_is_refused_before_training(memory: MemorySink, layer: Any, words: str) -> None:
    module = Frozen()
    with pytest.raises(ConfigurationError, match=words):
        run(Counting(layer), module, max_epochs=1)
    assert module.trained == 0


@pytest.mark.parametrize("where", ["begin", "finish", "scalars"])
def test_what_a_method_returns_is_checked(memory: MemorySink, where: str) -> None:
    monitor = Counting()
    setattr(monitor, where, lambda *args: None)
    with pytest.warns(
        UserWarning,
        match={"begin": "Metric or MetricCollection", "finish": "None as a result"}.get(
            where, "scalars\\(\\) takes numbers by name"
        ),
    ):
        _, epochs, _ = run(monitor, max_epochs=1)
    assert math.isnan(epochs[0]["total"])


def test_numbers_are_plain_floats_in_checkpoints(memory: MemorySink) -> None:
    class Numpy(Counting):
        def scalars(self, result: Any) -> Any:
            return {"total": np.float64(result["total"])}

    monitor = Numpy(on_error="raise")
    run(monitor, max_epochs=1)
    assert type(monitor.state_dict()["scalars"]["total"]) is float


def test_a_result_can_end_the_training(memory: MemorySink) -> None:
    class Ending(Counting):
        def should_stop(self, result: Any) -> str | None:
            return "enough was counted" if len(self.batches) >= 6 else None

    trainer, epochs, _module = run(Ending(on_error="raise"), max_epochs=9)
    assert (len(epochs), trainer.current_epoch) == (2, 2)


def test_a_result_of_nothing_is_none(memory: MemorySink) -> None:
    class Nothing(Counting):
        def compute(self, state: Any) -> None:  # type: ignore[override]
            return None

    _, epochs, _ = run(Nothing(on_error="raise"))
    assert all(math.isnan(each["total"]) for each in epochs)


def test_a_monitor_of_maps_may_be_none(memory: MemorySink) -> None:
    class Wrong(Counting):
        def update(self, state: Any, batch: Any) -> None:
            batch.outputs()

    with pytest.warns(UserWarning, match="for monitors that are a ProbeMonitor, too"):
        run(Wrong(), max_epochs=1)


def test_the_test_set_is_streamed_apart(memory: MemorySink) -> None:
    monitor, module = Counting(on_error="raise"), Frozen()
    trainer = make_trainer([monitor])
    trainer.test(module, loader(dataset(10)), verbose=False)
    assert float(trainer.callback_metrics["counting-test/total"]) == pytest.approx(expected(module), rel=1e-5)
    assert steps(memory, "counting-test/mean") == [0]
    assert monitor.last_scalars == {}


def test_no_tap_is_left_where_the_step_raises(memory: MemorySink) -> None:
    class Failing(Frozen):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.net[3]._forward_hooks, "nothing was tapped"
            raise ValueError("no validation today")

    module = Failing()
    with pytest.raises(ValueError, match="no validation today"):
        run(Counting(), module, num_sanity_val_steps=0)
    assert not any(child._forward_hooks for child in module.modules())


def test_lightnings_own_numbers_stay(memory: MemorySink) -> None:
    trainer, _, _ = run(Counting(on_error="raise"), max_epochs=1)
    assert {"val_loss", "counting/total"} <= set(trainer.callback_metrics)
    assert isinstance(trainer, pl.Trainer)


def test_images_may_be_of_another_dtype(memory: MemorySink) -> None:
    class Doubled(Frozen):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            return self(batch[0].double().float()).sum()

    _, epochs, module = run(Counting(on_error="raise"), Doubled())
    assert epochs[0]["total"] == pytest.approx(expected(module), rel=1e-5)


def test_images_are_those_that_entered_the_step(memory: MemorySink) -> None:
    class Changing(Frozen):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0].mul_(3))

    monitor = Counting(on_error="raise")
    run(monitor, Changing(), max_epochs=1, num_sanity_val_steps=0)
    assert torch.equal(torch.cat([batch.images for batch in monitor.batches]), IMAGES)


def test_a_layer_that_is_named_twice_is_itself(memory: MemorySink) -> None:
    class Twice(Counting):
        def layers(self, module: nn.Module) -> list[Any]:
            return [self.layer, self.layer, "net.0"]

    _, epochs, module = run(Twice(on_error="raise"), max_epochs=1)
    assert epochs[0]["total"] == pytest.approx(expected(module), rel=1e-5)


def test_random_numbers_of_an_update_leave_the_training_alone(memory: MemorySink) -> None:
    class Drawing(Counting):
        def update(self, state: Any, batch: Any) -> None:
            torch.rand(3)
            super().update(state, batch)

    seed()
    alone = fingerprint(fit([], Net()))
    seed()
    assert differences(alone, fingerprint(fit([Drawing(on_error="raise")], Net()))) == []
