"""What every sink can do."""

from __future__ import annotations

from typing import Protocol

from lightning_interp.sinks.records import Record

__all__ = ["Sink"]


class Sink(Protocol):
    """Takes records. Nothing that was accepted is lost once :meth:`flush` returned."""

    def write(self, record: Record, step: int) -> None:
        """Accept one record for the step at which it was seen."""

    def flush(self) -> None:
        """Bring everything that was accepted to where it is kept."""

    def close(self) -> None:
        """Flush, and take no more records."""
