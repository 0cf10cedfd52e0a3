"""Who may import whom, and that the check itself can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_interp"

# Which rooms a room may import; `errors` is open to all, and a room may always import itself.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"callbacks", "explain", "localize", "probe"},
    "errors": set(),
    "records": set(),
    "schedule": set(),
    "guard": {"shards"},
    "shards": set(),
    "layers": set(),
    "batches": set(),
    "_lightning": set(),
    "annotations": {"batches"},
    "probe": {"annotations", "batches", "guard"},
    "outputs": set(),
    "tokens": set(),
    "targets": {"outputs"},
    "trace": {"targets", "outputs", "guard", "tokens"},
    "spatial": {"trace", "outputs", "layers", "guard"},
    "explain": {"trace", "targets", "spatial", "tokens", "outputs", "layers", "records", "guard"},
    "units": {"trace", "layers", "records", "explain"},
    "weights": {"trace", "layers", "records", "shards"},
    "localize": {"trace", "spatial", "tokens", "outputs", "layers", "records", "guard"},
    "render": {"records"},
    "sinks": {"records"},
    "distributed": {"_lightning", "shards"},
    "callbacks": {
        *("_lightning", "annotations", "distributed", "explain", "guard", "layers", "localize", "outputs", "probe"),
        *("spatial", "records", "render", "schedule", "shards", "sinks", "targets", "trace", "units", "weights"),
    },
}
LIGHTNING_ROOMS = {"_lightning", "distributed", "callbacks"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
WHERE_USED_ONLY = {"matplotlib", "tensorboard", "wandb", "lightning", "pytorch_lightning"}


def imports(source: str) -> list[tuple[str, bool]]:
    """All modules that a file imports, each with whether it does so at the top (not for type checkers alone)."""
    tree = ast.parse(source)
    top = {id(node) for statement in tree.body if not isinstance(statement, ast.If) for node in [statement]}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in top))
            if node.module == "lightning_interp":
                found += [(f"lightning_interp.{alias.name}", id(node) in top) for alias in node.names]
    return found


def violations(room: str, source: str) -> list[str]:
    found = []
    for name, at_top in imports(source):
        package, _, rest = name.partition(".")
        if package == "lightning_interp" and rest:
            other = rest.split(".")[0]
            if other not in {room, "errors"} | ALLOWED[room]:
                found.append(f"{room} imports {other}")
        if package in LIGHTNING and room not in LIGHTNING_ROOMS:
            found.append(f"{room} imports {package}")
        if package in WHERE_USED_ONLY and at_top and room != "_lightning":
            found.append(f"{room} imports {package} at the top")
    return found


def rooms() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize(("room", "path"), rooms(), ids=lambda value: getattr(value, "name", value))
def test_a_room_imports_only_what_it_may(room: str, path: Path) -> None:
    assert violations(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("explain", "from lightning_interp.callbacks import CAMMonitor"),
        ("explain", "import lightning_interp.render.tiles"),
        ("records", "from lightning_interp import schedule"),
        ("trace", "def late():\n    import pytorch_lightning"),
        ("render", "import matplotlib.pyplot as plt"),
        ("weights", "from lightning.pytorch import Trainer"),
    ],
)
def test_the_check_can_fail(room: str, source: str) -> None:
    assert violations(room, source)


@pytest.mark.parametrize(
    "statement",
    [
        "import lightning_interp",
        "import lightning_interp as li; li.explain.gradcam",
        "import lightning_interp.explain",
        "import lightning_interp as li; li.Probe; li.ConfigurationError",
    ],
)
def test_explaining_loads_no_lightning_and_no_matplotlib(statement: str) -> None:
    heavy = "{'lightning', 'pytorch_lightning', 'matplotlib', 'tensorboard', 'torchmetrics'}"
    script = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_importing_the_package_loads_no_torch() -> None:
    script = "import sys, lightning_interp; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
