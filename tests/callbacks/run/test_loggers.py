"""Where records go, with each kind of logger and with none."""

from __future__ import annotations

import csv
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_interp import FilterMonitor, NormMonitor, WeightHistogramMonitor, default_monitors
from lightning_interp.callbacks import Monitor
from lightning_interp.sinks import FileSink
from tests.helpers.runs import Net, dataset, fit, loader, make_trainer, read_events


def monitors(**options: Any) -> list[Monitor]:
    return [FilterMonitor(on_error="raise", **options), WeightHistogramMonitor(on_error="raise", **options)]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_several_tensorboard_loggers_all_get_everything(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(str(tmp_path / name)) for name in "ab"]
    fit(monitors(), logger=[*loggers, CSVLogger(str(tmp_path / "c"))])
    for logger in loggers:
        events = read_events(logger.log_dir)
        assert [event.step for event in events.Images("filters/net.0")] == [0, 2, 5]
        assert [event.step for event in events.Scalars("weights/not_finite")] == [0, 2, 5]
    assert not list(tmp_path.rglob("*.png"))


def test_without_tensorboard_files_go_into_the_runs_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(str(tmp_path))
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        fit(default_monitors(probe=2, on_error="raise"), logger=logger)
    folder = Path(logger.log_dir) / "lightning_interp"
    (said,) = [message for message in caplog.messages if "lightning_interp" in message]
    assert str(folder) in said
    names = files(folder)
    for tag in ("cam/gradcam", "saliency/saliency", "filters/net.0", "norms/weight"):
        assert {f"{tag}/{step:08d}.png" for step in (0, 2, 5)} <= names
    assert "histograms.csv" in names
    assert "scalars.csv" not in names, "the logger takes scalars"
    with (Path(logger.log_dir) / "lightning_interp.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["tag"] == "norms/weight/total"] == ["0", "2", "5"]
    with (folder / "histograms.csv").open() as file:
        counted = [float(row["count"]) for row in csv.DictReader(file) if row["tag"] == "weights/net.0.weight"]
    assert sum(counted) == 3 * 4 * 3 * 9


def test_without_any_logger_files_go_below_the_root(tmp_path: Path) -> None:
    for version in (0, 1):
        fit(monitors(), logger=False, default_root_dir=str(tmp_path))
        folder = tmp_path / "lightning_interp" / f"version_{version}"
        assert {"filters/net.0/00000005.png", "scalars.csv", "histograms.csv"} <= files(folder)
    assert files(tmp_path / "lightning_interp" / "version_0") == files(folder)


def test_what_one_trainer_does_goes_into_one_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        trainer = fit(monitors(), logger=False, default_root_dir=str(tmp_path))
        trainer.test(trainer.lightning_module, loader(dataset(8)), verbose=False)
    folder = tmp_path / "lightning_interp" / "version_0"
    assert {"filters/net.0/00000005.png", "filters-test/net.0/00000006.png"} <= files(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert len([message for message in caplog.messages if "lightning_interp" in message]) == 1


def test_a_trial_run_leaves_nothing(tmp_path: Path) -> None:
    module = Net()
    fit(default_monitors(probe=2, on_error="raise"), module, fast_dev_run=2, default_root_dir=str(tmp_path))
    assert module.trained == 2
    assert not files(tmp_path)


def test_sanity_checking_writes_nothing(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    spy = pl.Callback()
    spy.on_sanity_check_end = lambda *args: seen.append(files(tmp_path))  # type: ignore[method-assign]
    fit([*monitors(), spy], num_sanity_val_steps=2, default_root_dir=str(tmp_path))
    assert seen == [set()]
    assert files(tmp_path)


class Stopper(pl.Callback):
    def __init__(self, error: BaseException, batch: int) -> None:
        self.error, self.batch = error, batch

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if module.trained == self.batch:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of luck"), SystemExit(3)], ids=repr)
def test_what_was_seen_until_a_run_ends_early_can_be_read(tmp_path: Path, error: BaseException) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    before = signal.getsignal(signal.SIGINT)
    try:
        # Lightning turns Ctrl+C into SystemExit, and is deaf to it from then on.
        with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
            fit([*default_monitors(probe=2, on_error="raise"), Stopper(error, batch=4)], logger=logger)
    finally:
        signal.signal(signal.SIGINT, before)
    events = read_events(logger.log_dir)
    for tag in ("cam/gradcam", "saliency/saliency", "filters/net.0", "norms/weight"):
        assert [event.step for event in events.Images(tag)] == [0, 2]
    assert [event.step for event in events.Scalars("norms/gradient/total")] == [2]


def test_an_error_in_the_training_step_leaves_the_log_readable(tmp_path: Path) -> None:
    class Unlucky(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trained == 4:
                raise ZeroDivisionError("in the training step")
            return super().training_step(batch, batch_idx)

    logger = TensorBoardLogger(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        fit(monitors(), Unlucky(), logger=logger)
    assert [event.step for event in read_events(logger.log_dir).Images("filters/net.0")] == [0, 2]


def test_training_goes_on_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: FileSink) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSink, "flush", full)
    module = Net()
    with pytest.warns(UserWarning, match="No space left on device"):
        fit([NormMonitor(), FilterMonitor()], module, default_root_dir=str(tmp_path))
    assert module.trained == 6


def test_training_goes_on_where_a_record_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: FileSink, record: Any, step: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSink, "write", full)
    module = Net()
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        fit([FilterMonitor(every_n_train_steps=1)], module, default_root_dir=str(tmp_path))
    assert module.trained == 6
    assert len([each for each in caught if "disabled" in str(each.message)]) == 1
    assert not files(tmp_path)


def test_a_trainer_can_be_used_twice(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    trainer = make_trainer(default_monitors(probe=2, on_error="raise"), logger=logger, max_epochs=1)
    module = Net()
    trainer.fit(module, loader(dataset()), loader(dataset(8)))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(dataset()), loader(dataset(8)))
    events = read_events(logger.log_dir)
    for tag in ("cam/gradcam", "filters/net.0", "norms/weight"):
        assert [event.step for event in events.Images(tag)] == [0, 2, 5]
    # TensorBoard reads the first; the second fit's says the same.
    layouts = {event.tensor_proto.string_val[0] for event in events.Tensors("custom_scalars__config__")}
    assert len(layouts) == 1


def test_an_error_that_ends_the_run_is_not_hidden_by_one_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FileSink, record: Any, step: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSink, "write", full)
    callbacks = [FilterMonitor(on_error="raise"), Stopper(RuntimeError("out of luck"), batch=1)]
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(RuntimeError, match="out of luck"):
        fit(callbacks, default_root_dir=str(tmp_path))
