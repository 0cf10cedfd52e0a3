"""What every sink can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from lightning_interp.sinks.records import Record

__all__ = ["Sink"]


class Sink(ABC):
    """Takes records. Nothing that was accepted is lost once :meth:`flush` returned."""

    accepts: ClassVar[frozenset[type]]

    @classmethod
    def for_logger(cls, logger: object) -> "Sink | None":
        return None

    @abstractmethod
    def write(self, record: Record, step: int) -> None:
        """Accept one record for the step at which it was recorded."""

    @abstractmethod
    def flush(self) -> None:
        """Bring everything that was accepted to where it is kept."""

    def close(self) -> None:
        """Flush, and take no more records."""
        self.flush()
