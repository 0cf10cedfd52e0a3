"""Where things are: classifiers as localizers, maps as boxes and masks, and how good they are."""

from lightning_interp.localize.boxes import fit_threshold, maps_to_boxes, maps_to_masks
from lightning_interp.localize.functional import (
    energy_pointing_game,
    max_box_accuracy,
    pixel_average_precision,
    pointing_game,
)
from lightning_interp.localize.gap import GAPClassifier
from lightning_interp.localize.metrics import EnergyPointingGame, MaxBoxAccuracy, PixelAveragePrecision, PointingGame

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
