"""The values that pass between a run and its monitors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.data.annotations import Annotations
from lightning_interp.data.probe import Probe
from lightning_interp.model.outputs import Predict
from lightning_interp.model.trace import LayerSpec

__all__ = ["MeasureData", "Needs", "StreamBatch"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a monitor needs of a forward pass over the probe.

    Args:
        layers: The layers, by dotted name, by module, or None for the last spatial one, each with whether its gradient
            is needed.
        input_gradients: Whether the gradient with respect to the images is needed.
        guard_parameters: Whether the parameters are copied before and put back after, which costs their memory; False
            promises that :meth:`ProbeMonitor.outputs` changes none.
    """

    layers: Mapping[LayerSpec, bool] = field(default_factory=dict)
    input_gradients: bool = False
    guard_parameters: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class StreamBatch:
    """One batch of the validation or test pass.

    Args:
        module: The module that is validated.
        images: (N, C, H, W) as they entered the step.
        labels: int64 (N,), or None where the batch names no class for each image.
        indices: Which items of the data set these are, or None where that is not known.
        counts: For each image whether it counts: False for those that a DistributedSampler repeats.
        annotations: Where the objects are, or None; read for monitors with ``uses_annotations``.
        logits: (N, K) the class scores that the step returned, or None.
    """

    module: LightningModule
    images: Tensor
    labels: Tensor | None
    indices: tuple[int, ...] | None
    counts: tuple[bool, ...]
    annotations: Annotations | None
    logits: Tensor | None
    read_activations: Callable[[LayerSpec], Tensor]
    read_outputs: Callable[[], dict[str, Tensor]] | None

    def activations(self, layer: LayerSpec) -> Tensor:
        """Return a layer's output for these images, detached, in its own dtype: (N, C, h, w) where it is spatial.

        It is the output of the step's own forward pass, the first one over all N images; a pass of its own runs where
        the step ran none, and where the module is compiled or sharded.

        Args:
            layer: One of those that :meth:`StreamMonitor.layers` returned.
        """
        return self.read_activations(layer)

    def outputs(self) -> dict[str, Tensor]:
        """Return what the monitor's own ``outputs`` returns for these images, by passes of its own, with gradients.

        For monitors that are a ``ProbeMonitor``, too.
        """
        if self.read_outputs is None:
            raise TypeError("outputs() is for monitors that are a ProbeMonitor, too")
        return self.read_outputs()


@dataclass(frozen=True, slots=True, eq=False)
class MeasureData:
    """What a measurement runs on.

    Args:
        probe: The images of the monitor's probe.
        device: Where the module is.
        predict: Runs the module as its Trainer does: ``predict(module, images)``.
    """

    probe: Probe
    device: torch.device
    predict: Predict
