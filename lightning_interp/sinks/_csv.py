"""CSV files that grow over a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_interp.sinks.records import Histogram, Table

__all__ = ["GrowingCSV", "histogram_rows", "to_csv"]


class GrowingCSV:
    """Rows that are appended to a CSV file when it is flushed.

    Args:
        path: The file; it and its folder are made by the first flush with a row.
        columns: The header of a new file.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.rows: list[Sequence[object]] = []

    def flush(self) -> None:
        """Append the waiting rows."""
        if not self.rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(self.columns)
            writer.writerows(self.rows)
        self.rows.clear()


def histogram_rows(record: Histogram) -> Iterable[tuple[float, float, float]]:
    """Yield the left edge, the right edge and the count of each bin."""
    edges = record.edges.tolist()
    return zip(edges[:-1], edges[1:], record.counts.tolist(), strict=True)


def to_csv(record: Table) -> str:
    """Return a table as the text of a CSV file, numbers with all digits and None as an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([record.columns, *record.rows])
    return text.getvalue()
