"""Who may import whom, that there is no circle, and that the checks can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_interp"

# What a file or folder may import, by the longest name that fits it; `errors` and `checks` are open to all, and a
# folder may import itself.
ALLOWED: dict[str, set[str]] = {
    "": {"callbacks", "data.probe", "explain", "localize", "sinks"},
    "errors": set(),
    "checks": set(),
    "model": set(),
    "data": {"model.preserve"},
    "explain": {"model"},
    "weights": {"model"},
    "localize": {"model", "explain", "data.annotations", "data.boxes"},
    "render": set(),
    "sinks": set(),
    "callbacks": {"callbacks"},
    "callbacks._lightning": set(),
    "callbacks.schedule": set(),
    "callbacks.inputs": {"callbacks._lightning", "model", "data"},
    "callbacks.contract": {
        *("callbacks._lightning", "callbacks.inputs", "callbacks.schedule", "model", "data", "sinks.records"),
    },
    "callbacks.run": {"callbacks._lightning", "callbacks.contract", "callbacks.inputs", "model", "data", "sinks"},
    "callbacks.monitors": {
        *("callbacks._lightning", "callbacks.contract", "callbacks.inputs", "model", "data", "explain", "localize"),
        *("render", "sinks.records", "weights"),
    },
    "callbacks.gap_recipes": {"localize", "model"},
    "callbacks.parameter_groups": set(),
    "callbacks.finetuning": {
        *("callbacks._lightning", "callbacks.gap_recipes", "callbacks.parameter_groups", "localize", "model"),
    },
}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
WHERE_USED_ONLY = {"matplotlib", "tensorboard", "wandb", "mlflow", *LIGHTNING}
HOOKS = {"register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "TorchFunctionMode"}


def name_of(path: Path) -> str:
    """A file's dotted name within the package; an ``__init__`` has its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
FOLDERS = {name for name, path in FILES.items() if path.name == "__init__.py"}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """All that a file imports, names of modules and of what is in them, and whether it does so when it is loaded."""
    tree = ast.parse(source)
    top = {id(statement) for statement in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def ours(source: str) -> Iterator[str]:
    """What a file imports of this package, without the package's name."""
    for name, _ in imports(source):
        package, _, rest = name.partition(".")
        if package == "lightning_interp" and rest:
            yield rest


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def module_of(name: str, known: Mapping[str, str]) -> str | None:
    """The file that a dotted name is, or is in."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name if name in known else None


def folder_of(name: str) -> str:
    return name if name in FOLDERS else name.rpartition(".")[0]


def violations(importer: str, source: str) -> list[str]:
    rule = max((key for key in ALLOWED if within(importer, key) or not key), key=len)
    messages = []
    for other in ours(source):
        if module_of(other, SOURCES) is None or within(other, "errors") or within(other, "checks"):
            continue
        itself = rule not in ("", "callbacks") and within(other, rule)
        if not itself and not any(within(other, allowed) for allowed in ALLOWED[rule]):
            messages.append(f"{importer} imports {other}")
        private = [part for part in other.split(".") if part.startswith("_") and part != "_lightning"]
        if private and not within(folder_of(importer), other[: other.index(private[0])].rstrip(".")):
            messages.append(f"{importer} imports the private {other}")
    for name, at_top in imports(source):
        package = name.split(".")[0]
        if package in LIGHTNING and importer != "callbacks._lightning":
            messages.append(f"{importer} imports {package}")
        if package in WHERE_USED_ONLY and at_top and importer != "callbacks._lightning":
            messages.append(f"{importer} imports {package} at the top")
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    if importer != "model.hooks" and names & HOOKS:
        messages.append(f"{importer} registers hooks: {names & HOOKS}")
    return messages


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Files that import each other in a circle, at whatever place; a folder's ``__init__`` counts where it is named."""
    edges: dict[str, set[str]] = {}
    for name, source in sources.items():
        targets = {module_of(other, sources) for other in ours(source)}
        edges[name] = {target for target in targets if target and target != name and not within(name, target)}
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(edges[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sources:
        visit(name, [])
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_it_may(name: str) -> None:
    assert violations(name, SOURCES[name]) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(SOURCES) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("explain.occlusion", "from lightning_interp.callbacks import CAMMonitor"),
        ("explain.occlusion", "import lightning_interp.render.tiles"),
        ("sinks.records", "from lightning_interp import render"),
        ("model.trace", "from lightning_interp.explain import cam"),
        ("model.trace", "def late():\n    import pytorch_lightning"),
        ("render.tiles", "import matplotlib.pyplot as plt"),
        ("weights.norms", "from lightning.pytorch import Trainer"),
        ("weights.norms", "from lightning_interp.sinks.records import Scalar"),
        ("callbacks.contract", "from lightning_interp.callbacks.run.coordinator import Coordinator"),
        ("callbacks.run.coordinator", "from lightning_interp.callbacks.monitors.cam import CAMMonitor"),
        ("callbacks.run.coordinator", "from lightning_interp.explain import cam"),
        ("callbacks.monitors.cam", "from lightning_interp.callbacks.run.failures import Failures"),
        ("callbacks.monitors.cam", "from lightning_interp.explain._explainer import Explainer"),
        ("explain.occlusion", "def tap(module, hook):\n    module.register_forward_hook(hook)"),
        (
            "model.trace",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning_interp import explain",
        ),
    ],
)
def test_the_check_can_fail(name: str, source: str) -> None:
    assert violations(name, source)


@pytest.mark.parametrize(
    "late",
    [
        "from lightning_interp.model.trace import Trace",
        "def late():\n    from lightning_interp.model.trace import Trace",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning_interp.model.trace import Trace",
    ],
)
def test_circles_are_seen(late: str) -> None:
    broken = SOURCES | {"model.hooks": f"{SOURCES['model.hooks']}\n{late}\n"}
    assert any("model.hooks" in circle for circle in circles(broken))


@pytest.mark.parametrize(
    "statement",
    [
        "import lightning_interp",
        "import lightning_interp as li; li.explain.gradcam",
        "import lightning_interp.explain",
        "import lightning_interp as li; li.Probe; li.ConfigurationError; li.sinks",
    ],
)
def test_explaining_loads_no_lightning_and_no_matplotlib(statement: str) -> None:
    heavy = "{'lightning', 'pytorch_lightning', 'matplotlib', 'tensorboard', 'torchmetrics', 'wandb', 'mlflow'}"
    script = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_importing_the_package_loads_no_torch() -> None:
    script = "import sys, lightning_interp; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "False"
