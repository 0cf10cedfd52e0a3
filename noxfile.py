"""Test sessions: ``nox -l`` lists them, ``nox -s quick`` is the one to run while working.

``nox -R -s quick`` uses the environment of an earlier run and installs nothing; ``nox --no-venv -s quick`` runs in the
environment that is active, with what is installed there. What stands behind ``--`` goes to pytest.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.options.sessions = ["quick", "lint"]
nox.options.reuse_venv = "yes"
nox.needs_version = ">=2024.3.2"
PYTEST = ("pytest", "-p", "no:cacheprovider")
OLDEST_PYTHON = "3.10"


def install(session: nox.Session, *extras: str) -> None:
    """Install the package with extras, unless the active environment is used."""
    if session.virtualenv.venv_backend != "none":
        session.install("--editable", f".[{','.join(extras)}]" if extras else ".")


def install_tool(session: nox.Session, name: str) -> None:
    """Install a tool in the version of the dev extra, unless the active environment is used."""
    if session.virtualenv.venv_backend != "none":
        extra = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["dev"]
        session.install(*(requirement for requirement in extra if requirement.startswith(name)))


@nox.session
def quick(session: nox.Session) -> None:
    """Run a few single-process tests of every file, in less than a minute."""
    install(session, "test")
    session.run(*PYTEST, "--quick", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """Run the default tests."""
    install(session, "test")
    session.run(*PYTEST, *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """Run every monitor in every way to train, and the other long products."""
    install(session, "test")
    session.run(*PYTEST, "-m", "matrix", *session.posargs)


@nox.session
def ecosystem(session: nox.Session) -> None:
    """Run the tests with other packages, as their users use them."""
    install(session, "test", "ecosystem")
    session.run(*PYTEST, "-m", "ecosystem", *session.posargs, success_codes=[0, 5])  # 5: no test was selected


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device."""
    install(session, "test")
    session.run(*PYTEST, "-m", "gpu", *session.posargs)


@nox.session(python=OLDEST_PYTHON)
def oldest(session: nox.Session) -> None:
    """Run the default tests with the oldest dependencies that pyproject.toml allows."""
    constraints = Path(session.create_tmp()) / "oldest.txt"
    constraints.write_text("\n".join(oldest_versions()) + "\n", encoding="utf-8")
    session.install("--editable", ".[test]", "--constraint", str(constraints))
    # Old releases warn when they are imported, of what later Pythons and dependencies took away.
    accepted = ("-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning")
    session.run(*PYTEST, *accepted, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    install_tool(session, "ruff")
    session.run("ruff", "check", "--no-cache", ".")
    session.run("ruff", "format", "--no-cache", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types."""
    install(session)
    install_tool(session, "mypy")
    session.run("mypy", "--cache-dir", f"{session.create_tmp()}/mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Check that generated pages are what their generators make, that links resolve, and that examples parse."""
    install(session, "docs")
    session.run("python", "docs/check.py")


def oldest_versions() -> list[str]:
    """Return the runtime dependencies of pyproject.toml, pinned to their lower bounds."""
    declared = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    return [re.sub(r"\s*>=\s*", "==", requirement.split(",")[0]) for requirement in declared]
