"""Drawing and writing off the training thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

__all__ = ["BackgroundWriter"]

Job = Callable[[], None]


class BackgroundWriter:
    """One thread that does jobs in the order in which they were handed over.

    Nothing that was accepted is dropped: where too much waits, :meth:`submit` waits, too, and what is left when the
    interpreter exits is done then. The thread begins with the first job and ends with :meth:`close`.

    Args:
        waiting: How many jobs may wait.

    Example:
        >>> done = []
        >>> writer = BackgroundWriter()
        >>> writer.submit(lambda: done.append("picture"))
        >>> writer.close()
        >>> done
        ['picture']
    """

    def __init__(self, waiting: int = 4) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Hand over a job; it deals with its own errors."""
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="lightning_interp", daemon=True)
            self._thread.start()
            self._stop = weakref.finalize(self, _stop, self._jobs, self._thread)
        self._jobs.put(job)

    def close(self) -> None:
        """Wait until everything is done, and end the thread."""
        if self._thread is not None:
            self._stop()
            self._thread = None


def _work(jobs: queue.Queue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job()


def _stop(jobs: queue.Queue[Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    thread.join()
