from __future__ import annotations

import pytest
import torch

from lightning_interp.model.chunks import rows_per_pass


@pytest.mark.parametrize(("device", "rows"), [("cpu", 8), ("cuda", 64), ("cuda:1", 64), ("mps", 64), ("meta", 64)])
def test_a_cpu_runs_few_rows_in_one_pass(device: str, rows: int) -> None:
    assert rows_per_pass(torch.device(device), cpu=8, other=64) == rows
