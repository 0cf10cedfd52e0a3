"""Training on the device with monitors is training without them, to the bit."""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_interp import CAMMonitor, default_monitors
from tests.helpers import matrix
from tests.helpers.matrix import SETTINGS, WATCHED, Setting, differences, loud, repeated, train
from tests.helpers.processes import HELPERS, play

pytestmark = [pytest.mark.filterwarnings(f"ignore:{words}") for words in matrix.LIGHTNINGS_OWN]
# The rest of the settings on the CPU are those of test_matrix.py.
ON_BOTH = ["batch norm and dropout", "a localiser"]
ON_GPU = [
    "steps amid accumulation",
    "frozen batch norms",
    "bf16 autocast",
    "manual, two optimisers",
    "weight averaging",
]
ON_GPU += ["resumed inside an epoch", "compiled module"]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Quiet, and in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def check(setting: Setting, accelerator: str, watched: str = "default_monitors") -> None:
    alone = train(setting, None, "alone.ckpt", accelerator=accelerator)
    found = train(setting, loud(WATCHED[watched]), "watched.ckpt", accelerator=accelerator)
    assert differences(alone, found) == []
    assert len({step for leg in found for step, _ in leg.records}) >= 2, "nothing was shown"
    assert repeated(found) == []


@pytest.mark.usefixtures("deterministic_training")
@pytest.mark.parametrize("setting", ON_BOTH)
def test_training_is_the_same_with_monitors(setting: str, accelerator: str) -> None:
    check(SETTINGS[setting], accelerator)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_training")
@pytest.mark.parametrize("setting", [name for name in ON_GPU if name in SETTINGS])
def test_training_on_a_gpu_is_the_same_with_monitors(setting: str) -> None:
    check(SETTINGS[setting], "gpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_training")
def test_training_with_scaled_gradients_is_the_same_with_monitors() -> None:
    check(Setting(trainer={"precision": "16-mixed"}, options={"every_n_train_steps": 3}), "gpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_training")
@pytest.mark.parametrize("watched", [name for name in WATCHED if name != "default_monitors"])
def test_training_on_a_gpu_is_the_same_with_each_monitor(watched: str) -> None:
    check(SETTINGS["accumulation"], "gpu", watched)


@pytest.fixture
def deterministic_training() -> Iterator[None]:
    """Deterministic mode with what CUDA refuses left out: torch's own optimisers and loaders run as they are."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- Between the epochs that are due.


def synchronizations(monitors: list[Any], accelerator: str) -> int:
    """How often the host waits for the device in a training."""
    settings = {"max_epochs": 2, "accelerator": accelerator, "devices": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(callbacks=monitors, **settings, **quiet)
    on_gpu = accelerator == "gpu"
    torch.manual_seed(7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if on_gpu:
            torch.ones(1, device="cuda").item()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.fit(matrix.Net(), *matrix.loaders())
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def test_nothing_waits_for_the_device_while_nothing_is_due(accelerator: str) -> None:
    never: dict[str, Any] = {"at_epochs": [100], "at_start": False, "probe": 3, "on_error": "raise"}
    synchronizations([], accelerator)
    without = synchronizations([], accelerator)
    with_monitors = synchronizations(default_monitors(**never), accelerator)
    checked_once = 20  # the checks before training may wait
    assert with_monitors <= without + checked_once


# ---- Memory.


def test_a_method_that_lacks_memory_gets_half_of_the_probe(accelerator: str) -> None:
    sizes: list[int] = []

    def method(model: Any, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 2:
            if accelerator == "gpu":
                torch.empty(2**50, dtype=torch.uint8, device="cuda")
            raise torch.OutOfMemoryError("out of memory")
        return images.mean(1)

    monitor = CAMMonitor(method=method, probe=4, on_error="raise")
    train(Setting(trainer={"max_epochs": 1}), lambda: [monitor], "one.ckpt", accelerator=accelerator)
    assert sizes[0] == 4
    assert max(sizes[1:]) <= 2


# ---- Sharded modules.


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("accelerator", "devices"),
    [
        pytest.param("cpu", 1, marks=pytest.mark.matrix),
        pytest.param("gpu", 1, marks=pytest.mark.gpu),
        pytest.param("gpu", 2, marks=pytest.mark.gpu(devices=2)),
    ],
)
def test_a_sharded_module_trains_the_same_with_monitors(accelerator: str, devices: int, tmp_path: Path) -> None:
    play(HELPERS / "sharded_training.py", tmp_path, accelerator, str(devices))
    for rank in range(devices):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["differences"] == []
        assert found["compared"] > 10
    assert list(tmp_path.rglob("*.png")), "nothing was shown"


# ---- SyncBatchNorm on one device: a group of one.


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_training")
def test_synchronized_batch_norms_on_one_gpu() -> None:
    class Synchronized(matrix.Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    check(Setting(functools.partial(Synchronized)), "gpu")
