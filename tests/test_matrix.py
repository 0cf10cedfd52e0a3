"""Training with monitors is the training without them, to the bit, under every way people train.

The default run takes a slice that covers every setting and every monitor; ``pytest -m matrix`` takes the whole product.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_interp import CAMMonitor
from lightning_interp.model import preserve as guard
from tests.helpers import matrix
from tests.helpers.matrix import MONITORS, SETTINGS, TWO_PROCESSES, WATCHED, Leg, differences, loud, repeated, train
from tests.helpers.processes import HELPERS, play

pytestmark = [pytest.mark.filterwarnings(f"ignore:{words}") for words in matrix.LIGHTNINGS_OWN]

# The slice: every setting with the monitors that most users take, and every monitor by itself.
SLICE = [(setting, "default_monitors") for setting in SETTINGS if setting != "compiled part, steps"]
SLICE += [("accumulation", kind.__name__) for kind in MONITORS]
SLICE += [("a localiser", "LocalizationMonitor")]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Quiet, and in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    names = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@functools.cache
def alone(setting: str) -> list[Leg]:
    """The training without monitors; one serves all."""
    with tempfile.TemporaryDirectory() as folder:
        return train(SETTINGS[setting], None, f"{folder}/alone.ckpt")


def watch(setting: str, watched: str = "default_monitors", **trainer: Any) -> list[Leg]:
    """The same training with monitors; the warning of the explanation that is to fail is expected."""
    how = SETTINGS[setting]
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=".*is disabled from here on")
        found = train(how, loud(WATCHED[watched]), "watched.ckpt", **trainer)
    said = [str(each.message) for each in caught]
    assert len(said) == len(how.beside()), said
    assert all("CAMMonitor('flawed') failed" in each and "no explanation today" in each for each in said)
    return found


def check(setting: str, watched: str) -> None:
    before, found = alone(setting), watch(setting, watched)
    assert differences(before, found) == []
    looks = {step for leg in found for step, _ in leg.records}
    assert len(looks) >= 2, "nothing was looked at, so that nothing was shown"
    assert repeated(found) == []
    assert all(leg.probes == found[0].probes for leg in found), "another probe after resuming"
    if SETTINGS[setting].compiles:
        assert len(list(before[-1].snapshots.values())[-1]["graphs"]) >= 2, "nothing was compiled"


@pytest.mark.parametrize(("setting", "watched"), SLICE)
def test_training_is_the_same_with_monitors(setting: str, watched: str) -> None:
    check(setting, watched)


@pytest.mark.matrix
@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_the_same_with_each_monitor_in_each_setting(setting: str, watched: str) -> None:
    check(setting, watched)


def test_every_exported_monitor_is_watched() -> None:
    assert len(MONITORS) >= 5
    assert {kind.__name__ for kind in MONITORS} < set(WATCHED)


@pytest.mark.parametrize("setting", ["batch norm and dropout", "manual, two optimisers", "compiled part"])
def test_two_trainings_without_monitors_are_the_same(setting: str) -> None:
    assert differences(alone(setting), train(SETTINGS[setting], None, "again.ckpt")) == []


# ---- A run that was stopped and resumed, as it stands in TensorBoard's files.


@pytest.mark.parametrize("setting", [each for each, how in SETTINGS.items() if len(how.legs) > 1])
def test_a_resumed_run_writes_nothing_twice(setting: str, tmp_path: Path) -> None:
    # Both legs write into one folder, as a user does who goes on where the run stopped.
    watch(setting, logger=TensorBoardLogger(str(tmp_path), name="run", version=0))
    files = sorted((tmp_path / "run" / "version_0").glob("events.out*"), key=lambda each: int(each.suffixes[-1][1:]))
    legs = [events(each) for each in files]
    assert len(legs) >= 2
    for first, second in itertools.combinations(legs, 2):
        assert first.keys() & second.keys() == set()
    pictures = [{step for tag, step in leg if tag == "cam/gradcam"} for leg in legs]
    assert 0 in pictures[0]
    assert all(0 not in later for later in pictures[1:])
    assert all(pictures)
    assert {count for leg in legs for count in leg.values()} == {1}, "something stands twice in one file"


def events(file: Path) -> dict[tuple[str, int], int]:
    """How often each tag and step stands in a file, but for the layout of the charts and what is no record of ours."""
    found = EventAccumulator(str(file), size_guidance={"images": 0, "scalars": 0, "histograms": 0, "tensors": 0})
    found.Reload()
    counted: dict[tuple[str, int], int] = {}
    for kind, read in (("images", found.Images), ("scalars", found.Scalars), ("histograms", found.Histograms)):
        for tag in found.Tags()[kind]:
            for event in read(tag) if "/" in tag else ():
                counted[tag, event.step] = counted.get((tag, event.step), 0) + 1
    return counted


# ---- Two processes.


def played(folder: Path, cases: list[tuple[str, str]], ranks: int = 2) -> dict[str, Any]:
    """What two processes found in these cases: for each and for each rank, the differences and the steps looked at.

    With one rank, Lightning starts the other: a process that has asked for its GPUs must not fork.
    """
    play(HELPERS / "matrix_two_processes.py", folder, json.dumps(cases), timeout=240, ranks=ranks)
    return {name: each for rank in (0, 1) for name, each in json.loads((folder / f"{rank}.json").read_text()).items()}


def check_ranks(found: dict[str, Any], setting: str, watched: str) -> None:
    for rank in (0, 1):
        assert found[f"{setting}/{watched}/{rank}"]["differences"] == []
    assert len(found[f"{setting}/{watched}/0"]["looks"]) >= 2
    assert found[f"{setting}/{watched}/1"]["looks"] == [], "one writer"


@pytest.fixture(scope="module")
def slice_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return played(tmp_path_factory.mktemp("two"), [(each, "default_monitors") for each in TWO_PROCESSES])


@pytest.fixture(scope="module")
def all_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return played(tmp_path_factory.mktemp("two"), list(itertools.product(TWO_PROCESSES, WATCHED)))


@pytest.mark.distributed
@pytest.mark.parametrize("setting", TWO_PROCESSES)
def test_two_processes_train_the_same_with_monitors(slice_of_two: dict[str, Any], setting: str) -> None:
    check_ranks(slice_of_two, setting, "default_monitors")


@pytest.mark.distributed
@pytest.mark.matrix
@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("setting", TWO_PROCESSES)
def test_two_processes_train_the_same_with_each_monitor(all_of_two: dict[str, Any], setting: str, watched: str) -> None:
    check_ranks(all_of_two, setting, watched)


@pytest.mark.gpu(devices=2)
@pytest.mark.distributed
def test_two_processes_on_gpus_train_the_same_with_monitors(tmp_path: Path) -> None:
    found = played(tmp_path, [(setting, "default_monitors") for setting in matrix.ON_GPUS], ranks=1)
    for setting in matrix.ON_GPUS:
        check_ranks(found, setting, "default_monitors")


# ---- The matrix goes red where the guard is weakened.


def changed(kind: type[nn.Module], change: Callable[[Any], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """The guard puts every module back, but for this change to those of one kind."""

    def weaken(monkeypatch: pytest.MonkeyPatch) -> None:
        keep = guard._keep_module

        def keep_module(module: nn.Module, *others: Any) -> Callable[[], None]:
            restore = keep(module, *others)

            def restored() -> None:
                restore()
                if isinstance(module, kind):
                    change(module)

            return restored

        monkeypatch.setattr(guard, "_keep_module", keep_module)

    return weaken


def forget_one_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = guard._keep_module

    def keep_module(module: nn.Module, *others: Any) -> Callable[[], None]:
        return (lambda: None) if isinstance(module, nn.Dropout) else keep(module, *others)

    monkeypatch.setattr(guard, "_keep_module", keep_module)


def draws(draw: Callable[[], object]) -> Callable[[pytest.MonkeyPatch], None]:
    def weaken(monkeypatch: pytest.MonkeyPatch) -> None:
        preserved = guard.isolate_rng

        @contextmanager
        def preserved_but_one() -> Iterator[None]:
            with preserved():
                yield
            draw()

        monkeypatch.setattr(guard, "isolate_rng", preserved_but_one)

    return weaken


def forget_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_gradients(parameters: list[nn.Parameter]) -> Callable[[], None]:
        flags = [each.requires_grad for each in parameters]

        def restore() -> None:
            for each, flag in zip(parameters, flags, strict=True):
                each.requires_grad_(flag)

        return restore

    monkeypatch.setattr(guard, "_keep_gradients", keep_gradients)


def move_one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = guard._keep_values

    def keep_values(tensors: list[Any]) -> Callable[[], None]:
        restore = keep(tensors)

        @torch.no_grad()
        def restored() -> None:
            restore()
            if tensors:
                tensors[0][0] = torch.nextafter(tensors[0][0], torch.tensor(9.0))

        return restored

    monkeypatch.setattr(guard, "_keep_values", keep_values)


def forget_one_requires_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = guard._keep_gradients

    def keep_gradients(parameters: list[nn.Parameter]) -> Callable[[], None]:
        restore = keep(parameters)
        return lambda: (restore(), parameters[2].requires_grad_(False))[0]

    monkeypatch.setattr(guard, "_keep_gradients", keep_gradients)


def leave_a_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *args: None)


def leave_an_attribute(layer: nn.Module) -> None:
    layer.left = True  # type: ignore[assignment]


Weakening = Callable[[pytest.MonkeyPatch], None]
WEAKENINGS: dict[str, tuple[Weakening, str, str]] = {
    "one mode": (forget_one_mode, "batch norm and dropout", "mode net.7"),
    "one number of torch": (draws(lambda: torch.rand(1)), "batch norm and dropout", "torch stream"),
    "one number of NumPy": (draws(np.random.rand), "batch norm and dropout", "numpy stream"),
    "one number of Python": (draws(random.random), "batch norm and dropout", "python stream"),
    "one hook": (changed(nn.Linear, leave_a_hook), "batch norm and dropout", "hooks net.10"),
    "one attribute": (changed(nn.Linear, leave_an_attribute), "batch norm and dropout", "attributes net.10"),
    "one bit of a buffer": (move_one_bit, "frozen batch norms", "buffer net.1.running_mean"),
    "gradients": (forget_gradients, "steps amid accumulation", "grad net.0.weight"),
    "gradients amid a window": (forget_gradients, "manual, steps amid accumulation", "grad net.4.weight"),
    "one requires_grad": (forget_one_requires_grad, "batch norm and dropout", "requires_grad net.1.weight"),
}


@pytest.mark.parametrize("weakened", WEAKENINGS)
def test_the_matrix_notices_a_weaker_guard(monkeypatch: pytest.MonkeyPatch, weakened: str) -> None:
    weaken, setting, name = WEAKENINGS[weakened]
    before = alone(setting)
    weaken(monkeypatch)
    found = differences(before, watch(setting))
    assert any(each.endswith(f": {name}") for each in found), found[:5]


def test_the_matrix_notices_an_explanation_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def method(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            model(images)
        return images.mean(1)

    def looking() -> list[str]:
        monitor = CAMMonitor(method=method, probe=3, on_error="raise")
        return differences(alone("compiled part"), train(SETTINGS["compiled part"], lambda: [monitor], "watched.ckpt"))

    assert looking() == []
    monkeypatch.setattr(guard, "_running_eagerly", nullcontext)
    assert any(each.endswith(": graphs") for each in looking())


def test_the_matrix_notices_what_is_written_twice() -> None:
    (leg,) = watch("batch norm and dropout")
    assert repeated([leg]) == []
    assert repeated([leg, leg]) != []
    assert repeated([Leg({}, [], []), leg]) != [], "a second start"
    assert repeated([Leg({}, leg.records * 2, [])]) != []


def test_the_recorder_stands_behind_the_monitors() -> None:
    callbacks = pl.Trainer(
        callbacks=[*WATCHED["default_monitors"](), matrix.Recorder()], logger=False, enable_checkpointing=False
    ).callbacks  # type: ignore[attr-defined]
    numbers = [index for index, each in enumerate(callbacks) if type(each) in MONITORS]
    (own,) = [index for index, each in enumerate(callbacks) if isinstance(each, matrix.Recorder)]
    assert max(numbers) < own
