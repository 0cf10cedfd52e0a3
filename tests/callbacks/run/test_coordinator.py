"""The hidden callback that runs all monitors: where it stands, and that it goes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.tuner import Tuner

from lightning_interp import CAMMonitor, FilterMonitor, LocalizationMonitor, NormMonitor, default_monitors
from lightning_interp.callbacks import MeasureMonitor, Monitor, ProbeMonitor, StepMonitor, StreamMonitor, WeightMonitor
from lightning_interp.callbacks.run.coordinator import Coordinator
from lightning_interp.sinks import MemorySink
from tests.helpers.runs import Net, coordinator, dataset, fit, loader, make_trainer, steps, tags


class Listing(pl.Callback):
    """Keeps the names of a Trainer's callbacks at each hook."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def take(self, hook: str, trainer: Any) -> None:
        self.names[hook] = [type(callback).__name__ for callback in trainer.callbacks]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.take("setup", trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.take("fit start", trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.take("epoch end", trainer)


def test_it_stands_behind_the_first_monitor_and_goes(memory: MemorySink, tmp_path: Path) -> None:
    listing, checkpoint = Listing(), ModelCheckpoint(dirpath=tmp_path)
    trainer = fit([listing, FilterMonitor(), checkpoint, NormMonitor()], enable_checkpointing=True)
    during = ["Listing", "FilterMonitor", "Coordinator", "NormMonitor", "ModelCheckpoint"]
    assert listing.names == {"setup": during[:2] + during[3:], "fit start": during, "epoch end": during}
    assert [type(callback).__name__ for callback in trainer.callbacks] == during[:2] + during[3:]
    saved = torch.load(checkpoint.best_model_path, weights_only=False)["callbacks"]
    assert not any("Coordinator" in key for key in saved)


@pytest.mark.parametrize("error", [ValueError("no training today"), KeyboardInterrupt()])
def test_it_goes_on_exceptions(memory: MemorySink, error: BaseException) -> None:
    class Failing(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                raise error

    trainer = make_trainer([FilterMonitor()])
    with pytest.raises((type(error), SystemExit)):
        trainer.fit(Failing(), loader(dataset()), loader(dataset(8)))
    assert [type(callback) for callback in trainer.callbacks] == [FilterMonitor]
    assert steps(memory, "filters/net.0") == [0, 2]


def test_one_trainer_fits_validates_and_tests(memory: MemorySink) -> None:
    trainer = make_trainer([FilterMonitor()], max_epochs=1)
    module = Net()
    trainer.fit(module, loader(dataset()), loader(dataset(8)))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(dataset()), loader(dataset(8)))
    trainer.validate(module, loader(dataset(8)), verbose=False)
    trainer.test(module, loader(dataset(8)), verbose=False)
    trainer.predict(module, loader(torch.rand(4, 3, 12, 12)))
    assert steps(memory, "filters/net.0") == [0, 2, 5, 6]
    assert steps(memory, "filters-test/net.0") == [6]
    assert len(trainer.callbacks) == 1


class Copying(pl.Callback):
    """Copies the Trainer and its callbacks in the middle of a run."""

    copies: list[Any]

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.copies = [
            pickle.loads(pickle.dumps(callback)) if how else copy.deepcopy(callback)
            for callback in trainer.callbacks
            if callback is not self
            for how in (0, 1)
        ]


def test_callbacks_can_be_copied_during_a_run(memory: MemorySink) -> None:
    copying = Copying()
    fit([*default_monitors(probe=2, on_error="raise", every_n_train_steps=1), copying])
    assert len(copying.copies) == 12
    assert not any(isinstance(each, Coordinator) for each in copying.copies)
    assert sum(isinstance(each, Monitor) for each in copying.copies) == 10


class Deep(pl.Callback):
    other: Any = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.other is None:
            self.other = True
            self.other = copy.deepcopy(trainer)


def test_a_trainer_that_was_copied_during_a_run_runs_again(memory: MemorySink) -> None:
    deep = Deep()
    fit([FilterMonitor(), deep], max_epochs=1)
    before = len(memory.records)
    other = deep.other
    assert not any(isinstance(callback, Coordinator) for callback in other.callbacks)
    other.fit_loop.max_epochs = 2
    other.fit(Net(), loader(dataset()), loader(dataset(8)))
    assert [type(callback) for callback in other.callbacks] == [FilterMonitor, Deep]
    assert len(memory.records) == before, "a copied logger has a sink of its own"


def test_monitors_of_the_module(memory: MemorySink) -> None:
    class Configured(Net):
        def configure_callbacks(self) -> list[Any]:
            return [CAMMonitor(probe=2, on_error="raise")]

    trainer = fit([FilterMonitor()], Configured())
    assert tags(memory) == {"filters/net.0", "cam/gradcam"}
    assert not any(isinstance(callback, Coordinator) for callback in trainer.callbacks)


@pytest.mark.parametrize("what", ["rate", "batch size"])
def test_the_tuner_is_left_alone(memory: MemorySink, what: str, tmp_path: Path) -> None:
    class Tuned(Net):
        lr, batch_size = 1e-2, 2

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(dataset(), batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return loader(dataset(8))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

    trainer = make_trainer([CAMMonitor(probe=2, on_error="raise")], max_epochs=1, default_root_dir=tmp_path)
    module = Tuned()
    if what == "rate":
        Tuner(trainer).lr_find(module, num_training=4, update_attr=False)
    else:
        Tuner(trainer).scale_batch_size(module, max_trials=1, init_val=2)
    assert [type(callback) for callback in trainer.callbacks] == [CAMMonitor]
    memory.records.clear()
    trainer.fit(module)
    assert steps(memory, "cam/gradcam")[0] == 0


def test_the_coordinator_can_be_found_while_it_runs(memory: MemorySink) -> None:
    class Asking(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.monitors = coordinator(trainer).monitors

    asking, monitors = Asking(), default_monitors(probe=2)
    fit([*monitors, asking])
    assert asking.monitors == monitors


def test_kinds_of_monitors_are_classes() -> None:
    kinds = {WeightMonitor, StepMonitor, ProbeMonitor, StreamMonitor, MeasureMonitor}
    of = {monitor: {kind for kind in kinds if isinstance(monitor, kind)} for monitor in default_monitors()}
    assert list(of.values()) == [
        *({ProbeMonitor}, {ProbeMonitor}, {WeightMonitor}),
        *({WeightMonitor, StepMonitor}, {WeightMonitor, StepMonitor}),
    ]
    assert {kind for kind in kinds if issubclass(LocalizationMonitor, kind)} == {ProbeMonitor, StreamMonitor}


def test_callbacks_that_others_add_get_their_hooks(memory: MemorySink) -> None:
    class Adding(pl.Callback):
        def __init__(self) -> None:
            self.early, self.late = Listing(), Listing()

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.held = trainer.callbacks
            self.held.append(self.early)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.held.append(self.late)

    adding = Adding()
    fit([adding, FilterMonitor()], max_epochs=1)
    assert list(adding.early.names) == ["setup", "fit start", "epoch end"]
    assert list(adding.late.names) == ["fit start", "epoch end"]


def test_a_coordinator_that_was_left_behind_is_replaced(memory: MemorySink) -> None:
    class Rash(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("no training today")

        def on_exception(self, *args: Any) -> None:
            raise ValueError("no end today")

    trainer = make_trainer([Rash(), FilterMonitor()], max_epochs=1)
    with pytest.raises(ValueError, match="no end today"):
        trainer.fit(Net(), loader(dataset()), loader(dataset(8)))
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Rash)]
    trainer.callbacks.append(FilterMonitor(name="second"))
    trainer.fit(Net(), loader(dataset()), loader(dataset(8)))
    assert steps(memory, "filters-second/net.0")
    assert not any(isinstance(callback, Coordinator) for callback in trainer.callbacks)
