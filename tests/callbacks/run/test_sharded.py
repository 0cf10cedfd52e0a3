"""Sharded modules on two processes, and the other ways in which processes start and end; all on the CPU."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import subprocess
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_interp import NormMonitor, default_monitors
from lightning_interp.callbacks.run.ranks import unsupported_strategy
from lightning_interp.sinks import MemorySink
from tests.helpers.processes import HELPERS, finish, play, start
from tests.helpers.runs import TRAINER, Net, fit, read_events

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]
SCRIPT = HELPERS / "sharded_processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left what they saw."""
    return play(SCRIPT, tmp_path_factory.mktemp("sharded"))


def seen(folder: Path, scene: str) -> tuple[Any, Any]:
    """What the two ranks have to say."""
    first, second = (torch.load(folder / f"{scene}-{rank}.pt", weights_only=False) for rank in (0, 1))
    return first, second


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, imported late: it loads what only these tests need."""
    monkeypatch.setitem(TRAINER, "logger", TRAINER["logger"])  # put back, whatever a scene sets
    from tests.helpers import sharded_processes

    return sharded_processes


@pytest.mark.parametrize(
    ("scene", "kind"),
    [("sharded_look", "Plain"), ("itself_look", "Plain"), ("tensor_parallel_look", "Wider")],
)
def test_a_sharded_module_looks_like_the_whole_one(folder: Path, scenes: Any, scene: str, kind: str) -> None:
    sharded, nothing = seen(folder, scene)
    assert not any(nothing.values()), "one writer"
    alone = scenes.plain_look(getattr(scenes, kind))
    for part, found in sharded.items():
        assert found.keys() == alone[part].keys()
        assert found, part
        for tag, value in found.items():
            one, other = torch.as_tensor(value).double(), torch.as_tensor(alone[part][tag]).double()
            if part == "pictures":
                assert int((one - other).abs().max()) <= 3, tag
            else:
                assert torch.allclose(one, other, rtol=1e-6, atol=0), tag


def test_what_training_does_to_sharded_parameters(folder: Path) -> None:
    result, _ = seen(folder, "trained_look")
    by_hand, found = result["by_hand"], result["found"]
    assert found.keys() == by_hand.keys()
    assert len({step for _, step in found}) == 4
    for key, value in found.items():
        one, other = torch.as_tensor(value).double(), torch.as_tensor(by_hand[key]).double()
        assert torch.allclose(one, other, rtol=1e-5, atol=0), key


def test_training_is_the_same_with_monitors(folder: Path) -> None:
    for rank, found in enumerate(seen(folder, "invisible")):
        for kind, (different, same_hooks, trained, empty) in found.items():
            assert different == [[], []], kind
            assert same_hooks, kind
            assert trained == [trained[0]] * 3, kind
            assert ("state net.9.weight" in empty) == (rank == 1), "the second rank holds nothing of it"


def test_a_failure_on_one_rank_is_everyones(folder: Path) -> None:
    first, second = seen(folder, "fails_on_one")
    (said,) = first["said"]
    assert second["said"] == []
    assert "on rank 1" in said
    assert "no room on this one" in said
    assert first["trained"] == second["trained"] == 4
    assert first["calls"] == second["calls"] == [5, 5], "the whole probe on each rank, and nothing is retried"
    assert [step for tag, step in first["pictures"] if tag == "cam-rash/method"] == [0]
    assert [step for tag, step in first["pictures"] if tag == "cam/gradcam"] == [0, 1, 3]


def test_a_failure_that_only_the_writing_rank_knows_of(folder: Path) -> None:
    first, second = seen(folder, "fails_while_drawing")
    assert first["trained"] == second["trained"] == 6
    assert first["steps"] >= 6
    assert (first["said"], second["said"]) == (1, 0)


def test_the_test_set(folder: Path) -> None:
    first, second = seen(folder, "evaluates")
    assert ("cam-test/gradcam", 0) in first
    assert second == []


def test_the_probe_is_the_same_although_each_rank_reads_another_stream(folder: Path) -> None:
    first, second = seen(folder, "other_streams")
    assert [len(each) for each in first["ddp"]] == [1, 1]
    assert [len(each) for each in second["ddp"]] == [2, 2]
    expected = torch.rand(12, 3, 12, 12, generator=torch.Generator().manual_seed(100))[:3]
    for mine, others in zip(first["ddp"], second["ddp"], strict=True):
        assert torch.equal(torch.cat([mine, others]), expected), "the first rank's images, shared out"
    for ranks in (first, second):
        assert len(ranks["sharded"]) == 2
        for looked in ranks["sharded"]:
            assert torch.equal(looked, expected)


@pytest.mark.parametrize("how", ["ddp", "sharded"])
def test_where_the_schedule_says_no_nobody_talks(folder: Path, how: str) -> None:
    for found in seen(folder, "silent"):
        start, second, third, fourth = found[how]
        assert start == second == third, "epochs 0 and 1 are not due"
        assert start > 0
        assert fourth > third, "the third one is"


@pytest.mark.matrix
def test_processes_that_are_spawned(tmp_path: Path) -> None:
    play(SCRIPT, tmp_path, "spawned")
    (file,) = tmp_path.rglob("events.out*")
    assert [event.step for event in read_events(file.parent).Images("cam/gradcam")] == [0, 1]


@pytest.mark.matrix
def test_one_device_under_torchrun(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    code, output = finish(start(SCRIPT, tmp_path, "torchrun", launcher=launcher), tmp_path)
    assert code == 0, output
    (file,) = tmp_path.rglob("events.out*")
    assert [event.step for event in read_events(file.parent).Images("cam/gradcam")] == [0, 2]


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["terminated", "terminated_elsewhere", "interrupted"])
def test_a_stop_on_one_rank_leaves_readable_logs(tmp_path: Path, how: str) -> None:
    process = start(SCRIPT, tmp_path, how)
    try:
        process.wait(timeout=25)
    except subprocess.TimeoutExpired:
        # Lightning's own handler broadcasts in the middle of a step. Told on the second rank, both wait for each other
        # without monitors, too; told on the first, that was seen now and then, so far only with them. What was seen
        # before must be there all the same.
        assert how.startswith("terminated")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (file,) = tmp_path.rglob("events.out*")
    assert [event.step for event in read_events(file.parent).Images("cam/gradcam")][:2] == [0, 1]


class Copies(pl.Callback):
    """What weight averaging and checkpoints do to the module, in the middle of a run."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for other in (copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))):
            for one, two in zip(pl_module.parameters(), other.parameters(), strict=True):
                assert torch.equal(one, two)
            self.count += 1


