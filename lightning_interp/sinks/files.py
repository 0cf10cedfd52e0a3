"""Records into PNG and CSV files, for runs whose logger takes no pictures."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from PIL import Image

from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, Text

__all__ = ["FileSink"]

_COLUMNS = {
    "scalars.csv": ("step", "tag", "value"),
    "histograms.csv": ("step", "tag", "left", "right", "count"),
}


class FileSink(Sink):
    """Writes ``<tag>/<step>.png`` and ``.md``, ``scalars.csv`` and ``histograms.csv`` into a folder.

    Args:
        folder: Made when the first record comes. Nothing is written outside it, whatever a tag says.

    Example:
        >>> import tempfile
        >>> from lightning_interp.sinks.records import Scalar
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = FileSink(Path(folder))
        ...     sink.write(Scalar("norms/weight/total", 1.5), step=3)
        ...     sink.flush()
        ...     (Path(folder) / "scalars.csv").read_text().splitlines()
        ['step,tag,value', '3,norms/weight/total,1.5']
    """

    accepts = frozenset({Picture, Scalar, Histogram, Text})

    def __init__(self, folder: Path, accepts=None) -> None:
        if accepts is not None:
            self.accepts = frozenset(accepts)
        self.folder = Path(folder)
        self._rows: dict[str, list[tuple[object, ...]]] = {name: [] for name in _COLUMNS}

    def write(self, record: Record, step: int) -> None:
        """Write a picture or text at once; numbers wait for :meth:`flush`."""
        if isinstance(record, Picture):
            path = self._file(record.tag, step, "png")
            part = path.with_suffix(".part")  # so that a full disk or a killed process leaves no half a picture
            try:
                Image.fromarray(record.image.numpy()).save(part, format="png")
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        elif isinstance(record, Text):
            self._file(record.tag, step, "md").write_text(record.markdown, encoding="utf-8", errors="backslashreplace")
        elif isinstance(record, Scalar):
            self._rows["scalars.csv"].append((step, record.tag, record.value))
        elif isinstance(record, Histogram):
            edges = record.edges.tolist()
            bins = zip(edges[:-1], edges[1:], record.counts.tolist(), strict=True)
            self._rows["histograms.csv"].extend((step, record.tag, left, right, count) for left, right, count in bins)

    def flush(self) -> None:
        """Append the numbers to their tables."""
        for name, rows in self._rows.items():
            if not rows:
                continue
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
                table = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    table.writerow(_COLUMNS[name])
                table.writerows(rows)
            rows.clear()

    def close(self) -> None:
        """Flush."""
        self.flush()

    def _file(self, tag: str, step: int, suffix: str) -> Path:
        folder = self.folder.joinpath(*map(_plain, tag.split("/")))
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{step:08d}.{suffix}"


def _plain(part: str) -> str:
    """A part of a tag as a name that every file system takes (at most 255 bytes), and that leads nowhere else."""
    return re.sub(r"[^\w.\-]", "_", part)[:60].strip(".") or "_"
