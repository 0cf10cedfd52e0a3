"""Localisation: classifiers with exact class activation maps, maps as boxes and masks, and metrics of both."""

from lightning_interp.localize._functional import (
    energy_pointing_game,
    max_box_accuracy,
    pixel_average_precision,
    pointing_game,
)
from lightning_interp.localize.boxes import maps_to_boxes, maps_to_masks
from lightning_interp.localize.gap import GAPClassifier
from lightning_interp.localize.metrics import EnergyPointingGame, MaxBoxAccuracy, PixelAveragePrecision, PointingGame
from lightning_interp.localize.thresholds import fit_threshold

__all__ = [
    "EnergyPointingGame",
    "GAPClassifier",
    "MaxBoxAccuracy",
    "PixelAveragePrecision",
    "PointingGame",
    "energy_pointing_game",
    "fit_threshold",
    "maps_to_boxes",
    "maps_to_masks",
    "max_box_accuracy",
    "pixel_average_precision",
    "pointing_game",
]
