"""Two processes under DDP, on the CPU: one script plays all scenes, so that it starts once."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_interp.callbacks.run.ranks import Ranks
from tests.helpers import two_processes
from tests.helpers.processes import HELPERS, play
from tests.helpers.runs import TRAINER, read_events

pytestmark = pytest.mark.distributed
PICTURES = {"cam/gradcam", "saliency/saliency", "filters/net.0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left what they saw."""
    return play(HELPERS / "two_processes.py", tmp_path_factory.mktemp("ddp"))


def seen(folder: Path, scene: str) -> tuple[Any, Any]:
    """What the two ranks have to say."""
    first, second = (torch.load(folder / f"{scene}-{rank}.pt", weights_only=False) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize(("scene", "n"), [("eight", 8), ("uneven", 3), ("single", 1)])
def test_two_processes_draw_what_one_draws(folder: Path, monkeypatch: pytest.MonkeyPatch, scene: str, n: int) -> None:
    together, nothing = seen(folder, scene)
    assert nothing == {}, "one writer"
    monkeypatch.setitem(TRAINER, "logger", TRAINER["logger"])  # put back, whatever a scene sets
    alone = two_processes.looks(n)
    assert {tag for tag, _ in together} == {tag for tag, _ in alone}
    for tag in PICTURES:
        # A convolution may round differently for another number of images; nothing may be in another place.
        difference = (together[tag, 0].int() - alone[tag, 0].int()).abs()
        assert int(difference.max()) <= 3, tag
        assert float((difference > 0).float().mean()) < 1e-3, tag


def test_training_is_the_same_with_monitors(folder: Path) -> None:
    assert seen(folder, "invisible") == ([], [])


def test_a_failure_on_one_rank_is_everyones(folder: Path) -> None:
    first, second = seen(folder, "fails_on_one")
    (said,) = first["said"]
    assert second["said"] == []
    for words in ("CAMMonitor('rash')", "on rank 1", "no room on this one"):
        assert words in said
    assert first["trained"] == second["trained"] == 4
    assert first["calls"] == second["calls"] == [3, 3]
    assert [step for tag, step in first["pictures"] if tag == "cam-rash/method"] == [0]
    assert [step for tag, step in first["pictures"] if tag == "cam/gradcam"] == [0, 1, 3]


def test_a_failure_while_drawing_is_everyones_too(folder: Path) -> None:
    first, second = seen(folder, "fails_while_drawing")
    (said,) = first["said"]
    assert "cannot be drawn" in said
    assert first["trained"] == second["trained"] == 6
    assert [step for tag, step in first["pictures"] if tag == "cam-full/gradcam"] == [0]
    assert [step for tag, step in first["pictures"] if tag == "norms/weight"] == [0, 1, 3, 5]


def test_streams_give_the_probe_from_the_first_batch(folder: Path) -> None:
    first, second = seen(folder, "streams")
    assert first["trained"] == second["trained"] == 3
    assert [step for tag, step in first["pictures"] if tag == "cam/gradcam"] == [0, 2]


def test_one_event_file(folder: Path) -> None:
    (file,) = (folder / "events").rglob("events.out*")
    events = read_events(file.parent)
    for tag in PICTURES:
        assert [event.step for event in events.Images(tag)] == [0, 1]


def test_the_test_set(folder: Path) -> None:
    first, second = seen(folder, "validates")
    assert ("cam-test/gradcam", 0) in first
    assert second == []


def test_misuse_is_raised_on_every_rank_before_the_first_batch(folder: Path) -> None:
    for error, trained in seen(folder, "misuse"):
        assert "ConfigurationError" in error
        assert "found no images" in error
        assert trained == 0


def test_a_failure_on_one_rank_can_end_the_run_on_all(folder: Path) -> None:
    first, second = seen(folder, "raises_on_one")
    assert "on rank 1" in first
    assert "no room on this one" in first
    assert second == "ValueError: no room on this one"


@pytest.mark.parametrize(
    ("scene", "options"),
    [
        ("scores_uneven", {}),
        ("scores_one_image", {"n": 1}),
        ("scores_by_gradcam", {"plain": True}),
        ("scores_masks", {"n": 5, "masked": True}),
    ],
)
def test_two_processes_find_the_scores_that_one_finds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scene: str, options: dict[str, Any]
) -> None:
    first, second = seen(folder, scene)
    assert first["sync"] == second["sync"] == first["said"] == []
    monkeypatch.setitem(TRAINER, "logger", TRAINER["logger"])  # put back, whatever a scene sets
    alone = two_processes.scores(**options)["logged"]
    assert len(alone) == 2
    # Nothing learns here, so that both train the same; the shards of seven images hold four each, one of them twice.
    assert first["logged"] == second["logged"]
    exact = options.get("plain") is None
    for mine, theirs in zip(first["logged"], alone, strict=True):
        assert mine == (theirs if exact else pytest.approx(theirs, abs=1e-6))


def test_a_failing_score_on_one_rank_is_everyones(folder: Path) -> None:
    first, second = seen(folder, "scores_fail_on_one")
    (said,) = first["said"]
    assert second["said"] == []
    assert "on rank 1" in said
    assert "no score on this one" in said
    for each in (*first["logged"], *second["logged"]):
        assert each.keys() == first["logged"][0].keys()
        assert "max_box_accuracy" in each
        assert all(math.isnan(value) for value in each.values())


def test_scores_of_the_test_set(folder: Path) -> None:
    first, second = seen(folder, "scores_of_the_test_set")
    assert first == second
    assert "localization-test/max_box_accuracy" in first


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("total", [0, 1, 3, 8, 33])
def test_shares_make_up_the_whole_in_order(total: int, size: int) -> None:
    shares = [list(range(total))[Ranks(rank, size).share(total)] for rank in range(size)]
    assert list(itertools.chain.from_iterable(shares)) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_single_rank_talks_to_nobody() -> None:
    alone = Ranks()
    assert alone.is_rank_zero
    assert (alone.all_gather("x"), alone.gather("x"), alone.broadcast("x")) == (["x"], ["x"], "x")
