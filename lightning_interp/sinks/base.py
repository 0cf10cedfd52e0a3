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

    The caller of :meth:`write` filters: a record is passed only to sinks whose :meth:`can_write` is true, and a record
    that no sink of a run can write goes to the :class:`FileSink` in the run's folder. :meth:`write`, :meth:`flush` and
    :meth:`close` are called from one thread, beside the training thread. No accepted record is lost after :meth:`flush`
    returned.

    Attributes:
        accepts: The record classes that this sink can store.

    Example:
        >>> from lightning_interp.sinks import Scalar, Text
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
        >>> LastValue().can_write(Scalar("norms/weight/total", 1.0)), LastValue().can_write(Text("a/b", "text"))
        (True, False)
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

    def can_write(self, record: Record) -> bool:
        """Whether this sink accepts a record."""
        return isinstance(record, tuple(self.accepts))

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
