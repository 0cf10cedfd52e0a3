"""Two processes against one on the probe's part, as a Markdown table: ``python benchmarks/distributed.py``.

Each process has one thread. Measured is a whole look of one CAM and one saliency monitor, agreement and gathering
included, at the end of each epoch; the median of the epochs after the first.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMAGES, SIZE, EPOCHS = 32, 96, 7


def measure(processes: int) -> None:
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from torchvision.models import resnet18

    from lightning_interp import CAMMonitor, SaliencyMonitor
    from lightning_interp.callbacks.run.coordinator import Coordinator

    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = resnet18(num_classes=10)

        def forward(self, images: Any) -> Any:
            return self.model(images)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    seconds: list[float] = []
    after_epoch = Coordinator.on_train_epoch_end

    def timed(self: Coordinator, trainer: Any, module: Any) -> None:
        trainer.strategy.barrier()
        begin = time.perf_counter()
        after_epoch(self, trainer, module)
        trainer.strategy.barrier()
        seconds.append(time.perf_counter() - begin)

    Coordinator.on_train_epoch_end = timed  # type: ignore[method-assign]
    data = TensorDataset(torch.rand(IMAGES, 3, SIZE, SIZE), torch.arange(IMAGES) % 10)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            max_epochs=EPOCHS,
            limit_train_batches=1,
            callbacks=[CAMMonitor(probe=IMAGES), SaliencyMonitor(probe=IMAGES)],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), DataLoader(data, batch_size=2), DataLoader(data, batch_size=2))
    if trainer.is_global_zero:
        print(f"median {statistics.median(seconds[1:])}")


def median(processes: int) -> float:
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, str(processes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("median ")]
    if not lines:
        raise RuntimeError(done.stderr[-3000:])
    return float(lines[0].split()[1])


def main() -> None:
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(2):  # in turn, so that a busy moment meets both
        for processes, values in seconds.items():
            values.append(median(processes))
    one, two = (min(values) for values in seconds.values())
    print(f"ResNet-18, a probe of {IMAGES} images of {SIZE} px, CAM and saliency; one thread in each process\n")
    print("| processes | seconds a snapshot | speed-up |\n|---|---|---|")
    print(f"| 1 | {one:.3f} | 1.00 |\n| 2 | {two:.3f} | {one / two:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        main()