def test_the_module_can_be_copied_in_the_middle_of_a_run(memory: MemorySink) -> None:
    copies = Copies()
    fit([*default_monitors(probe=2, on_error="raise", every_n_train_steps=1), copies], Net())
    assert copies.count == 12


def test_weight_averaging_beside_monitors(memory: MemorySink, scenes: Any) -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging
    module = scenes.Plain()
    fit([averaging(), *default_monitors(probe=2, on_error="raise")], module, package=pl)
    assert module.trained == 6
    assert {"cam/gradcam", "filters/net.0"} <= {getattr(each, "tag", "") for _, each in memory.records}


class _Flat:
    """Stands for a strategy, which needs a GPU."""

    def __init__(self, name: str, stage: int = 0) -> None:
        self.strategy = type(name, (), {"model": nn.Linear(1, 1), "zero_stage_3": stage == 3})()


@pytest.mark.parametrize(("name", "stage"), [("FSDPStrategy", 0), ("XLAFSDPStrategy", 0), ("DeepSpeedStrategy", 3)])
def test_what_cannot_be_read_is_named(name: str, stage: int) -> None:
    assert "ModelParallelStrategy" in str(unsupported_strategy(_Flat(name, stage)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["DDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_what_can_be_read_is_not(name: str) -> None:
    assert unsupported_strategy(_Flat(name, 2)) is None  # type: ignore[arg-type]


def test_what_cannot_be_read_is_said_once_and_the_run_goes_on(
    memory: MemorySink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lightning_interp.callbacks.run.coordinator.unsupported_strategy", lambda trainer: "flat parameters"
    )
    module = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([*default_monitors(probe=2), NormMonitor(name="often", every_n_train_steps=1)], module)
    assert [str(each.message) for each in caught if "flat parameters" in str(each.message)] == [
        "lightning_interp records nothing of this run: flat parameters"
    ]
    assert module.trained == 6
    assert memory.records == []
