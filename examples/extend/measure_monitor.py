"""A measure monitor: whether predictions survive mirroring the image.

python examples/extend/measure_monitor.py
"""

from collections.abc import Sequence

from torch import nn
from training import train

from lightning_interp.callbacks import MeasureData, MeasureMonitor


class MirrorMonitor(MeasureMonitor):
    """The share of the probe's images whose predicted class is the same in the mirror."""

    kind = "mirror"

    def measure(self, module: nn.Module, data: MeasureData, share: Sequence[int]) -> tuple[int, int]:
        images = data.probe.subset(share).images.to(data.device)
        classes, mirrored = (data.predict(module, view).argmax(1) for view in (images, images.flip(3)))
        return int((classes == mirrored).sum()), len(images)

    def merge(self, partials: Sequence[tuple[int, int]]) -> float:
        same, images = map(sum, zip(*partials, strict=True))
        return same / images

    def scalar_names(self, probe: object) -> list[str]:
        return ["same"]

    def scalars(self, result: float) -> dict[str, float]:
        return {"same": result}


if __name__ == "__main__":
    print(f"mirror/same: {train([MirrorMonitor(probe=9)]).callback_metrics['mirror/same']:.3f}")
