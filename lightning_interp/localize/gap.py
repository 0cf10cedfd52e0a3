"""Any classifier as one whose class activation maps are exact: pooling and one linear layer after its last places."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.localize._cut import cut
from lightning_interp.localize._heads import LinearHead, PooledMaps, kept_head
from lightning_interp.localize._stride import refine
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
    r"""A classifier of pooled features and one linear layer, so that each logit is the mean of a map.

    .. math:: \text{logit}_k = b_k + \frac{1}{hw} \sum_{y, x} M_k(y, x), \qquad M_k = \sum_c w_{kc} A_c

    in eval mode and float32. ``forward`` gives logits, so it trains, exports and checkpoints like any module;
    :meth:`forward_with_maps` gives the maps from the same pass. Make one of a classifier with :meth:`from_classifier`.

    Args:
        features: A module from images (N, 3, H, W) to features (N, C, h, w).
        head: A module from features to logits (N, K), with ``maps(features)`` (N, K, h, w) and ``bias``, (K,) or None.

    Attributes:
        features: All up to the last places.
        head: What makes logits and maps of them.
        summary: What was cut where, and what became of the head.

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

        What comes after the last tensor with places (before the final pooling or flattening, found by running the
        model) is replaced by average pooling and one linear layer. With ``num_classes=None`` a head that is that
        already, or a fully convolutional one, or one with a norm between pooling and linear layer, keeps its trained
        weights, so that the logits stay what they were. Auxiliary heads are dropped.

        Args:
            model: Any classifier of images. A ``GAPClassifier`` comes back as an equal one where nothing else is asked.
            num_classes: K of a new head; None: as many classes as the model has, with its weights where they fit.
            layer: Where to cut: a submodule, its dotted name, or None.
            sample: (N, C, H, W) images to run the model with; only their shape, dtype and device matter. None:
                1 x 3 x 224 x 224.
            output_stride: 8 or 16: finer maps without new weights, by dilation in place of stride; a last pooling that
                no convolution follows is dropped. The logits, being means over more places, change a little. Not for
                transformers.
            conv_channels: Adds a 3 x 3 convolution to so many channels and a rectifier before the pooling, as the
                paper does (1024); the head is new then.
            dropout: Probability of dropout before the linear layer.

        Returns:
            The adapted classifier, on the model's device, in its dtype, with its modes and frozen parts.

        Raises:
            ConfigurationError: If the model has no place to cut, an argument is out of range, or ``output_stride``
                cannot be reached.

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
        renewed = num_classes is not None or conv_channels is not None or bool(dropout)
        if isinstance(model, GAPClassifier) and not renewed and layer is None and output_stride is None:
            return copy.deepcopy(model)
        if layer is not None:
            layer = layer_name(model, find_layer(model, layer))
        model = copy.deepcopy(model)
        images = _noise(model, sample)
        site = _site(model, images, layer)
        if output_stride is not None:
            refine(model, images, site, output_stride)
            if site.module is None:
                site = _site(model, images, layer)  # calls by function may have become others
        kept = _kept(model, images, site, dropout)
        are_maps = isinstance(kept, PooledMaps)  # there is no linear layer that a dropout could stand before
        kind, classes = type(model).__name__, num_classes or _number_of_classes(model, images)
        if num_classes is None and conv_channels is None and kept is not None and not (are_maps and dropout):
            features, head = _up_to(model, images, site), kept
            summary = f"{kind} is cut at {site.name!r} and keeps the weights of its head"
        else:
            if are_maps and layer is None and not isinstance(model, GAPClassifier):
                site = locate_last_convolution(model, images)  # maps of the old classes are no features
            features, head = _new_head(_up_to(model, images, site), images, classes, conv_channels, dropout)
            summary = f"{kind} is cut at {site.name!r}; a new head of {classes} classes replaces what came after"
            if num_classes is None:
                warnings.warn(
                    f"{summary}, which was more than average pooling and one linear layer: train it before you use its "
                    "logits or maps. Pass num_classes to say that this is meant",
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
        """(N, 3, H, W) images to (N, K) logits and the (N, K, h, w) maps whose means they are, but for the bias."""
        features = self.features(images)
        return self.head(features), self.head.maps(features)  # type: ignore[operator]


def _check_options(
    model: object, num_classes: object, output_stride: object, conv_channels: object, dropout: object
) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a classifier, a torch.nn.Module, got {describe(model)}")
    for name, value in {"num_classes": num_classes, "conv_channels": conv_channels}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigurationError(f"{name} takes a positive integer or None, got {value!r}")
    if output_stride not in (None, 8, 16):
        raise ConfigurationError(f"output_stride takes 8, 16 or None, got {output_stride!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout takes a probability of at least 0 and below 1, got {dropout!r}")


def _noise(model: nn.Module, sample: Tensor | None) -> Tensor:
    """Images like the sample, on which no two tensors of a model come out the same."""
    like = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(()))
    shape = torch.Size((1, 3, 224, 224)) if sample is None else checked_images(sample).shape
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(like.device, like.dtype if sample is None else sample.dtype)


def _site(model: nn.Module, images: Tensor, layer: str | None) -> HookPoint:
    try:
        return locate_features(model, images) if layer is None else locate(model, layer)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} does not run on images {tuple(images.shape)}: {error}. Pass sample=, images of "
            "the size that it takes"
        ) from error


def _kept(model: nn.Module, images: Tensor, site: HookPoint, dropout: float) -> nn.Module | None:
    """The model's own head, where it will do."""
    image_size = (images.shape[2], images.shape[3])
    with preserve_state(model), torch.no_grad():
        there = run_until(model, images.clone(), site)
        # Noise in place of the features, of every scale the same: untrained networks leave nothing to compare.
        noise = torch.randn(there.shape, generator=torch.Generator().manual_seed(0)).to(there)

        def tail(features: Tensor) -> Tensor:
            with replace(site, lambda _: noise):
                return output_logits(run_model(model, images.clone(), None))

        features = to_grid(noise, image_size)
        if features.ndim != 4:
            raise ConfigurationError(
                f"the layer {site.name!r} gives {tuple(there.shape)}, which has no places in the image; choose a layer "
                "that gives (N, C, h, w) or tokens"
            )
        found = kept_head(model, features, tail, dropout)
    if found is None:
        return None
    head, sources = found
    for mine, theirs in zip(head.parameters(), sources, strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return head


def _up_to(model: nn.Module, images: Tensor, site: HookPoint) -> nn.Module:
    if isinstance(model, GAPClassifier) and site.module is model.features:
        return model.features
    return cut(model, images, site)


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
        there = features(images.clone())
    like: dict[str, Any] = {"device": there.device, "dtype": there.dtype}
    channels = there.shape[1]
    if conv_channels is not None:
        convolution = nn.Conv2d(channels, conv_channels, 3, padding=1, **like)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        training = features.training
        features, channels = nn.Sequential(features, convolution, nn.ReLU(inplace=True)), conv_channels
        for each in (features, *features[1:]):
            each.training = training  # but not all below: the user may have frozen some
    return features, LinearHead(channels, num_classes, dropout=dropout).to(**like)
