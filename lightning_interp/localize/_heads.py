"""What turns features into logits and class maps: pooling, a norm where the original has one, one linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from lightning_interp.model.locate import linear_heads

__all__ = ["LinearHead", "PooledMaps", "kept_head"]

Tail = Callable[[Tensor], Tensor]


class LinearHead(nn.Linear):
    """Global average pooling and one linear layer, with a norm between them where there is one.

    Args:
        in_features: C.
        num_classes: K.
        norm: ``nn.LayerNorm`` or ``nn.BatchNorm1d`` of C, applied to the pooled features, or None.
        dropout: The probability of the dropout before the linear layer.
        bias: Whether there is one.
    """

    def __init__(
        self, in_features: int, num_classes: int, norm: nn.Module | None = None, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__(in_features, num_classes, bias)
        self.norm = norm
        self.dropout = nn.Dropout(dropout) if dropout else None

    def reset_parameters(self) -> None:
        """Start with zeros.

        What all classes have in common moves no probability, so training would never take random weights out of the
        maps.
        """
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) features to (N, K) logits."""
        pooled = features.mean((2, 3))
        if self.norm is not None:
            pooled = self.norm(pooled)
        if self.dropout is not None:
            pooled = self.dropout(pooled)
        return super().forward(pooled)

    def maps(self, features: Tensor) -> Tensor:
        """(N, C, h, w) features to (N, K, h, w): each place's share of the logits, all but the bias."""
        if self.norm is None:
            return F.conv2d(features, self.weight[:, :, None, None])
        return F.conv2d(_normalized(features, self.norm), self.weight[:, :, None, None])


class PooledMaps(nn.Module):
    """The head of a fully convolutional classifier, whose features are class maps already."""

    bias: None = None

    def forward(self, features: Tensor) -> Tensor:
        """(N, K, h, w) maps to (N, K) logits."""
        return features.mean((2, 3))

    def maps(self, features: Tensor) -> Tensor:
        """The maps themselves."""
        return features


def _normalized(features: Tensor, norm: nn.Module) -> Tensor:
    """What a norm of the pooled features does at each place: linear, once its statistics are given."""
    scale, shift = norm.weight, norm.bias
    if isinstance(norm, nn.LayerNorm):
        centred = features - features.mean(1, keepdim=True)
        variance = centred.mean((2, 3), keepdim=True).square().mean(1, keepdim=True)
        normal = centred / (variance + norm.eps).sqrt()
    else:
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        normal = (features - mean) / (variance + norm.eps).sqrt()
    if isinstance(scale, Tensor):
        normal = normal * scale[:, None, None]
    return normal + shift[:, None, None] if isinstance(shift, Tensor) else normal


def kept_head(
    model: nn.Module, features: Tensor, tail: Tail, dropout: float
) -> tuple[nn.Module, list[nn.Parameter]] | None:
    """The head that a classifier has, if pooling and one linear layer are all of it.

    Args:
        model: The classifier.
        features: (N, C, h, w), of no particular image.
        tail: What the classifier makes of features.
        dropout: The probability of a linear head's dropout.

    Returns:
        A head with copies of the trained weights, and the model's own parameters in the order of the head's; or None.
    """
    logits = tail(features)
    if _agree(PooledMaps()(features), logits):
        return PooledMaps(), []
    norms = [None, *_norms(model, features.shape[1])]
    for linear in _linear_layers(model):
        weight, bias = linear.weight.detach().flatten(1), linear.bias
        if weight.shape != (logits.shape[1], features.shape[1]):
            continue
        for norm in norms:
            head = LinearHead(weight.shape[1], weight.shape[0], _pooled(norm), dropout, bias is not None)
            sources = [*linear.parameters(), *(norm.parameters() if norm is not None else ())]
            head.to(features.device, features.dtype).eval()
            with torch.no_grad():
                for mine, theirs in zip(head.parameters(), sources, strict=True):
                    mine.copy_(theirs.view_as(mine))
                if _agree(head(features), logits):
                    return head, sources
    return None


def _agree(found: Tensor, logits: Tensor) -> bool:
    if found.shape != logits.shape:
        return False
    # Half precision keeps three digits; a wrong head is wrong in the first.
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((found - logits).abs().max() <= tolerance * logits.abs().max())


def _linear_layers(model: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    """Linear layers and 1 x 1 convolutions, the last defined first."""
    yield from linear_heads(model)
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            yield module


def _norms(model: nn.Module, channels: int) -> Iterator[nn.LayerNorm | nn.BatchNorm1d]:
    """The norms over so many channels, the last defined first."""
    for module in reversed(list(model.modules())):
        if (isinstance(module, nn.LayerNorm) and module.normalized_shape == (channels,)) or (
            isinstance(module, nn.BatchNorm1d) and module.num_features == channels and module.track_running_stats
        ):
            yield module


def _pooled(norm: nn.LayerNorm | nn.BatchNorm1d | None) -> nn.Module | None:
    """A norm of pooled features (N, C) like one that may stand before the flattening."""
    if norm is None or isinstance(norm, nn.BatchNorm1d):
        return copy.deepcopy(norm)
    (channels,) = norm.normalized_shape
    return nn.LayerNorm(channels, norm.eps, norm.elementwise_affine, norm.bias is not None)
