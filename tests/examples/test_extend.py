"""The recipes for extensions: each runs, is short, and gives the same on one process and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import HELPERS, play

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
RECIPES = sorted(path for path in EXTEND.glob("*.py") if path.stem != "training")
ROOT = EXTEND.parents[1]


def run(script: Path, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_and_is_short(recipe: Path, tmp_path: Path) -> None:
    assert len(recipe.read_text(encoding="utf-8").splitlines()) < 45
    assert run(recipe, tmp_path).strip()


def test_there_is_a_recipe_for_each_kind() -> None:
    assert {path.stem for path in RECIPES} == {
        *("explainer", "weight_monitor", "probe_monitor", "stream_monitor", "measure_monitor", "sink"),
    }
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"examples/extend/{path.name}" in contributing for path in RECIPES)


@pytest.mark.distributed
def test_streams_and_measures_on_two_processes(tmp_path: Path) -> None:
    script = HELPERS / "recipes_two_processes.py"
    (tmp_path / "two").mkdir()
    play(script, tmp_path / "two")
    first, second = (json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert 0 < first["firing/share"] < 1
    assert first["mirror/same"] * 9 == pytest.approx(round(first["mirror/same"] * 9), abs=1e-5)
