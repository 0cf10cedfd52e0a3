"""What the tests of the callbacks run under."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_interp.callbacks.run import trainer as reading
from lightning_interp.callbacks.run.session import _sessions
from lightning_interp.sinks import MemorySink

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
    """Quiet, on few threads, in a folder of its own, and with no session left behind."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    torch.set_num_threads(threads)
    assert not _sessions, "a session outlived its run"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemorySink:
    """Everything that is written, instead of files."""
    sink = MemorySink()
    monkeypatch.setattr(reading, "sinks", lambda trainer: [sink])
    return sink
