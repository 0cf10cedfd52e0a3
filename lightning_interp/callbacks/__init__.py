"""The callbacks: one monitor a file, all Trainer hooks in ``base.py``."""

from lightning_interp.callbacks.base import Monitor, ProbeMonitor
from lightning_interp.callbacks.cam import CAMMonitor
from lightning_interp.callbacks.defaults import default_monitors
from lightning_interp.callbacks.filters import FilterMonitor
from lightning_interp.callbacks.finetuning import GAPHeadFinetuning
from lightning_interp.callbacks.localization import LocalizationMonitor
from lightning_interp.callbacks.norms import NormMonitor
from lightning_interp.callbacks.occlusion import OcclusionMonitor
from lightning_interp.callbacks.saliency import SaliencyMonitor
from lightning_interp.callbacks.weights import WeightHistogramMonitor

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
