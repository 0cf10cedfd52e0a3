"""Tensors as uint8 pictures: colour maps, overlays, captioned grids, filters, heatmaps over a run."""

from lightning_interp.render.boxes import draw_boxes
from lightning_interp.render.colors import check_colormap, colorize, overlay
from lightning_interp.render.filters import filter_grid
from lightning_interp.render.plots import history_heatmap
from lightning_interp.render.tiles import Caption, ColorScale, enlarge, side_by_side, tile_grid

__all__ = [
    "Caption",
    "ColorScale",
    "check_colormap",
    "colorize",
    "draw_boxes",
    "enlarge",
    "filter_grid",
    "history_heatmap",
    "overlay",
    "side_by_side",
    "tile_grid",
]
