"""A stream monitor: how often the units of a layer fire, counted over the whole validation set.

python examples/extend/stream_monitor.py
"""

import torch
from torch import nn
from torchmetrics import MeanMetric
from training import train

from lightning_interp.callbacks import StreamBatch, StreamMonitor


class FiringMonitor(StreamMonitor):
    """The share of units of a layer that fire somewhere in an image. A share near 0 means dead units."""

    kind = "firing"
    layer = "net.4"

    def layers(self, module: nn.Module) -> list[str | nn.Module | None]:
        return [self.layer]

    def begin(self, module: nn.Module, device: torch.device) -> MeanMetric:
        return MeanMetric().to(device)

    def update(self, state: MeanMetric, batch: StreamBatch) -> None:
        fires = batch.activations(self.layer).amax((2, 3)) > 0
        state.update(fires[list(batch.counts)].float())

    def scalar_names(self, probe: object) -> list[str]:
        return ["share"]

    def scalars(self, result: torch.Tensor) -> dict[str, float]:
        return {"share": float(result)}


if __name__ == "__main__":
    print(f"firing/share: {train([FiringMonitor()]).callback_metrics['firing/share']:.3f}")
