"""The callbacks: one monitor a file, all Trainer hooks in ``base.py``."""

from lightning_interp.callbacks.base import Monitor, ProbeMonitor
from lightning_interp.callbacks.defaults import default_monitors
from lightning_interp.callbacks.finetuning import GAPHeadFinetuning
from lightning_interp.callbacks.monitors.cam import CAMMonitor
from lightning_interp.callbacks.monitors.filters import FilterMonitor
from lightning_interp.callbacks.monitors.localization import LocalizationMonitor
from lightning_interp.callbacks.monitors.norms import NormMonitor
from lightning_interp.callbacks.monitors.occlusion import OcclusionMonitor
from lightning_interp.callbacks.monitors.saliency import SaliencyMonitor
from lightning_interp.callbacks.monitors.weights import WeightHistogramMonitor

__all__ = [
    "CAMMonitor",
    "FilterMonitor",
    "GAPHeadFinetuning",
    "LocalizationMonitor",
    "Monitor",
    "NormMonitor",
    "OcclusionMonitor",
    "ProbeMonitor",
    "SaliencyMonitor",
    "WeightHistogramMonitor",
    "default_monitors",
]
