"""Each test here runs on the CPU by default, and on a CUDA device by ``pytest -m gpu``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it; cuBLAS reads it once

# Floating-point operations without a deterministic kernel on CUDA.
NONDETERMINISTIC = {
    *("histc", "cumsum", "kthvalue", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "avg_pool3d_backward", "max_pool3d_with_indices_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "replication_pad2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "grid_sampler_2d_backward", "max_unpool2d"),
}


class RefuseAsCuda(TorchDispatchMode):
    """Raise on the CPU where CUDA raises in deterministic mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in NONDETERMINISTIC and args[0].is_floating_point():
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def accelerator(device: torch.device) -> str:
    """The name by which a Trainer knows the device."""
    return "gpu" if device.type == "cuda" else "cpu"


@pytest.fixture
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic mode; the CPU refuses what CUDA refuses."""
    torch.use_deterministic_algorithms(True)
    try:
        with RefuseAsCuda() if device.type == "cpu" else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Convolutions in float32: TF32 has ten bits."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def no_synchronization(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for the device."""
    if device.type == "cpu":
        yield
        return
    torch.ones(1, device=device).sum().item()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
