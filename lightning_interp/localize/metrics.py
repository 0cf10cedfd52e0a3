"""Localisation metrics as torchmetrics: exact over batches and ranks, each with trivial baselines."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_interp.checks import check_integer
from lightning_interp.errors import ConfigurationError
from lightning_interp.localize._functional.energy_pointing_game import (
    energy_pointing_game_compute,
    energy_pointing_game_update,
)
from lightning_interp.localize._functional.max_box_accuracy import (
    max_box_accuracy_compute,
    max_box_accuracy_update,
    version_options,
)
from lightning_interp.localize._functional.pixel_average_precision import (
    pixel_average_precision_compute,
    pixel_average_precision_update,
)
from lightning_interp.localize._functional.pointing_game import (
    DEFAULT_TOLERANCE,
    check_tolerance,
    pointing_game_compute,
    pointing_game_update,
)
from lightning_interp.localize.boxes import Normalization, check_normalization
from lightning_interp.localize.ground_truth import Boxes
from lightning_interp.localize.thresholds import best_threshold

__all__ = ["EnergyPointingGame", "LocalizationMetric", "MaxBoxAccuracy", "PixelAveragePrecision", "PointingGame"]


class LocalizationMetric(Metric):
    """A localisation metric that also scores trivial predictions, its baselines. Abstract.

    Args:
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> issubclass(MaxBoxAccuracy, LocalizationMetric)
        True
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def baselines(self) -> dict[str, Tensor]:
        """Score the baselines on the same images, those of all ranks together.

        Like ``compute``, a collective: every rank must call it.

        Returns:
            For each baseline a () float32; NaN without images.

        Example:
            >>> import torch
            >>> metric = EnergyPointingGame()
            >>> metric.update(torch.ones(1, 4, 4), torch.tensor([[0, 0, 2, 2]]))
            >>> metric.baselines()
            {'uniform': tensor(0.2500)}
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return {name: value.clone() for name, value in self._baselines().items()}

    @abstractmethod
    def _baselines(self) -> dict[str, Tensor]:
        """The baselines' scores, from synchronised states."""


