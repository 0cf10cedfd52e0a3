"""Callbacks for PyTorch Lightning that show what a vision model is learning while it trains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp import explain as explain
    from lightning_interp import localize as localize
    from lightning_interp import sinks as sinks
    from lightning_interp.callbacks import (
        CAMMonitor,
        FilterMonitor,
        GAPHeadFinetuning,
        LocalizationMonitor,
        NormMonitor,
        OcclusionMonitor,
        SaliencyMonitor,
        WeightHistogramMonitor,
        default_monitors,
    )
    from lightning_interp.data.probe import Probe
    from lightning_interp.errors import ConfigurationError

__version__ = "0.1.0"

__all__ = [
    "CAMMonitor",
    "ConfigurationError",
    "FilterMonitor",
    "GAPHeadFinetuning",
    "LocalizationMonitor",
    "NormMonitor",
    "OcclusionMonitor",
    "Probe",
    "SaliencyMonitor",
    "WeightHistogramMonitor",
    "default_monitors",
    "explain",
    "localize",
    "sinks",
]

# Resolved when first asked for: explaining in a notebook loads no Lightning, and importing the package costs nothing.
_HOMES = {
    "ConfigurationError": "lightning_interp.errors",
    "Probe": "lightning_interp.data.probe",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("explain", "localize", "sinks"):
        return importlib.import_module(f"lightning_interp.{name}")
    return getattr(importlib.import_module(_HOMES.get(name, "lightning_interp.callbacks")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
