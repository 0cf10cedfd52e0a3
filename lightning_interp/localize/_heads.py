"""Heads that compute logits and class maps from features: pooling, an optional norm, one linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from lightning_interp.model.locate import linear_heads

__all__ = ["LinearHead", "PooledMaps", "equivalent_head"]


class LinearHead(nn.Linear):
    """Global average pooling and one linear layer, optionally with a norm between them.

    Args:
        in_features: C.
        num_classes: K.
        norm: ``nn.LayerNorm`` or ``nn.BatchNorm1d`` of C, applied to the pooled features, or None.
        dropout: Probability of dropout before the linear layer.
        bias: Whether the linear layer has a bias.
    """

    def __init__(
        self, in_features: int, num_classes: int, norm: nn.Module | None = None, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__(in_features, num_classes, bias)
        self.norm = norm
        self.dropout = nn.Dropout(dropout) if dropout else None

    def reset_parameters(self) -> None:
        """Initialise with zeros.

        A component that all classes share does not change any probability, so training would never remove random
        weights from the maps.
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
        """(N, C, h, w) features to (N, K, h, w): the contributions of the spatial positions to the logits."""
        if self.norm is None:
            return F.conv2d(features, self.weight[:, :, None, None])
        return F.conv2d(_normalized(features, self.norm), self.weight[:, :, None, None])


class PooledMaps(nn.Module):
    """The head of a fully convolutional classifier, whose features are class maps."""

    bias: None = None

    def forward(self, features: Tensor) -> Tensor:
        """(N, K, h, w) maps to (N, K) logits."""
        return features.mean((2, 3))

    def maps(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


def _normalized(features: Tensor, norm: nn.Module) -> Tensor:
    """Apply the norm of the pooled features at each spatial position: affine, given the pooled statistics."""
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


def equivalent_head(
    model: nn.Module, features: Tensor, tail: Callable[[Tensor], Tensor], dropout: float
) -> tuple[nn.Module, list[nn.Parameter]] | None:
    """Return a head that computes the same logits as the last layers of a classifier.

    Args:
        model: The classifier.
        features: (N, C, h, w), any values.
        tail: The last layers, from features to logits (N, K).
        dropout: Probability of dropout in a linear head.

    Returns:
        A head with copies of the trained weights, and the model's parameters in the order of the head's; None where
        the last layers are more than average pooling, at most one norm, and one linear layer.
    """
    logits = tail(features)
    if _is_close(PooledMaps()(features), logits):
        return PooledMaps(), []
    norms = [None, *_norms(model, features.shape[1])]
    for linear in _linear_layers(model):
        weight, bias = linear.weight.detach().flatten(1), linear.bias
        if weight.shape != (logits.shape[1], features.shape[1]):
            continue
        for norm in norms:
            head = LinearHead(weight.shape[1], weight.shape[0], _pooled_norm(norm), dropout, bias is not None)
            sources = [*linear.parameters(), *(norm.parameters() if norm is not None else ())]
            head.to(features.device, features.dtype).eval()
            with torch.no_grad():
                for parameter, source in zip(head.parameters(), sources, strict=True):
                    parameter.copy_(source.view_as(parameter))
                if _is_close(head(features), logits):
                    return head, sources
    return None


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    if logits.shape != expected.shape:
        return False
    # Half precision has three digits; another head differs in the first.
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def _linear_layers(model: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    """Linear layers and 1 x 1 convolutions, from the last defined to the first."""
    yield from linear_heads(model)
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            yield module


def _norms(model: nn.Module, channels: int) -> Iterator[nn.LayerNorm | nn.BatchNorm1d]:
    """Norms over this number of channels, from the last defined to the first."""
    for module in reversed(list(model.modules())):
        if (isinstance(module, nn.LayerNorm) and module.normalized_shape == (channels,)) or (
            isinstance(module, nn.BatchNorm1d) and module.num_features == channels and module.track_running_stats
        ):
            yield module


def _pooled_norm(norm: nn.LayerNorm | nn.BatchNorm1d | None) -> nn.Module | None:
    """A copy of a norm for pooled features (N, C), where the model may apply it before the flattening."""
    if norm is None or isinstance(norm, nn.BatchNorm1d):
        return copy.deepcopy(norm)
    (channels,) = norm.normalized_shape
    return nn.LayerNorm(channels, norm.eps, norm.elementwise_affine, norm.bias is not None)
