"""What the tests of the callbacks run under."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_interp.callbacks.contract import Monitor
from lightning_interp.callbacks.run.coordinator import Coordinator
from lightning_interp.sinks import MemorySink
from tests.helpers.runs import TRAINER, loggers

# Lightning's own, each by its words: none of them speaks of anything that a test here is about.
_LIGHTNINGS_OWN = [
    "ignore:.*does not have many workers which may be a bottleneck",
    "ignore:The number of training batches .* is smaller than the logging interval",
    "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Found .* module\\(s\\) in eval mode at the start of training",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for words in reversed(_LIGHTNINGS_OWN):
                item.add_marker(pytest.mark.filterwarnings(words), append=False)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Quiet, on few threads, in a folder of its own, and with no coordinator left behind."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    trainers: list[Any] = []
    attach = Monitor.attach
    monkeypatch.setattr(Monitor, "attach", lambda trainer, stage: (trainers.append(trainer), attach(trainer, stage)))
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    torch.set_num_threads(threads)
    left = [trainer for trainer in trainers if any(isinstance(each, Coordinator) for each in trainer.callbacks)]
    assert not left, "a coordinator outlived its run"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemorySink:
    """What is written by every Trainer that names no other logger."""
    sink = MemorySink()
    monkeypatch.setitem(TRAINER, "logger", loggers(sink))
    return sink
