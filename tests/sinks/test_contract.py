"""Every record class through every sink: what is accepted can be read back from the store, and nothing else."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from lightning_interp import sinks
from lightning_interp.sinks import Record, ScalarLayout, Sink, registry
from tests.helpers.stores import ODD_TAGS, PARAMETERS, STORES, Store, plain, sample

KINDS = [pytest.param(kind, id=kind.__name__) for kind in get_args(Record)]
Open = Callable[[type[Store]], Store]


@pytest.fixture
def open_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens stores in a folder of their own within `tmp_path`, the working directory beside it."""
    opened: list[Store] = []
    for name, value in (("WANDB_ERROR_REPORTING", "false"), ("MLFLOW_DISABLE_TELEMETRY", "true")):
        monkeypatch.setenv(name, value)  # their reports would need a network, and threads that outlive the test

    def open_one(store: type[Store]) -> Store:
        if store.package is not None:
            pytest.importorskip(store.package, reason=f"{store.package} is not installed")
        for name in ("store", "elsewhere"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        opened.append(store(tmp_path / "store"))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def in_order(stored: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    return sorted(stored, key=repr)


def steps_of(kind: type, *steps: int) -> tuple[int, ...]:
    return tuple(0 for _ in steps) if kind is ScalarLayout else steps  # a layout holds for the whole run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", PARAMETERS)
def test_what_is_accepted_is_read_back_with_its_values_and_step(
    store: type[Store], kind: type, open_store: Open
) -> None:
    opened = open_store(store)
    records = [sample(kind, "cam/gradcam", number) for number in range(3)]
    is_accepted = kind in store.sink_class.accepts
    for record, step in zip(records, (3, 12, 7), strict=True):
        opened.sink.write(record, step)
        opened.sink.flush()
    opened.sink.close()
    values = [(step, plain(record)) for step, record in zip(steps_of(kind, 3, 12, 7), records, strict=True)]
    if kind is ScalarLayout and store.package is None and store.sink_class.__name__ == "TensorBoardSink":
        values = values[:1]  # TensorBoard reads a run's first layout only
    expected = values if is_accepted else []
    stored = [(0 if kind is ScalarLayout else step, value) for step, value in opened.read(kind)]
    assert in_order(stored) == in_order(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", PARAMETERS)
def test_any_tag_can_be_written_and_none_takes_anothers_name(
    store: type[Store], kind: type, open_store: Open, tmp_path: Path
) -> None:
    if kind is ScalarLayout or kind not in store.sink_class.accepts:
        return
    opened = open_store(store)
    before = set(outside(tmp_path))
    records = [sample(kind, tag, number) for number, tag in enumerate(ODD_TAGS)]
    for record in records:
        opened.sink.write(record, step=12)
    opened.sink.close()
    stored = opened.read(kind)
    assert in_order(stored) == in_order([(12, plain(record)) for record in records])
    assert set(outside(tmp_path)) == before


def outside(folder: Path) -> list[str]:
    """All files that are not in the store's folder."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if not name.startswith(f"store{os.sep}")]


def test_every_sink_is_in_the_table() -> None:
    public = [getattr(sinks, name) for name in sinks.__all__]
    classes = {value for value in public if inspect.isclass(value) and issubclass(value, Sink) and value is not Sink}
    ours = {sink for sink in registry._classes if sink.__module__.startswith("lightning_interp.")}
    assert classes | ours == {store.sink_class for store in STORES}


def test_every_record_class_is_accepted_somewhere() -> None:
    kinds = set(get_args(Record))
    assert all(store.sink_class.accepts <= kinds for store in STORES)
    assert set.union(*(set(store.sink_class.accepts) for store in STORES if store.package is None)) == kinds
