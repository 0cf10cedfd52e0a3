"""Which sink a logger gets."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightning_interp.errors import ConfigurationError
from lightning_interp.sinks import (
    MemorySink,
    Picture,
    Record,
    Scalar,
    Sink,
    TensorBoardSink,
    register,
    registry,
)
from lightning_interp.sinks.csv_logs import CSVSink
from lightning_interp.sinks.mlflow import MLflowSink
from lightning_interp.sinks.registry import sinks_for
from lightning_interp.sinks.wandb import WandbSink
from tests.helpers.stores import rows_of


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_classes", list(registry._classes))


def kinds(*loggers: object) -> list[type[Sink]]:
    return [type(sink) for sink in sinks_for(loggers)]


class MySink(MemorySink):
    @classmethod
    def for_logger(cls, logger: object) -> MySink | None:
        return cls() if hasattr(logger, "is_mine") else None


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_each_logger_gets_its_sink(tmp_path: Path, package: str) -> None:
    loggers = importlib.import_module(f"{package}.loggers")
    tensorboard, csv_logger = loggers.TensorBoardLogger(str(tmp_path)), loggers.CSVLogger(str(tmp_path))
    assert kinds(csv_logger, object(), tensorboard, None) == [CSVSink, TensorBoardSink]
    tensorboard.finalize("success")


def test_subclasses_of_loggers_are_recognised(tmp_path: Path) -> None:
    class OurCSVLogger(CSVLogger):
        pass

    assert kinds(OurCSVLogger(str(tmp_path))) == [CSVSink]


def test_disabled_loggers_get_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kinds(DummyLogger()) == []
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    loggers = [TensorBoardLogger(str(tmp_path)), CSVLogger(str(tmp_path))]
    assert kinds(*loggers) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "experiment", "expected"),
    [
        ("WandbLogger", SimpleNamespace(disabled=False), [WandbSink]),
        ("WandbLogger", SimpleNamespace(disabled=True), []),
        ("WandbLogger", type("RunDisabled", (), {})(), []),
        ("WandbLogger", None, []),
        ("MLFlowLogger", SimpleNamespace(), [MLflowSink]),
        ("MLFlowLogger", type("_DummyExperiment", (), {})(), []),
        ("NeptuneLogger", SimpleNamespace(), []),
    ],
)
def test_loggers_are_known_by_name_without_their_packages(name: str, experiment: Any, expected: list[Any]) -> None:
    base = type(name, (), {"experiment": experiment, "run_id": "r"})
    assert kinds(type("Derived", (base,), {})()) == expected


def test_csv_loggers_on_other_file_systems_get_none() -> None:
    logger = type("CSVLogger", (), {"experiment": SimpleNamespace(), "log_dir": "s3://bucket/version_0"})()
    assert kinds(logger) == []


def test_a_users_sink_comes_first(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    logger.is_mine = True  # type: ignore[attr-defined]
    assert kinds(logger) == [CSVSink]
    assert register(MySink) is MySink
    assert kinds(logger, CSVLogger(str(tmp_path))) == [MySink, CSVSink]
    register(MySink, first=False)
    assert kinds(logger) == [CSVSink]
    assert registry._classes.count(MySink) == 1


def test_register_is_a_decorator() -> None:
    logger = SimpleNamespace(is_mine=True)

    @register
    class First(MySink):
        pass

    @register(first=False)
    class Last(MySink):
        pass

    assert kinds(logger) == [First]
    assert registry._classes[0] is First
    assert registry._classes[-1] is Last


class Unfinished(Sink):
    accepts = frozenset({Scalar})

    def write(self, record: Record, step: int) -> None:
        pass


class Unclear(MemorySink):
    accepts = (Picture, Scalar)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (MemorySink(), "register takes a subclass of lightning_interp.sinks.Sink, got <"),
        (dict, "register takes a subclass of lightning_interp.sinks.Sink, got <class 'dict'>"),
        ("TensorBoardSink", "got 'TensorBoardSink'"),
        (Unfinished, "Unfinished cannot be registered as a sink: it lacks flush"),
        (Unclear, r"Unclear.accepts takes a frozenset of record classes, .*got \(<class"),
    ],
)
def test_what_is_no_sink_class_is_refused(wrong: Any, message: str) -> None:
    before = list(registry._classes)
    with pytest.raises(ConfigurationError, match=message):
        register(wrong)
    assert registry._classes == before


def test_a_csv_loggers_own_file_is_not_touched(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), flush_logs_every_n_steps=1)
    (sink,) = sinks_for([logger])
    for step in (0, 1):
        logger.log_metrics({"loss": 0.5}, step=step)
        sink.write(Scalar("norms/weight/total", 1.5), step)
        sink.flush()
    logger.finalize("success")
    folder = Path(logger.log_dir)
    assert [set(row) for row in rows_of(folder / "metrics.csv")] == [{"loss", "step"}] * 2
    assert [row["step"] for row in rows_of(folder / "lightning_interp.csv")] == ["0", "1"]
