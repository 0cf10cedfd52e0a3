"""Scalars into a CSV file beside Lightning's."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import Self

from lightning_interp.sinks._csv import GrowingCSV
from lightning_interp.sinks._loggers import has_base, live_experiment
from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.records import Record, Scalar

__all__ = ["CSVSink"]


class CSVSink(Sink):
    """Write scalars as rows ``step,tag,value`` of ``lightning_interp.csv`` in a ``CSVLogger``'s folder.

    The file is separate from the logger's ``metrics.csv``, whose writer is used by the training thread: a row added by
    another thread between its save and its reset is lost.

    Args:
        folder: The logger's ``log_dir``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = CSVSink(Path(folder))
        ...     sink.write(Scalar("norms/weight/total", 1.5), step=3)
        ...     sink.close()
        ...     (Path(folder) / "lightning_interp.csv").read_text().splitlines()
        ['step,tag,value', '3,norms/weight/total,1.5']
    """

    accepts: ClassVar[frozenset[type]] = frozenset({Scalar})

    def __init__(self, folder: Path) -> None:
        self._file = GrowingCSV(Path(folder) / "lightning_interp.csv", ("step", "tag", "value"))

    @classmethod
    def for_logger(cls, logger: object) -> Self | None:
        """Return a sink for Lightning's ``CSVLogger`` with a local folder."""
        if not has_base(logger, "CSVLogger") or live_experiment(logger) is None:
            return None
        folder = str(getattr(logger, "log_dir", ""))
        return cls(Path(folder)) if folder and "://" not in folder else None

    def write(self, record: Record, step: int) -> None:
        """Keep a scalar for :meth:`flush`."""
        if isinstance(record, Scalar):
            self._file.rows.append((step, record.tag, record.value))

    def flush(self) -> None:
        """Append the scalars to the file."""
        self._file.flush()
