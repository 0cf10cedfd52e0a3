"""The recipes for extensions: each runs, is short, and gives the same on one process and on two."""

from __future__ import annotations

import json
import logging
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_interp.sinks import registry
from tests.helpers import recipes_two_processes
from tests.helpers.processes import HELPERS, play

ROOT = Path(__file__).parents[2]
EXTEND = ROOT / "examples" / "extend"
RECIPES = sorted(path for path in EXTEND.glob("*.py") if path.stem != "training")


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In a folder of its own, as a script that finds its neighbours, and with the sinks as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXTEND)
    monkeypatch.setattr(registry, "_classes", list(registry._classes))
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_and_is_short(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) < 40
    runpy.run_path(str(recipe), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_is_a_recipe_for_each_kind() -> None:
    assert {path.stem for path in RECIPES} == {
        *("explainer", "weight_monitor", "probe_monitor", "stream_monitor", "measure_monitor", "sink"),
    }
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"examples/extend/{path.name}" in contributing for path in RECIPES)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_streams_and_measures_on_two_processes_are_those_of_one(tmp_path: Path) -> None:
    play(HELPERS / "recipes_two_processes.py", tmp_path, ranks=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = recipes_two_processes.numbers(tmp_path)
    assert first == second == pytest.approx(alone, abs=1e-6)
    assert set(alone) == {"firing/share", "mirror/same"}
    assert 0 < alone["firing/share"] < 1
