"""Configuration of the test session, and the leak checks around every test and docstring example."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from torch.nn.modules import module as global_hooks

torch.set_num_threads(1)  # small models on shared cores: more threads only wait for one another

QUICK_TESTS = 320  # less than a minute on two cores


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--quick``, which runs a few tests of every file."""
    parser.addoption("--quick", action="store_true", help="run a few single-process tests of every file")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run in this process where only files are named (it starts sooner) or where all tests share a GPU."""
    only_files = bool(config.args) and all(".py" in argument for argument in config.args)
    on_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
    return 0 if only_files or on_gpu else None  # None: as many as there are cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse ids that differ between workers, and select the tests of ``--quick``."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"an address in a test id differs between workers; give it ids: {item.nodeid}")
    if config.getoption("quick"):
        quick = _spread(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in quick])
        items[:] = [item for item in items if item in quick]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` where there are too few CUDA devices."""
    if marker := item.get_closest_marker("gpu"):
        needed, available = marker.kwargs.get("devices", 1), torch.cuda.device_count()
        if available < needed:
            pytest.skip(f"needs {needed} CUDA device(s), {available} available")


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Seed torch; afterwards check that no mode, global hook or thread was left behind."""
    streams, before = torch.get_rng_state(), _global_state()
    threads = set(threading.enumerate())
    torch.manual_seed(0)
    yield
    torch.set_rng_state(streams)
    assert _global_state() == before
    deadline = time.monotonic() + 2
    while (started := _started_since(threads)) and time.monotonic() < deadline:
        started[0].join(0.05)
    assert not started, f"threads were left running: {started}"


def _global_state() -> dict[str, object]:
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "function modes": torch.overrides._len_torch_function_stack(),
        "hooks": [len(hooks) for name, hooks in vars(global_hooks).items() if name.endswith("_hooks")],
    }


def _started_since(before: set[threading.Thread]) -> list[threading.Thread]:
    """Return the threads started since, but for a progress bar's monitor and those that Python did not start."""
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before and type(thread).__name__ not in {"TMonitor", "_DummyThread"}
    ]


def _spread(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the first case of test functions spread evenly over each file, without those that start processes."""
    functions: dict[str, dict[str, pytest.Item]] = defaultdict(dict)
    for item in sorted(items, key=lambda item: (str(item.path), item.reportinfo()[1] or 0, item.nodeid)):
        if not item.get_closest_marker("distributed"):
            functions[str(item.path)].setdefault(item.nodeid.split("[")[0], item)
    chosen: set[pytest.Item] = set()
    for cases in functions.values():
        first = list(cases.values())
        count = min(max(QUICK_TESTS // len(functions), 2), len(first))
        chosen |= {first[index * len(first) // count] for index in range(count)}
    return chosen
