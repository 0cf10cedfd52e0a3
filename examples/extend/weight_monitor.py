"""A weight monitor: the share of weights near zero, parameter by parameter.

python examples/extend/weight_monitor.py
"""

from collections.abc import Iterator

from torch import nn
from training import train

from lightning_interp.callbacks import WeightMonitor
from lightning_interp.sinks import Scalar


class SparsityMonitor(WeightMonitor):
    """The share of values below 1e-2 in each parameter. It grows where weight decay or pruning is at work."""

    kind = "sparsity"

    def capture(self, module: nn.Module, step: int) -> dict[str, float]:
        return {name: float((values.abs() < 1e-2).float().mean()) for name, values in module.named_parameters()}

    def records(self, data: dict[str, float], step: int) -> Iterator[Scalar]:
        for name, share in data.items():
            yield Scalar(self.tag(name), share)


if __name__ == "__main__":
    trainer = train([SparsityMonitor()])
    print(f"sparsity/* was written to {trainer.log_dir}")
