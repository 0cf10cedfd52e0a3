"""Histograms and norms of weights and gradients."""

from lightning_interp.weights.histograms import BinCounts, Histograms, histograms
from lightning_interp.weights.norms import Layers, check_order, parameter_norms

__all__ = ["BinCounts", "Histograms", "Layers", "check_order", "histograms", "parameter_norms"]
