"""A probe monitor: the images that the model is least sure of, first.

python examples/extend/probe_monitor.py
"""

from collections.abc import Iterator, Mapping

from torch import Tensor
from training import train

from lightning_interp import Probe
from lightning_interp.callbacks import ProbeMonitor
from lightning_interp.model.trace import Trace
from lightning_interp.render import Caption, tile_grid
from lightning_interp.sinks import Picture


class DoubtMonitor(ProbeMonitor):
    """The images of the probe, the least certain prediction first. Certain is not the same as right."""

    kind = "doubt"

    def outputs(self, trace: Trace, labels: Tensor | None) -> dict[str, Tensor]:
        return {"certainty": trace.logits.softmax(1).amax(1)}

    def draw(self, outputs: Mapping[str, Tensor], probe: Probe) -> Iterator[Picture]:
        order = outputs["certainty"].argsort()
        captions = [Caption((f"{100 * value:.0f} % sure",)) for value in outputs["certainty"][order].tolist()]
        yield Picture(self.tag("probe"), tile_grid(probe.to_display()[order], captions))


if __name__ == "__main__":
    trainer = train([DoubtMonitor(probe=6)])
    print(f"doubt/probe was written to {trainer.log_dir}")
