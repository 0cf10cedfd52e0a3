"""The five monitors that suit most models."""

from __future__ import annotations

from typing_extensions import Unpack

from lightning_interp.callbacks.contract import Monitor, MonitorOptions, ProbeMonitorOptions
from lightning_interp.callbacks.monitors.cam import CAMMonitor
from lightning_interp.callbacks.monitors.filters import FilterMonitor
from lightning_interp.callbacks.monitors.norms import NormMonitor
from lightning_interp.callbacks.monitors.saliency import SaliencyMonitor
from lightning_interp.callbacks.monitors.weights import WeightHistogramMonitor

__all__ = ["default_monitors"]


def default_monitors(**options: Unpack[ProbeMonitorOptions]) -> list[Monitor]:
    """Return Grad-CAM, saliency, first filters, weight histograms and norms, on one shared probe.

    Args:
        **options: The options of every monitor (``every_n_epochs``, ``at_epochs``, ``every_n_train_steps``,
            ``at_start``, ``name``, ``on_error``), and of those with a probe (``probe``, ``predict``, ``unpack``).

    Returns:
        Five callbacks for ``Trainer(callbacks=...)``.

    Raises:
        ConfigurationError: If an option is out of range.
        TypeError: If there is no such option.

    Example:
        >>> from lightning_interp import default_monitors
        >>> default_monitors(every_n_epochs=2, probe=16)
        [CAMMonitor, SaliencyMonitor, FilterMonitor, WeightHistogramMonitor, NormMonitor]
    """
    common: MonitorOptions = {name: options[name] for name in MonitorOptions.__annotations__ if name in options}  # type: ignore[literal-required, assignment]
    return [
        CAMMonitor(**options),
        SaliencyMonitor(**options),
        FilterMonitor(**common),
        WeightHistogramMonitor(**common),
        NormMonitor(**common),
    ]
