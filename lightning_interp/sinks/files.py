"""Records into PNG, Markdown and CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from lightning_interp.sinks._csv import GrowingCSV, histogram_rows, to_csv
from lightning_interp.sinks._names import portable_name
from lightning_interp.sinks._png import encode_png
from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, Table, Text

__all__ = ["FileSink"]


class FileSink(Sink):
    """Write a folder of ``<tag>/<step>.png``, ``.md`` and ``.csv``, with ``scalars.csv`` and ``histograms.csv``.

    Args:
        folder: Made by the first record. Nothing is written outside it, whatever a tag is.

    Example:
        >>> import tempfile
        >>> from lightning_interp.sinks import Scalar
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = FileSink(Path(folder))
        ...     sink.write(Scalar("norms/weight/total", 1.5), step=3)
        ...     sink.flush()
        ...     (Path(folder) / "scalars.csv").read_text().splitlines()
        ['step,tag,value', '3,norms/weight/total,1.5']
    """

    accepts: ClassVar[frozenset[type]] = frozenset({Histogram, Picture, Scalar, Table, Text})

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._scalars = GrowingCSV(self.folder / "scalars.csv", ("step", "tag", "value"))
        self._histograms = GrowingCSV(self.folder / "histograms.csv", ("step", "tag", "left", "right", "count"))

    def write(self, record: Record, step: int) -> None:
        """Write a picture, table or text; scalars and histograms wait for :meth:`flush`."""
        if isinstance(record, Picture):
            self._write_file(record.tag, step, "png", encode_png(record.image))
        elif isinstance(record, Text):
            self._write_file(record.tag, step, "md", record.markdown.encode("utf-8", "backslashreplace"))
        elif isinstance(record, Table):
            self._write_file(record.tag, step, "csv", to_csv(record).encode("utf-8", "backslashreplace"))
        elif isinstance(record, Scalar):
            self._scalars.rows.append((step, record.tag, record.value))
        elif isinstance(record, Histogram):
            self._histograms.rows.extend((step, record.tag, *row) for row in histogram_rows(record))

    def flush(self) -> None:
        """Append the scalars and histograms to their files."""
        self._scalars.flush()
        self._histograms.flush()

    def _write_file(self, tag: str, step: int, suffix: str, content: bytes) -> None:
        folder = self.folder / portable_name(tag)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{step:08d}.{suffix}"
        part = path.with_suffix(".part")  # so that a full disk or a killed process leaves no incomplete file
        try:
            part.write_bytes(content)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
