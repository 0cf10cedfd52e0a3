"""Records in a list, for tests and notebooks."""

from __future__ import annotations

from typing import ClassVar

from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, ScalarLayout, Table, Text

__all__ = ["MemorySink"]


class MemorySink(Sink):
    """Keep (step, record) pairs.

    Attributes:
        records: The pairs, in the order in which they were written.

    Example:
        >>> from lightning_interp.sinks import Scalar
        >>> sink = MemorySink()
        >>> sink.write(Scalar("norms/weight/total", 1.0), step=3)
        >>> sink.records
        [(3, Scalar(tag='norms/weight/total', value=1.0))]
    """

    accepts: ClassVar[frozenset[type]] = frozenset({Histogram, Picture, Scalar, ScalarLayout, Table, Text})

    def __init__(self) -> None:
        self.records: list[tuple[int, Record]] = []

    def write(self, record: Record, step: int) -> None:
        """Append a record."""
        self.records.append((step, record))

    def flush(self) -> None:
        """Do nothing: records are kept at once."""
