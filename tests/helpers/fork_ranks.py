"""Run a script's ``main`` on several ranks, forked once its imports are done: they take longer than most scripts do.

``python fork_ranks.py 2 script.py argument ...``
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only


def main() -> None:
    ranks = int(sys.argv[1])
    sys.argv = sys.argv[2:]
    script = importlib.import_module(Path(sys.argv[0]).stem)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    children = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            # Lightning starts no processes where LOCAL_RANK is set, and reads the rank when it is imported.
            os.environ["LOCAL_RANK"] = str(rank)
            rank_zero_only.rank = rank  # type: ignore[attr-defined]
            script.main()
            return
        children.add(child)
    sys.exit(wait(children))


def wait(children: set[int]) -> int:
    """Wait for all, and stop them where one failed: the others would wait for it."""
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not failed:
            failed = 1
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failed


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
