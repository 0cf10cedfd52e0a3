"""What sinks for trackers send: rows by step, few requests; with the real loggers where they are installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_interp.sinks import Histogram, Scalar, Text
from lightning_interp.sinks.mlflow import MLflowSink
from lightning_interp.sinks.registry import sinks_for
from lightning_interp.sinks.wandb import WandbSink
from tests.helpers.stores import sample, wandb_history


class Run:
    """A run that, unlike wandb's, takes no step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, data: dict[str, Any]) -> None:
        self.rows.append(data)


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("wandb")
    for name in ("Image", "Html", "Table", "Histogram"):
        setattr(module, name, lambda *args, name=name, **options: (name, args, options))
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.mark.usefixtures("fake_wandb")
def test_a_row_holds_what_was_written_for_a_step() -> None:
    run = Run()
    sink = WandbSink(run)
    for step in (0, 4):
        for number in range(3):
            sink.write(Scalar(f"norms/{number}", number / 4), step)
    assert run.rows == [{"norms/0": 0.0, "norms/1": 0.25, "norms/2": 0.5, "trainer/global_step": 0}]
    sink.flush()
    sink.flush()
    assert [row["trainer/global_step"] for row in run.rows] == [0, 4]


@pytest.mark.usefixtures("fake_wandb")
def test_a_name_that_is_written_twice_makes_a_second_row() -> None:
    run = Run()
    sink = WandbSink(run, step_name="global_step")
    for value in (1.0, 2.0):
        sink.write(Scalar("norms/total", value), 3)
    sink.close()
    assert run.rows == [{"norms/total": value, "global_step": 3} for value in (1.0, 2.0)]


@pytest.mark.usefixtures("fake_wandb")
@pytest.mark.parametrize("bins", [1, 512, 513, 1000, 4096])
def test_histograms_are_merged_to_what_wandb_takes(bins: int) -> None:
    run = Run()
    counts = torch.arange(1.0, bins + 1, dtype=torch.float64)
    edges = torch.linspace(-1, 1, bins + 1, dtype=torch.float64)
    sink = WandbSink(run)
    sink.write(Histogram("weights/fc", counts, edges, 0.0, 0.0), 0)
    sink.close()
    merged_counts, merged_edges = run.rows[0]["weights/fc"][2]["np_histogram"]
    assert len(merged_counts) <= 512
    assert len(merged_edges) == len(merged_counts) + 1
    assert merged_counts.sum() == counts.sum()
    assert (merged_edges[0], merged_edges[-1]) == (-1, 1)
    assert np.isin(merged_edges, edges.numpy()).all()
    # Up to each edge as many values as before.
    below = np.concatenate([[0], counts.cumsum(0).numpy()])[np.searchsorted(edges.numpy(), merged_edges)]
    assert np.concatenate([[0], merged_counts.cumsum()]).tolist() == below.tolist()


@pytest.mark.usefixtures("fake_wandb")
@pytest.mark.parametrize("syncs", [True, False])
def test_wandbs_axis_is_lightnings(syncs: bool) -> None:
    logger = type("WandbLogger", (), {"experiment": Run(), "_wandb_init": {"sync_tensorboard": syncs}})()
    (sink,) = sinks_for([logger])
    sink.write(Scalar("a/b", 1.0), 2)
    sink.flush()
    assert logger.experiment.rows == [{"a/b": 1.0, "global_step" if syncs else "trainer/global_step": 2}]


def test_mlflow_gets_metrics_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    entities: Any = ModuleType("mlflow.entities")
    entities.Metric = lambda *args: args
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    batches: list[list[Any]] = []
    client = SimpleNamespace(log_batch=lambda run_id, metrics, synchronous: batches.append(metrics))
    sink = MLflowSink(client, "run")
    for number in range(2500):
        sink.write(Scalar("norms/total", float(number)), number)
    sink.flush()
    sink.flush()
    assert [len(batch) for batch in batches] == [1000, 1000, 500]
    assert [(value, step) for batch in batches for _, value, _, step in batch] == [(float(n), n) for n in range(2500)]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("WANDB_ERROR_REPORTING", "false"), ("WANDB_SILENT", "true"), ("WANDB_MODE", "offline")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quiet")
def test_a_real_wandb_logger(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from pytorch_lightning.loggers import WandbLogger

    logger = WandbLogger(offline=True, save_dir=tmp_path)
    sinks = sinks_for([logger])
    assert [type(sink) for sink in sinks] == [WandbSink]
    for step in (5, 9):
        for _ in range(3):  # wandb's own step runs ahead of the trainer's
            logger.log_metrics({"loss": 1.0}, step=step)
        for record in [sample(kind, f"kind/{kind.__name__}", 1) for kind in WandbSink.accepts]:
            sinks[0].write(record, step)
        sinks[0].flush()
    sinks[0].close()
    logger.experiment.finish()
    wandb.teardown()
    rows = list(wandb_history(tmp_path))
    names = {f"kind/{kind.__name__}" for kind in WandbSink.accepts}
    assert [row["trainer/global_step"] for row in rows if "loss" in row] == [5, 5, 5, 9, 9, 9]
    assert [row["trainer/global_step"] for row in rows if names <= set(row)] == [5, 9]


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quiet")
def test_a_disabled_wandb_logger_gets_no_sink(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from pytorch_lightning.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    assert sinks_for([logger]) == []
    logger.experiment.finish()
    wandb.teardown()


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file://{}/runs"])
def test_a_real_mlflow_logger(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from pytorch_lightning.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=store.format(tmp_path), artifact_location=str(tmp_path / "artifacts"))
    sinks = sinks_for([logger])
    assert [type(sink) for sink in sinks] == [MLflowSink]
    logger.log_metrics({"loss": 1.0}, step=5)
    for record in [sample(kind, f"kind/{kind.__name__}", 1) for kind in MLflowSink.accepts]:
        sinks[0].write(record, 5)
    for value in (float("nan"), float("inf")):
        sinks[0].write(Scalar("norms/total", value), 6)
    sinks[0].close()
    logger.finalize("success")
    sinks[0].write(Text("after/the end", "text"), 7)  # a run may be written to once it is finished
    sinks[0].close()
    run = logger.experiment.get_run(logger.run_id)
    assert {"loss", "kind/Scalar", "norms/total"} == set(run.data.metrics)
    (metric,) = logger.experiment.get_metric_history(logger.run_id, "kind/Scalar")
    assert (metric.step, metric.value) == (5, 1.25)
    names = {path.name for path in (tmp_path / "artifacts").rglob("*") if path.is_file()}
    assert {"00000005.md", "00000005.csv", "00000007.md"} <= names
    assert any(name.endswith(".png") and "+5+" in name.replace("%", "+") for name in names)
