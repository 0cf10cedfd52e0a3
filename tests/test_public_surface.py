"""The public names and signatures, kept as a snapshot: a change here is a change for users."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import lightning_interp

SNAPSHOT = Path(__file__).with_name("api_surface.json")
ROOMS = (
    "lightning_interp",
    "lightning_interp.explain",
    "lightning_interp.localize",
    "lightning_interp.sinks.records",
    "lightning_interp.sinks",
)


def surface() -> dict[str, dict[str, str]]:
    return {room: {name: _signature(room, name) for name in _names(room)} for room in ROOMS}


def _names(room: str) -> list[str]:
    return sorted(importlib.import_module(room).__all__)


def _signature(room: str, name: str) -> str:
    value = getattr(importlib.import_module(room), name)
    if inspect.ismodule(value):
        return "module"
    if not callable(value):
        return "value"
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "callable"
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def test_the_surface_is_the_snapshot() -> None:
    assert surface() == json.loads(SNAPSHOT.read_text(encoding="utf-8")), (
        "the public surface changed; if that is meant, note it in CHANGELOG.md, "
        "and run: python tests/test_public_surface.py"
    )


def test_every_public_name_resolves_and_is_documented() -> None:
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            assert getattr(value, "__doc__", None), f"{room}.{name} has no docstring"


def test_the_root_lists_what_it_resolves() -> None:
    assert dir(lightning_interp) == sorted(lightning_interp.__all__)


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(surface(), indent=2) + "\n", encoding="utf-8")
