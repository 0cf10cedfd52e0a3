"""From records to sinks, on the background thread; what becomes of a sink that fails."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import get_args

from lightning_interp.callbacks._lightning import Trainer, rank_zero_info
from lightning_interp.callbacks.contract import Monitor
from lightning_interp.callbacks.run.failures import Failures, format_exception
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.callbacks.run.trainer import run_folder
from lightning_interp.errors import describe
from lightning_interp.sinks import FileSink, Sink
from lightning_interp.sinks.background import BackgroundWriter
from lightning_interp.sinks.records import Picture, Record, ScalarLayout
from lightning_interp.sinks.registry import sinks_for

__all__ = ["Drawing", "Output", "open_sinks", "with_suffix", "write_to_sinks"]

# A monitor (None: the run itself), and what makes its records on the writer's thread.
Drawing = tuple[Monitor | None, Callable[[], Iterable[Record]]]


class Output:
    """Draws the records of a run and writes them to its sinks, in order, on one background thread.

    Args:
        sinks: The sinks, each with the kinds of records that it gets; empty on ranks that do not write.
        monitors: All monitors of the run.
        failures: Where the failures of monitors and sinks are noted.
    """

    def __init__(self, sinks: Mapping[Sink, frozenset[type]], monitors: Sequence[Monitor], failures: Failures) -> None:
        self.sinks = list(sinks)
        self._kinds = {sink: tuple(kinds) for sink, kinds in sinks.items()}
        self.writer = BackgroundWriter()
        self._monitors = list(monitors)
        self._failures = failures
        self._lost: list[tuple[Sink, Exception]] = []  # not reported yet

    def submit(self, drawings: Sequence[Drawing], step: int, suffix: str = "") -> None:
        """Draw and write records later; what :attr:`Drawing` holds must not change any more.

        Args:
            drawings: The monitors and what makes their records.
            step: The step that the records carry.
            suffix: Put behind the kind of each tag.
        """
        if drawings:
            self.writer.submit(functools.partial(self._write, list(drawings), step, suffix))

    def report_lost_sinks(self) -> None:
        """Warn once of each sink that takes no more records."""
        lost, self._lost = self._lost, []
        for sink, error in lost:
            self._failures.mark_reported(error)
            rest = "the other loggers get everything" if self.sinks else "every monitor is disabled"
            warnings.warn(
                f"lightning_interp writes no more through {type(sink).__name__}, which failed; {rest} from here on, "
                f"and training goes on.\n{format_exception(error)}",
                stacklevel=2,
            )

    def close(self) -> None:
        """Write everything, and close the sinks."""
        self.writer.close()
        self.report_lost_sinks()
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                warnings.warn(f"lightning_interp could not finish writing: {format_exception(error)}", stacklevel=2)

    def _write(self, drawings: Sequence[Drawing], step: int, suffix: str) -> None:
        for monitor, make_records in drawings:
            try:
                for record in _checked(make_records(), monitor):
                    write = functools.partial(self._write_record, record=_retag(record, suffix), step=step)
                    self._reach(monitor, write)
                self._reach(monitor, _flush)
            except Exception as error:
                if monitor is None:
                    warnings.warn(f"lightning_interp could not write: {format_exception(error)}", stacklevel=2)
                else:
                    self._failures.note(monitor, error)

    def _write_record(self, sink: Sink, record: Record, step: int) -> bool:
        is_accepted = isinstance(record, self._kinds[sink])
        if is_accepted:
            sink.write(record, step)
        return is_accepted

    def _reach(self, monitor: Monitor | None, action: Callable[[Sink], bool]) -> None:
        """Act on every sink. One that keeps nothing is dropped; an error of a record is its monitor's."""
        lost, error = write_to_sinks(self.sinks, action)
        self._lost += lost
        for _, reason in lost:
            if monitor is not None and monitor.on_error == "raise":
                self._failures.note(monitor, reason)
            if not self.sinks:
                for other in self._monitors:  # there is nothing left to record for
                    self._failures.note(other, reason)
        if error is not None:
            raise error


def open_sinks(trainer: Trainer, ranks: Ranks) -> dict[Sink, frozenset[type]]:
    """The sinks of a Trainer's loggers, and a file sink for the kinds of records that none of them accepts."""
    if not ranks.is_rank_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return {}  # as Lightning's own loggers: a trial run leaves nothing behind
    sinks = {sink: sink.accepts for sink in sinks_for(trainer.loggers)}
    accepted = frozenset[type]().union(*sinks.values())
    if missing := FileSink.accepts - accepted:
        folder, is_new = run_folder(trainer)
        if is_new and Picture in missing:
            rank_zero_info(f"lightning_interp: no logger here takes pictures; PNG and CSV files go to {folder}")
        sinks[FileSink(folder)] = missing
    return sinks


def write_to_sinks(
    sinks: list[Sink], action: Callable[[Sink], bool]
) -> tuple[list[tuple[Sink, Exception]], Exception | None]:
    """Act on every sink; one that fails by itself is removed, an error of the record is returned.

    Args:
        sinks: The sinks; changed in place.
        action: What is done with each; whether it took a record.

    Returns:
        The sinks that were removed, each with its error, and the error of the record, if there was one.

    Example:
        >>> from lightning_interp.sinks import MemorySink
        >>> write_to_sinks([MemorySink()], lambda sink: True)
        ([], None)
    """
    lost: list[tuple[Sink, Exception]] = []
    refused: list[tuple[Sink, Exception]] = []
    is_taken = False
    for sink in list(sinks):
        try:
            is_taken |= action(sink)
        except Exception as error:
            (lost if _is_sinks_own(error) else refused).append((sink, error))
    if is_taken:
        # The record is all right, so the fault is that of the sinks that refused it.
        lost, refused = lost + refused, []
    for sink, _ in lost:
        sinks.remove(sink)
    return lost, refused[0][1] if refused else None


def with_suffix(tag: str, suffix: str) -> str:
    """Put a suffix behind a tag's kind.

    Example:
        >>> with_suffix("cam/gradcam", "-test")
        'cam-test/gradcam'
    """
    kind, slash, what = tag.partition("/")
    return f"{kind}{suffix}{slash}{what}"


class _FlushError(Exception):
    """A flush that failed, which is no record's fault."""


def _flush(sink: Sink) -> bool:
    try:
        sink.flush()
    except Exception as error:
        raise _FlushError(str(error)) from error
    return False


def _checked(records: Iterable[Record], monitor: Monitor | None) -> Iterator[Record]:
    if not isinstance(records, Iterable):
        raise TypeError(f"{monitor!r}: records() and draw() must return or yield records, got {describe(records)}")
    for record in records:
        if not isinstance(record, get_args(Record)):
            raise TypeError(
                f"{monitor!r}: records() and draw() yield Picture, Scalar, Histogram, Text or Table, got "
                f"{describe(record)}"
            )
        yield record


def _retag(record: Record, suffix: str) -> Record:
    if not suffix or isinstance(record, ScalarLayout):
        return record
    return dataclasses.replace(record, tag=with_suffix(record.tag, suffix))


def _is_sinks_own(error: Exception) -> bool:
    """Whether a sink failed by itself, rather than by the record that it was given."""
    return isinstance(error, (OSError, _FlushError)) or (isinstance(error, ValueError) and "closed file" in str(error))
