"""Adaptation of any classifier to one with exact class activation maps, by pooling and one linear layer."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.checks import check_choice, check_integer, check_number
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.localize._cut import cut
from lightning_interp.localize._heads import LinearHead, PooledMaps, equivalent_head
from lightning_interp.localize._stride import limit_output_stride
from lightning_interp.model.hooks import HookPoint, replace, run_until
from lightning_interp.model.layout import to_grid
from lightning_interp.model.locate import (
    find_layer,
    layer_name,
    locate,
    locate_features,
    locate_last_convolution,
    unwrap_compiled,
)
from lightning_interp.model.outputs import checked_images, output_logits, run_model
from lightning_interp.model.preserve import preserve_state

__all__ = ["GAPClassifier"]

_log = logging.getLogger(__name__)


class GAPClassifier(nn.Module):
    r"""A classifier with pooled features and one linear layer, so that each logit is the mean of a map.

    .. math:: \text{logit}_k = b_k + \frac{1}{hw} \sum_{y, x} M_k(y, x), \qquad M_k = \sum_c w_{kc} A_c

    in eval mode and float32. ``forward`` returns logits, so it trains, exports and checkpoints like any module;
    :meth:`forward_with_maps` returns the maps of the same pass as well. :meth:`from_classifier` adapts a classifier.

    Args:
        features: A module from images (N, 3, H, W) to features (N, C, h, w).
        head: A module from features to logits (N, K), with ``maps(features)`` (N, K, h, w) and ``bias``, (K,) or None.

    Attributes:
        features: The module from images to features.
        head: The module from features to logits and maps.
        summary: Where the classifier was cut, and whether its head was kept.

    Reference:
        Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """

    summary: str = ""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    @classmethod
    def from_classifier(
        cls,
        model: nn.Module,
        num_classes: int | None = None,
        *,
        layer: str | nn.Module | None = None,
        sample: Tensor | None = None,
        output_stride: int | None = None,
        conv_channels: int | None = None,
        dropout: float = 0.0,
    ) -> GAPClassifier:
        """Adapt a classifier; the given one is not changed.

        The layers after the last spatial features (before the final pooling or flattening, located by running the
        model) are replaced by average pooling and one linear layer. With ``num_classes=None`` a head that consists of
        these, a fully convolutional one, or one with a norm between pooling and linear layer keeps its trained
        weights, so that the logits do not change. Auxiliary heads are dropped.

        Args:
            model: Any image classifier. A ``GAPClassifier`` is returned as a copy if no option is given.
            num_classes: K of a new head; None: the model's classes, with its weights where possible.
            layer: The layer whose output becomes the features: a submodule, its dotted name, or None.
            sample: (N, C, H, W) images to run the model with; only their shape, dtype and device matter. None:
                1 x 3 x 224 x 224.
            output_stride: 8 or 16: maps of higher resolution without new weights, by dilation in place of stride; a
                last pooling that no convolution follows is removed. The logits, being means over more positions,
                change a little. Not for transformers.
            conv_channels: Adds a 3 x 3 convolution with this number of output channels and a ReLU before the
                pooling, as the paper does (1024); the head is new then.
            dropout: Probability of dropout before the linear layer.

        Returns:
            The adapted classifier, on the model's device, in its dtype, with its modes and frozen parameters.

        Raises:
            ConfigurationError: If the model has no spatial features, an argument is out of range, or
                ``output_stride`` cannot be reached.

        Example:
            >>> import torch
            >>> from torchvision.models import resnet18
            >>> from lightning_interp.localize import GAPClassifier
            >>> model = resnet18().eval()
            >>> localizer = GAPClassifier.from_classifier(model)
            >>> images = torch.rand(2, 3, 224, 224)
            >>> logits, maps = localizer.forward_with_maps(images)
            >>> maps.shape, torch.allclose(logits, model(images), atol=1e-5)
            (torch.Size([2, 1000, 7, 7]), True)
            >>> torch.allclose(maps.mean((2, 3)) + localizer.head.bias, logits, atol=1e-5)
            True
        """
        _check_options(model, num_classes, output_stride, conv_channels, dropout)
        model = unwrap_compiled(model)
        has_new_head = num_classes is not None or conv_channels is not None or bool(dropout)
        if isinstance(model, GAPClassifier) and not has_new_head and layer is None and output_stride is None:
            return copy.deepcopy(model)
        if layer is not None:
            layer = layer_name(model, find_layer(model, layer))
        model = copy.deepcopy(model)
        images = _noise(model, sample)
        point = _locate(model, images, layer)
        if output_stride is not None:
            limit_output_stride(model, images, point, output_stride)
            if point.module is None:
                point = _locate(model, images, layer)  # the numbers of function calls may have changed
        kept = _kept_head(model, images, point, dropout)
        is_convolutional = isinstance(kept, PooledMaps)  # without a linear layer that dropout could precede
        kind, classes = type(model).__name__, num_classes or _number_of_classes(model, images)
        if num_classes is None and conv_channels is None and kept is not None and not (is_convolutional and dropout):
            features, head = _features(model, images, point), kept
            summary = f"{kind} is cut at {point.name!r} and keeps the weights of its head"
        else:
            if is_convolutional and layer is None and not isinstance(model, GAPClassifier):
                point = locate_last_convolution(model, images)  # the model's class maps are no features
            features, head = _new_head(_features(model, images, point), images, classes, conv_channels, dropout)
            summary = f"{kind} is cut at {point.name!r}; a new head of {classes} classes replaces the layers after it"
            if num_classes is None:
                warnings.warn(
                    f"{summary}, which were more than average pooling and one linear layer: train it before you use "
                    "its logits or maps. Pass num_classes to confirm that a new head is wanted",
                    stacklevel=2,
                )
        head.train(model.training)
        adapted = cls(features, head)
        adapted.training = model.training
        adapted.summary = summary
        _log.info(summary)
        return adapted

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images to (N, K) logits."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def forward_with_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) images to (N, K) logits and (N, K, h, w) maps, whose means plus the bias are the logits."""
        features = self.features(images)
        return self.head(features), self.head.maps(features)  # type: ignore[operator]


