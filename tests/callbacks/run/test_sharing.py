"""All monitors that are due on one probe share one forward pass."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_interp import CAMMonitor, NormMonitor, Probe, SaliencyMonitor, default_monitors
from lightning_interp.sinks import MemorySink
from tests.helpers.runs import Net, dataset, fit, seed


def forwards(monitors: list[Any], **options: Any) -> list[int]:
    """How many images each forward pass took that the training itself did not ask for."""
    seed()
    module = Net()
    own: list[int] = []
    for name in ("training_step", "validation_step"):
        step = getattr(module, name)

        def counted(*args: Any, _step: Any = step) -> Any:
            own.append(1)
            return _step(*args)

        setattr(module, name, counted)
    fit(monitors, module, num_sanity_val_steps=0, **options)
    extra = list(module.looked_at)
    for _ in own:
        extra.remove(4)
    return extra


def test_one_pass_a_look_and_one_image_to_find_the_layer(memory: MemorySink) -> None:
    assert forwards(default_monitors(probe=5, on_error="raise")) == [1, 5, 5, 5]


def test_a_pass_for_each_probe(memory: MemorySink) -> None:
    monitors = [CAMMonitor(probe=5), SaliencyMonitor(probe=6), CAMMonitor(probe=5, method="cam"), NormMonitor()]
    assert sorted(forwards(monitors)) == [1, 5, 5, 5, 6, 6, 6]


def test_one_probe_given_to_two_is_one(memory: MemorySink) -> None:
    probe = Probe(*dataset(7).tensors)
    assert forwards([CAMMonitor(probe=probe), SaliencyMonitor(probe=probe)], max_epochs=1) == [1, 7, 7]


def test_a_large_probe_goes_in_chunks_that_are_shared_too(memory: MemorySink) -> None:
    probe = Probe(*dataset(20).tensors)
    assert forwards(default_monitors(probe=probe, on_error="raise"), max_epochs=1) == [1, 8, 8, 4, 8, 8, 4]


def test_what_is_not_due_costs_nothing(memory: MemorySink) -> None:
    # Only the rehearsal on one image, before the first batch.
    assert forwards(default_monitors(at_epochs=[7], at_start=False)) == [1, 1]


def test_monitors_of_weights_run_no_forward_pass(memory: MemorySink) -> None:
    assert forwards(default_monitors()[2:]) == []


@pytest.mark.parametrize("wrong", ["no such layer", "raises"])
def test_one_that_breaks_the_shared_pass_does_not_break_it_for_the_others(memory: MemorySink, wrong: str) -> None:
    def method(model: Any, images: Any, targets: Any) -> Any:
        raise RuntimeError("nothing to see")

    broken = CAMMonitor(probe=5, name="broken", layer="net.3" if wrong == "no such layer" else None)
    if wrong == "raises":
        broken = CAMMonitor(probe=5, name="broken", method=method)
        with pytest.warns(UserWarning, match="nothing to see"):
            assert forwards([broken, *default_monitors(probe=5, on_error="raise")]) == [1, 5, 5, 5]
        return
    assert forwards([broken, *default_monitors(probe=5, on_error="raise")]) == [1, 5, 5, 5]
