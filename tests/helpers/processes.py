"""Scripts that run on several processes, started so that none of them is left, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent


def start(script: Path, folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a script in a folder, which is its first argument; what it says goes into the folder's ``output``."""
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "PYTEST"))}
    environment |= {"PYTHONPATH": os.pathsep.join([str(script.parent), str(root)]), "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, str(script), str(folder), *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], folder: Path, timeout: float = 120) -> tuple[int, str]:
    """How it ended, and the last of what it said."""
    try:
        code = process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the processes hung\n{said(folder)}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return code, said(folder)


def play(script: Path, folder: Path, *arguments: str, timeout: float = 180, ranks: int = 1) -> Path:
    """Run a script to its end; what it left is in the folder.

    With ``ranks``, its ``main`` runs on so many processes; otherwise Lightning starts them, by the script's strategy.
    """
    launcher = (str(HELPERS / "fork_ranks.py"), str(ranks)) if ranks > 1 else ()
    code, output = finish(start(script, folder, *arguments, launcher=launcher), folder, timeout)
    assert code == 0, output
    return folder


def said(folder: Path) -> str:
    """The last of what a script said."""
    return (folder / "output").read_text()[-6000:]
