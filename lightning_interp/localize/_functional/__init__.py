"""Localisation metrics as functions: for each metric its update, its compute, and both in one call."""

from lightning_interp.localize._functional.energy_pointing_game import energy_pointing_game
from lightning_interp.localize._functional.max_box_accuracy import max_box_accuracy
from lightning_interp.localize._functional.pixel_average_precision import pixel_average_precision
from lightning_interp.localize._functional.pointing_game import pointing_game

__all__ = ["energy_pointing_game", "max_box_accuracy", "pixel_average_precision", "pointing_game"]