class MaxBoxAccuracy(LocalizationMetric):
    """Fraction of images for which a box drawn from the map is correct, at the best threshold for the set.

    Its baselines do not depend on the image's content: ``"whole_image"``, the image's outline as the box, and
    ``"centered_box"``, a centred box of the image's shape, at the best size for the set (of sides 1 / n, 2 / n, ... 1
    of the image's; for version 2 the best for each IoU).

    Args:
        version: 1: the largest component's box, IoU at least 0.5. 2: the best over all components' boxes, the mean
            over IoU 0.3, 0.5 and 0.7, each at the best threshold for it.
        n_thresholds: Number of thresholds that are tried, n: 0, 1 / n, 2 / n, ...
        normalization: See ``maps_to_masks``.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: If an option is out of range.

    Example:
        >>> import torch
        >>> maps = torch.zeros(2, 8, 8)
        >>> maps[:, 2:6, 2:6] = 1.0
        >>> metric = MaxBoxAccuracy()
        >>> metric.update(maps, torch.tensor([[2, 2, 6, 6], [0, 0, 3, 3]]))
        >>> metric.compute(), metric.best_threshold()
        (tensor(0.5000), 0.499...)
        >>> metric.baselines()
        {'whole_image': tensor(0.), 'centered_box': tensor(0.5000)}

    Reference:
        Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020.
    """

    hits: Tensor
    centered: Tensor
    count: Tensor

    def __init__(
        self,
        version: Literal[1, 2] = 1,
        *,
        n_thresholds: int = 1000,
        normalization: Normalization = "relu_max",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _, ious = version_options(version)
        self.version, self.n_thresholds = version, check_integer("n_thresholds", n_thresholds)
        self.normalization = check_normalization(normalization)
        zeros = torch.zeros(len(ious), self.n_thresholds, dtype=torch.int64)
        self.add_state("hits", zeros, dist_reduce_fx="sum")
        self.add_state("centered", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, maps: Tensor, boxes: Boxes) -> None:
        """Add images.

        Args:
            maps: (N, H, W), floating.
            boxes: x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4), or a list of N tensors (M, 4), of which
                any may be matched.

        Raises:
            ConfigurationError: If boxes are missing, empty or outside the image.
        """
        hits, centered = max_box_accuracy_update(maps, boxes, self.version, self.n_thresholds, self.normalization)
        self.hits += hits.to(self.hits.device)
        self.centered += centered.to(self.centered.device)
        self.count += len(maps)

    def compute(self) -> Tensor:
        """Compute the score of all images.

        Returns:
            () float32 in [0, 1]; NaN without images.
        """
        return max_box_accuracy_compute(self.hits, self.count)

    def best_threshold(self) -> float:
        """Return the threshold at which the most boxes are correct, over all ranks; of version 2 the sum over the IoUs.

        Returns:
            The middle of the longest run of such thresholds, for ``maps_to_boxes``; 0.2 where no box is correct at any.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return best_threshold(self.hits.sum(0))

    def _baselines(self) -> dict[str, Tensor]:
        return {
            "whole_image": max_box_accuracy_compute(self.centered[:, -1:], self.count),
            "centered_box": max_box_accuracy_compute(self.centered, self.count),
        }


class PixelAveragePrecision(LocalizationMetric):
    """Area under the precision-recall curve of all images' pixels together (PxAP).

    Its baseline is ``"uniform"``, a constant map: the objects' fraction of the pixels.

    Args:
        n_thresholds: Number of bins into which the normalised maps are divided.
        normalization: See ``maps_to_masks``.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: If an option is out of range.

    Example:
        >>> import torch
        >>> metric = PixelAveragePrecision()
        >>> metric.update(torch.tensor([[[0.9, 0.2, 1.0, 0.1]]]), torch.tensor([[[True, False, True, False]]]))
        >>> metric.compute(), metric.baselines()
        (tensor(1.), {'uniform': tensor(0.5000)})

    Reference:
        Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020.
    """

    counts: Tensor

    def __init__(self, *, n_thresholds: int = 1000, normalization: Normalization = "relu_max", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_thresholds = check_integer("n_thresholds", n_thresholds)
        self.normalization = check_normalization(normalization)
        self.add_state("counts", torch.zeros(2, self.n_thresholds + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> None:
        """Add images.

        Args:
            maps: (N, H, W), floating.
            masks: (N, H, W) bool, the objects' pixels. Images of background alone are allowed.
            ignore: (N, H, W) bool, pixels that are left out, whether object or background.

        Raises:
            ConfigurationError: If masks are of another type or size.
        """
        counts = pixel_average_precision_update(maps, masks, ignore, self.n_thresholds, self.normalization)
        self.counts += counts.to(self.counts.device)

    def compute(self) -> Tensor:
        """Compute the score of all images.

        Returns:
            () float32 in [0, 1]; NaN where no pixel belongs to an object.
        """
        return pixel_average_precision_compute(self.counts)

    def _baselines(self) -> dict[str, Tensor]:
        return {"uniform": pixel_average_precision_compute(self.counts.sum(1, keepdim=True))}


class PointingGame(LocalizationMetric):
    """Fraction of images whose map has its maximum on the object.

    Its baseline is ``"center"``, the image's central pixel in place of the maximum.

    Args:
        tolerance: The largest distance from the object that counts as a hit: an int in pixels, a float as a fraction
            of the image's shorter side. The default is the paper's 15 pixels at 224.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: If the tolerance is out of range.

    Example:
        >>> import torch
        >>> maps = torch.zeros(2, 32, 32)
        >>> maps[:, 4, 4] = 1.0
        >>> metric = PointingGame(tolerance=2)
        >>> metric.update(maps, torch.tensor([[5, 5, 9, 9], [10, 10, 30, 30]]))
        >>> metric.compute(), metric.baselines()
        (tensor(0.5000), {'center': tensor(0.5000)})

    Reference:
        Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016; IJCV 2018.
    """

    rows: list[Tensor] | Tensor

    def __init__(self, tolerance: int | float = DEFAULT_TOLERANCE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance = check_tolerance(tolerance)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, maps: Tensor, boxes: Boxes, classes: Tensor | None = None) -> None:
        """Add images.

        Args:
            maps: (N, H, W), floating. Of several maxima the first in reading order counts; a map without a positive
                value is a miss.
            boxes: The objects' boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4) or a list of N
                tensors (M, 4), of which any may be hit; or their masks, (N, H, W) bool.
            classes: int64 (N,), the class that each map explains: then the rates of the classes are averaged, as in
                the paper. They are given for all batches or for none.

        Raises:
            ConfigurationError: If boxes or masks are missing, empty, of another size or outside the image, or classes
                are negative, of another number, or given for some batches only.
        """
        rows = pointing_game_update(maps, boxes, classes, self.tolerance)
        first_class = _columns(self.rows, 3, self.device)[:1, 0]
        if len(first_class) and len(rows) and bool(first_class < 0) != (classes is None):
            raise ConfigurationError("classes must be given for all batches or for none, got both; call reset() first")
        _append(self.rows, rows, self.device)

    def compute(self) -> Tensor:
        """Compute the score of all images.

        Returns:
            () float32 in [0, 1]; NaN without images.
        """
        return pointing_game_compute(_columns(self.rows, 3, self.device)[:, [0, 1]])

    def _baselines(self) -> dict[str, Tensor]:
        return {"center": pointing_game_compute(_columns(self.rows, 3, self.device)[:, [0, 2]])}


class EnergyPointingGame(LocalizationMetric):
    """Fraction of the maps' positive values that lies on the objects, as the mean over images.

    Its baseline is ``"uniform"``, a constant map: the objects' fraction of the area.

    Args:
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = EnergyPointingGame()
        >>> metric.update(torch.tensor([[[3.0, 0.0, -5.0, 1.0]]]), torch.tensor([[0, 0, 2, 1]]))
        >>> metric.compute(), metric.baselines()
        (tensor(0.7500), {'uniform': tensor(0.5000)})

    Reference:
        Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks", CVPR
        workshops 2020.
    """

    rows: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, maps: Tensor, boxes: Boxes) -> None:
        """Add images.

        Args:
            maps: (N, H, W), floating. A map without a positive value counts 0.
            boxes: The objects' boxes, x1, y1, x2, y2 in the maps' pixels, maxima exclusive: (N, 4) or a list of N
                tensors (M, 4), of which the pixels count whose centres lie in any; or their masks, (N, H, W) bool.

        Raises:
            ConfigurationError: If boxes or masks are missing, empty, of another size or outside the image.
        """
        _append(self.rows, energy_pointing_game_update(maps, boxes), self.device)

    def compute(self) -> Tensor:
        """Compute the score of all images.

        Returns:
            () float32 in [0, 1]; NaN without images.
        """
        return energy_pointing_game_compute(_columns(self.rows, 2, self.device)[:, 0])

    def _baselines(self) -> dict[str, Tensor]:
        return {"uniform": energy_pointing_game_compute(_columns(self.rows, 2, self.device)[:, 1])}


def _append(state: Any, rows: Tensor, device: Any) -> None:
    # Flat float32, like the empty state that torchmetrics gathers from a rank without images.
    state.append(rows.to(device, torch.float32).flatten())


def _columns(state: Any, columns: int, device: Any) -> Tensor:
    """The rows of all batches; after synchronisation the state is one tensor."""
    flat = state if isinstance(state, Tensor) else torch.cat([torch.zeros(0, device=device), *state])
    return flat.reshape(-1, columns)
