"""Records into Weights & Biases runs."""

from __future__ import annotations

import html
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from lightning_interp.sinks._loggers import has_base, live_experiment
from lightning_interp.sinks._names import portable_name
from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, ScalarLayout, Table, Text

__all__ = ["WandbSink"]

_MAX_BINS = 512  # of wandb.Histogram
_MAX_NAME = 100  # a table becomes an artifact, whose name holds the run as well and has 128 characters at most


class WandbSink(Sink):
    """Write to a wandb run, one row of its history for each step and flush.

    The row holds the step under the name of the x-axis that Lightning's ``WandbLogger`` defines, so that pictures and
    curves share it; wandb's own step is left to count rows. Text is shown as an HTML panel with its Markdown source.
    Histograms of more than 512 bins are merged to as many as wandb allows.

    Args:
        run: A ``wandb.Run``.
        step_name: The name of the x-axis.

    Example:
        >>> import wandb  # doctest: +SKIP
        >>> with wandb.init(mode="offline") as run:  # doctest: +SKIP
        ...     sink = WandbSink(run)
        ...     sink.write(Scalar("norms/weight/total", 1.0), step=3)
        ...     sink.close()
    """

    accepts: ClassVar[frozenset[type]] = frozenset({Histogram, Picture, Scalar, Table, Text})

    def __init__(self, run: Any, *, step_name: str = "trainer/global_step") -> None:
        self._run = run
        self._step_name = step_name
        self._step = 0
        self._row: dict[str, Any] = {}

    @classmethod
    def for_logger(cls, logger: object) -> Self | None:
        """Return a sink for a ``WandbLogger`` whose run is not disabled."""
        run = live_experiment(logger) if has_base(logger, "WandbLogger") else None
        if run is None or getattr(run, "disabled", False):
            return None
        syncs_tensorboard = getattr(logger, "_wandb_init", {}).get("sync_tensorboard")
        return cls(run, step_name="global_step" if syncs_tensorboard else "trainer/global_step")

    def write(self, record: Record, step: int) -> None:
        """Add a record to the row of its step, which :meth:`flush` or the next row sends."""
        if isinstance(record, ScalarLayout):
            return
        name, value = portable_name(record.tag, max_length=_MAX_NAME), _to_wandb(record)
        if step != self._step or name in self._row:
            self.flush()
        self._step = step
        self._row[name] = value

    def flush(self) -> None:
        """Hand the row to wandb, whose own process writes and uploads it."""
        if self._row:
            row, self._row = self._row, {}
            self._run.log({**row, self._step_name: self._step})


def _to_wandb(record: Picture | Scalar | Histogram | Table | Text) -> Any:
    import wandb

    if isinstance(record, Picture):
        return wandb.Image(record.image.numpy(), mode="RGB")
    if isinstance(record, Scalar):
        return record.value
    if isinstance(record, Histogram):
        return wandb.Histogram(np_histogram=_merge_bins(record))
    if isinstance(record, Table):
        rows = [list(row) for row in record.rows]
        return wandb.Table(columns=list(record.columns), data=rows, allow_mixed_types=True)
    text = record.markdown.encode("utf-8", "backslashreplace").decode()
    return wandb.Html(f'<pre style="white-space: pre-wrap">{html.escape(text, quote=False)}</pre>')


def _merge_bins(record: Histogram) -> tuple[Any, Any]:
    """Sum neighbouring bins where there are more than wandb allows; the last may be narrower."""
    counts, edges = record.counts.numpy(), record.edges.numpy()
    merged = -(-len(counts) // _MAX_BINS)
    starts = np.arange(0, len(counts), merged)
    return np.add.reduceat(counts, starts), np.append(edges[starts], edges[-1])
