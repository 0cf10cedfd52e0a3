"""Train a module sharded by FSDP2 with monitors and without; run as a script, and read by tests/gpu."""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_interp import default_monitors
from tests.helpers import matrix


class Sharded(matrix.Net):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        fully_shard(self.net[4], mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def train(monitors: list[Any], folder: Path, accelerator: str, devices: int) -> dict[str, Any]:
    """Train, and return what this rank holds of parameters, buffers, optimiser states and random streams."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator=accelerator,
        devices=devices,
        strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1),
        deterministic=True,
        callbacks=monitors,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Sharded(), *matrix.loaders())
    found: dict[str, Any] = {name: local(value) for name, value in trainer.lightning_module.state_dict().items()}
    for number, state in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"optimiser {number} {name}": local(value) for name, value in state.items()}
    found["stream"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        found["CUDA stream"] = torch.cuda.get_rng_state()
    return {name: value.clone() for name, value in found.items() if isinstance(value, Tensor)}


def main() -> None:
    folder, accelerator, devices = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    alone = train([], folder, accelerator, devices)
    watched = train(default_monitors(probe=3, on_error="raise"), folder, accelerator, devices)
    different = [name for name in alone if not torch.equal(alone[name], watched[name])]
    result = {"differences": different, "compared": len(alone)}
    (folder / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
