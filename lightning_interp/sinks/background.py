"""Drawing and writing off the training thread."""

from __future__ import annotations

import os
import queue
import sys
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
        self._waiting = waiting
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def submit(self, job: Job) -> None:
        """Hand over a job; it deals with its own errors."""
        if self._process != os.getpid():  # of a forked process' threads only one lives on, and a lock may be held
            self.__init__(self._waiting)  # type: ignore[misc]
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="lightning_interp", daemon=True)
            self._thread.start()
            self._last_resort = weakref.finalize(self, _stop, self._jobs, self._thread, self._process)
        self._jobs.put(job)

    def close(self) -> None:
        """Wait until everything is done, and end the thread."""
        if self._thread is not None:
            _stop(self._jobs, self._thread, self._process)
            # Not before: where a Ctrl-C ends the waiting, the interpreter's exit waits again.
            self._last_resort.detach()
            self._thread = None


def _work(jobs: queue.Queue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except BaseException:
            # Told as Python tells it of a thread that dies; this one must go on, or submit would wait for ever.
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        del job  # it may be all that keeps a run's tensors alive


def _stop(jobs: queue.Queue[Job | None], thread: threading.Thread, process: int) -> None:
    if process != os.getpid() or not thread.is_alive():
        return
    if thread is threading.current_thread():  # the last job held the last reference
        jobs.put_nowait(None)
        return
    jobs.put(None)
    thread.join()
