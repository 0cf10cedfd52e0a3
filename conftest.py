"""What every test, and every example in a docstring, runs under."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.nn.modules import module as modules

torch.set_num_threads(1)  # small models on shared cores: more threads only wait for one another


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Seed torch; afterwards no mode, global hook or thread of ours may be left."""
    streams, before = torch.get_rng_state(), _left_behind()
    threads = set(threading.enumerate())
    torch.manual_seed(0)
    yield
    torch.set_rng_state(streams)
    assert _left_behind() == before
    deadline = time.monotonic() + 2
    while (started := _ours(threads)) and time.monotonic() < deadline:
        started[0].join(0.05)
    assert not started, f"threads were left running: {started}"


def _left_behind() -> dict[str, object]:
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "function modes": torch.overrides._len_torch_function_stack(),
        "hooks": [len(value) for name, value in vars(modules).items() if name.endswith("_hooks")],
    }


def _ours(before: set[threading.Thread]) -> list[threading.Thread]:
    """Threads started since; a progress bar's monitor, and those that Python did not start, are not ours."""
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before and type(thread).__name__ not in {"TMonitor", "_DummyThread"}
    ]
