"""Records kept in a list: for tests and notebooks."""

from __future__ import annotations

from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, ScalarLayout, Text

__all__ = ["MemorySink"]


class MemorySink(Sink):
    """Keeps (step, record) pairs.

    Example:
        >>> from lightning_interp.sinks.records import Scalar
        >>> sink = MemorySink()
        >>> sink.write(Scalar("norms/weight/total", 1.0), step=3)
        >>> sink.records
        [(3, Scalar(tag='norms/weight/total', value=1.0))]
    """

    accepts = frozenset({Picture, Scalar, Histogram, Text, ScalarLayout})

    def __init__(self) -> None:
        self.records: list[tuple[int, Record]] = []

    def write(self, record: Record, step: int) -> None:
        """Keep a record."""
        self.records.append((step, record))

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing to close."""