def _check_options(
    model: object, num_classes: object, output_stride: object, conv_channels: object, dropout: object
) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a classifier, a torch.nn.Module, got {describe(model)}")
    for name, value in {"num_classes": num_classes, "conv_channels": conv_channels}.items():
        if value is not None:
            check_integer(name, value)
    check_choice("output_stride", output_stride, (8, 16, None))
    takes = "a probability of at least 0 and below 1"
    check_number("dropout", dropout, takes, lambda probability: 0 <= probability < 1)


def _noise(model: nn.Module, sample: Tensor | None) -> Tensor:
    """Random images of the sample's shape and dtype, for which no two tensors of a model are equal."""
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.zeros(()))
    shape = torch.Size((1, 3, 224, 224)) if sample is None else checked_images(sample).shape
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(like.device, like.dtype if sample is None else sample.dtype)


def _locate(model: nn.Module, images: Tensor, layer: str | None) -> HookPoint:
    try:
        return locate_features(model, images) if layer is None else locate(model, layer)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} does not run on images {tuple(images.shape)}: {error}. Pass sample=, images of "
            "the size that it takes"
        ) from error


def _kept_head(model: nn.Module, images: Tensor, point: HookPoint, dropout: float) -> nn.Module | None:
    """A head with the model's weights, if it computes the model's logits."""
    image_size = (images.shape[2], images.shape[3])
    with preserve_state(model), torch.no_grad():
        activations = run_until(model, images.clone(), point)
        # Noise of unit scale in place of the features: those of untrained networks may be too small to compare.
        noise = torch.randn(activations.shape, generator=torch.Generator().manual_seed(0)).to(activations)

        def tail(features: Tensor) -> Tensor:
            with replace(point, lambda _: noise):
                return output_logits(run_model(model, images.clone(), None))

        features = to_grid(noise, image_size)
        if features.ndim != 4:
            raise ConfigurationError(
                f"the layer {point.name!r} gives {tuple(activations.shape)}, which has no spatial positions; choose a "
                "layer that gives (N, C, h, w) or tokens"
            )
        equivalent = equivalent_head(model, features, tail, dropout)
    if equivalent is None:
        return None
    head, sources = equivalent
    for parameter, source in zip(head.parameters(), sources, strict=True):
        parameter.requires_grad_(source.requires_grad)
    return head


def _features(model: nn.Module, images: Tensor, point: HookPoint) -> nn.Module:
    """The module from images to the features at a point."""
    if isinstance(model, GAPClassifier) and point.module is model.features:
        return model.features
    return cut(model, images, point)


def _number_of_classes(model: nn.Module, images: Tensor) -> int:
    with preserve_state(model), torch.no_grad():
        logits = output_logits(run_model(model, images.clone(), None))
    if logits.ndim != 2:
        raise ConfigurationError(
            f"{type(model).__name__} gives {tuple(logits.shape)}, no class scores (N, K); adapt a classifier"
        )
    return logits.shape[1]


def _new_head(
    features: nn.Module, images: Tensor, num_classes: int, conv_channels: int | None, dropout: float
) -> tuple[nn.Module, nn.Module]:
    with preserve_state(features), torch.no_grad():
        activations = features(images.clone())
    like: dict[str, Any] = {"device": activations.device, "dtype": activations.dtype}
    channels = activations.shape[1]
    if conv_channels is not None:
        convolution = nn.Conv2d(channels, conv_channels, 3, padding=1, **like)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        training = features.training
        features, channels = nn.Sequential(features, convolution, nn.ReLU(inplace=True)), conv_channels
        for module in (features, *features[1:]):
            module.training = training  # but not that of all submodules, of which the user may have frozen some
    return features, LinearHead(channels, num_classes, dropout=dropout).to(**like)
