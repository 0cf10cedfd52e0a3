"""Energy-based pointing game: the fraction of a map's positive values on the object."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_interp.localize.boxes import normalize
from lightning_interp.localize.ground_truth import Boxes, boxes_to_masks, check_boxes, check_masks, is_mask

__all__ = ["energy_pointing_game", "energy_pointing_game_compute", "energy_pointing_game_update"]


def energy_pointing_game_update(maps: Tensor, boxes: Boxes) -> Tensor:
    """Compute for each image the object's fraction of its map's positive values, and of its area.

    Args:
        maps: As for ``energy_pointing_game``.
        boxes: As for ``energy_pointing_game``.

    Returns:
        (N, 2) float32 on the maps' device.

    Example:
        >>> energy_pointing_game_update(torch.tensor([[[3.0, 0.0, -5.0, 1.0]]]), torch.tensor([[0, 0, 2, 1]]))
        tensor([[0.7500, 0.5000]])
    """
    values = normalize(maps)  # the fraction does not change, and large values do not overflow
    if is_mask(boxes):
        masks = check_masks(boxes, maps, allow_empty=False)
    else:
        masks = boxes_to_masks(check_boxes(boxes, maps), *maps.shape[1:]).to(maps.device)
    total = values.sum((1, 2))
    inside = (values * masks).sum((1, 2)) / torch.where(total > 0, total, 1)
    return torch.stack([inside, masks.float().mean((1, 2))], dim=1)


def energy_pointing_game_compute(fractions: Tensor) -> Tensor:
    """Average over images.

    Args:
        fractions: (N,), floating.

    Returns:
        () float32; NaN without images.

    Example:
        >>> energy_pointing_game_compute(torch.tensor([0.75, 0.25]))
        tensor(0.5000)
    """
    # In double precision, which not every device has, the result does not depend on the images' order.
    return fractions.cpu().double().mean().float().to(fractions.device)


def energy_pointing_game(maps: Tensor, boxes: Boxes) -> Tensor:
    """Compute the fraction of the maps' positive values that lies on the objects, as the mean over images.

    Args:
        maps: (N, H, W), floating.
        boxes: The objects' boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4) or a list of N tensors
            (M, 4), of which the pixels count whose centres lie in any; or their masks, (N, H, W) bool.

    Returns:
        () float32 in [0, 1]; NaN without images. A map without a positive value, or with NaN, counts 0.

    Raises:
        ConfigurationError: If boxes or masks are missing, empty, of another size or outside the image.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[3.0, 0.0, -5.0, 1.0]]])
        >>> energy_pointing_game(maps, torch.tensor([[0, 0, 2, 1]]))
        tensor(0.7500)

    Reference:
        Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks", CVPR
        workshops 2020.
    """
    return energy_pointing_game_compute(energy_pointing_game_update(maps, boxes)[:, 0])
