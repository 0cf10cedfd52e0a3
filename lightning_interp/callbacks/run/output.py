"""How records reach their sinks, and what becomes of a sink that fails."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable

from lightning_interp.sinks import Sink
from lightning_interp.sinks.records import Record, ScalarLayout

__all__ = ["flush", "reach", "retagged", "told", "with_suffix", "write"]


def reach(sinks: list[Sink], act: Callable[[Sink], None]) -> tuple[list[tuple[Sink, Exception]], Exception | None]:
    """Act on every sink. One that keeps nothing is taken off the list; the fault of a record is none of the sink's.

    Args:
        sinks: Where records go; changed in place.
        act: What is done with each.

    Returns:
        The sinks that were given up, each with its error, and the error of the record, if it had one.

    Example:
        >>> from lightning_interp.sinks import MemorySink
        >>> reach([MemorySink()], flush)
        ([], None)
    """
    lost, refused = [], None
    for sink in list(sinks):
        try:
            act(sink)
        except Exception as error:
            if _is_lost(error):
                sinks.remove(sink)
                lost.append((sink, error))
            else:
                refused = error
    return lost, refused


def write(sink: Sink, record: Record, step: int) -> None:
    """Write one record."""
    sink.write(record, step)


def flush(sink: Sink) -> None:
    """Bring what was written to its place."""
    sink.flush()


def retagged(record: Record, suffix: str) -> Record:
    """The record with a suffix behind its tag's kind."""
    if not suffix or isinstance(record, ScalarLayout):
        return record
    return dataclasses.replace(record, tag=with_suffix(record.tag, suffix))


def with_suffix(tag: str, suffix: str) -> str:
    """Put a suffix behind a tag's kind.

    Example:
        >>> with_suffix("cam/gradcam", "-test")
        'cam-test/gradcam'
    """
    kind, _, what = tag.partition("/")
    return f"{kind}{suffix}/{what}"


def told(error: BaseException) -> str:
    """An error with its traceback, as text."""
    return "".join(traceback.format_exception(error)).strip()


def _is_lost(error: Exception) -> bool:
    """Whether a sink failed by itself, rather than by the record that it was given."""
    return isinstance(error, OSError) or (isinstance(error, ValueError) and "closed file" in str(error))
