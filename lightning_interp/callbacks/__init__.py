"""The callbacks. ``contract`` says what a monitor is, ``run`` how monitors are run; ``monitors`` has one file each."""

from lightning_interp.callbacks.contract import (
    MeasureMonitor,
    Monitor,
    ProbeMonitor,
    StepMonitor,
    StreamMonitor,
    WeightMonitor,
)
from lightning_interp.callbacks.defaults import default_monitors
from lightning_interp.callbacks.finetuning import GAPHeadFinetuning
from lightning_interp.callbacks.inputs import MeasureData, Needs, StreamBatch
from lightning_interp.callbacks.monitors.cam import CAMMonitor
from lightning_interp.callbacks.monitors.filters import FilterMonitor
from lightning_interp.callbacks.monitors.localization import LocalizationMonitor
from lightning_interp.callbacks.monitors.norms import NormMonitor
from lightning_interp.callbacks.monitors.occlusion import OcclusionMonitor
from lightning_interp.callbacks.monitors.saliency import SaliencyMonitor
from lightning_interp.callbacks.monitors.weights import WeightHistogramMonitor
from lightning_interp.callbacks.run.coordinator import Coordinator

__all__ = [
    "CAMMonitor",
    "FilterMonitor",
    "GAPHeadFinetuning",
    "LocalizationMonitor",
    "MeasureData",
    "MeasureMonitor",
    "Monitor",
    "Needs",
    "NormMonitor",
    "OcclusionMonitor",
    "ProbeMonitor",
    "SaliencyMonitor",
    "StepMonitor",
    "StreamBatch",
    "StreamMonitor",
    "WeightHistogramMonitor",
    "WeightMonitor",
    "default_monitors",
]

# The contract imports nothing of how monitors are run; this is where the two meet.
Monitor.attach = Coordinator.attach
