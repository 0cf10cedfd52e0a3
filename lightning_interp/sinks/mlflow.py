"""Records into MLflow runs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from lightning_interp.sinks._csv import histogram_rows, to_csv
from lightning_interp.sinks._loggers import has_base, live_experiment
from lightning_interp.sinks._names import portable_name
from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, Table, Text

__all__ = ["MLflowSink"]

_ALLOWED = "a-zA-Z0-9_. -"  # in the names of metrics and images, as in Lightning's MLFlowLogger
_MAX_METRIC = 250
_MAX_IMAGE = 150  # MLflow adds the step, a time and an identifier, and file systems allow 255 bytes
_MAX_BATCH = 1000  # metrics in one request


class MLflowSink(Sink):
    """Write to an MLflow run: metrics, images by step, and artifacts for what MLflow has no type for.

    Histograms and tables become ``lightning_interp/<tag>/<step>.csv`` among the run's artifacts, text ``.md``. In the
    names of metrics and images, characters that MLflow refuses become ``_``.

    Args:
        client: A ``mlflow.MlflowClient``.
        run_id: The run.

    Example:
        >>> from mlflow import MlflowClient  # doctest: +SKIP
        >>> client = MlflowClient("sqlite:///mlflow.db")  # doctest: +SKIP
        >>> run = client.create_run(client.create_experiment("cats"))  # doctest: +SKIP
        >>> sink = MLflowSink(client, run.info.run_id)  # doctest: +SKIP
        >>> sink.write(Scalar("norms/weight/total", 1.0), step=3)  # doctest: +SKIP
        >>> sink.close()  # doctest: +SKIP
    """

    accepts: ClassVar[frozenset[type]] = frozenset({Histogram, Picture, Scalar, Table, Text})

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._scalars: list[tuple[str, float, int, int]] = []
        self._artifacts: dict[str, str] = {}

    @classmethod
    def for_logger(cls, logger: object) -> Self | None:
        """Return a sink for a ``MLFlowLogger``."""
        client = live_experiment(logger) if has_base(logger, "MLFlowLogger") else None
        run_id = getattr(logger, "run_id", None)
        return None if client is None or run_id is None else cls(client, run_id)

    def write(self, record: Record, step: int) -> None:
        """Log a picture at once; the others wait for :meth:`flush`, to be sent in few requests."""
        if isinstance(record, Picture):
            name = portable_name(record.tag, _ALLOWED, _MAX_IMAGE)
            self._client.log_image(self._run_id, record.image.numpy(), key=name, step=step, synchronous=True)
        elif isinstance(record, Scalar):
            name = portable_name(record.tag, _ALLOWED, _MAX_METRIC)
            self._scalars.append((name, record.value, int(time.time() * 1000), step))
        elif isinstance(record, Text):
            self._artifacts[f"{portable_name(record.tag)}/{step:08d}.md"] = record.markdown
        elif isinstance(record, Table):
            self._artifacts[f"{portable_name(record.tag)}/{step:08d}.csv"] = to_csv(record)
        elif isinstance(record, Histogram):
            lines = [f"{left!r},{right!r},{count!r}" for left, right, count in histogram_rows(record)]
            self._artifacts[f"{portable_name(record.tag)}/{step:08d}.csv"] = "\n".join(["left,right,count", *lines, ""])

    def flush(self) -> None:
        """Log the waiting metrics and artifacts."""
        from mlflow.entities import Metric

        while batch := self._scalars[:_MAX_BATCH]:
            metrics = [Metric(*scalar) for scalar in batch]
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            del self._scalars[:_MAX_BATCH]
        if self._artifacts:
            with tempfile.TemporaryDirectory() as folder:
                for name, text in self._artifacts.items():
                    path = Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(text.encode("utf-8", "backslashreplace"))
                self._client.log_artifacts(self._run_id, folder, "lightning_interp")
            self._artifacts.clear()
