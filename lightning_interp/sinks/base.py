"""The contract of a sink."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from typing_extensions import Self

from lightning_interp.sinks.records import Record

__all__ = ["Sink"]


class Sink(ABC):
    """Base class of the stores that records are written to.

    A subclass names the record classes in :attr:`accepts`, implements :meth:`write` and :meth:`flush`, and
    :meth:`for_logger` if it belongs to a kind of logger. Once registered (:func:`lightning_interp.sinks.register`), it
    serves every logger that it recognises.

    A run passes a record only to the sinks that accept its class; one that no sink of the run accepts goes to a
    :class:`FileSink` in the run's folder. :meth:`write` and :meth:`flush` are called from one thread, which is not the
    training thread, and :meth:`close` after it has ended. No accepted record is lost after :meth:`flush` returned.

    Attributes:
        accepts: The record classes that this sink can store.

    Example:
        >>> from lightning_interp.sinks import Scalar
        >>> class LastValue(Sink):
        ...     accepts = frozenset({Scalar})
        ...
        ...     def __init__(self) -> None:
        ...         self.values: dict[str, float] = {}
        ...
        ...     def write(self, record: Record, step: int) -> None:
        ...         if isinstance(record, Scalar):
        ...             self.values[record.tag] = record.value
        ...
        ...     def flush(self) -> None:
        ...         pass
        >>> sink = LastValue()
        >>> sink.write(Scalar("norms/weight/total", 1.0), step=3)
        >>> sink.values
        {'norms/weight/total': 1.0}
    """

    accepts: ClassVar[frozenset[type]]

    @classmethod
    def for_logger(cls, logger: object) -> Self | None:
        """Return a sink for a logger, or None if the logger is of another kind or disabled on this rank.

        Args:
            logger: Any logger of a Trainer. Recognise it without importing its package, which may be absent: by the
                class names along its MRO, or by the methods of its ``experiment``.
        """
        return None

    @abstractmethod
    def write(self, record: Record, step: int) -> None:
        """Accept a record; one that is not accepted is ignored.

        Args:
            record: What to store.
            step: The global step it belongs to.
        """

    @abstractmethod
    def flush(self) -> None:
        """Store everything that was accepted."""

    def close(self) -> None:
        """Flush; the sink is not used afterwards."""
        self.flush()
