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
    """A thread that runs jobs in the order of their submission.

    No job is dropped: while the queue is full, :meth:`submit` blocks, and jobs that remain when the interpreter exits
    are run then. The thread starts with the first job and ends with :meth:`close`.

    Args:
        waiting: The length of the queue.

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
        """Put a job into the queue; the job handles its errors.

        Args:
            job: Called without arguments on the thread.
        """
        if self._process != os.getpid():  # a fork keeps none of its parent's other threads, and maybe a held lock
            self.__init__(self._waiting)  # type: ignore[misc]
        if self._thread is None:
            self._thread = threading.Thread(target=_run_jobs, args=(self._jobs,), name="lightning_interp", daemon=True)
            self._thread.start()
            self._last_resort = weakref.finalize(self, _stop, self._jobs, self._thread, self._process)
        self._jobs.put(job)

    def close(self) -> None:
        """Run the remaining jobs, and end the thread."""
        if self._thread is not None:
            _stop(self._jobs, self._thread, self._process)
            # Not before: if a Ctrl-C interrupts the line above, the interpreter waits again when it exits.
            self._last_resort.detach()
            self._thread = None


def _run_jobs(jobs: queue.Queue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except BaseException:
            # Reported like the end of a thread; this one must go on, or submit would block for ever.
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        del job  # it may hold the last references to a run's tensors


def _stop(jobs: queue.Queue[Job | None], thread: threading.Thread, process: int) -> None:
    if process != os.getpid() or not thread.is_alive():
        return
    if thread is threading.current_thread():  # the last job held the last reference to the writer
        jobs.put_nowait(None)
        return
    jobs.put(None)
    thread.join()
