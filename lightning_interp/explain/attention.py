"""Attention rollout of vision transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_interp.checks import check_number
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain._explainer import explainer
from lightning_interp.model.hooks import FunctionMode
from lightning_interp.model.layout import layout_of, to_grid
from lightning_interp.model.trace import Trace

__all__ = ["attention_rollout"]

_FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda heads: heads.mean(1),
    "max": lambda heads: heads.amax(1),
    "min": lambda heads: heads.amin(1),
}


class _AttentionRecorder(FunctionMode):
    """Record the attention probabilities of a pass, whichever function computes them, and leave its results as is.

    Attributes:
        probabilities: (N, heads, T, T) of each attention layer, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: list[Tensor] = []

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "multi_head_attention_forward":
            return self._call_multi_head(function, args, kwargs)
        result = function(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            self.probabilities.append(_fused_probabilities(function, *args, **kwargs))
        elif name == "softmax" and _is_attention(result, *args, **kwargs):
            self.probabilities.append(result.detach())
        return result

    def _call_multi_head(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function of ``nn.MultiheadAttention``, which also projects, so that it returns its weights."""
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        output, weights = function(**arguments | {"need_weights": True, "average_attn_weights": False})
        self.probabilities.append(weights.detach())
        if not arguments.get("need_weights", True):
            return output, None
        return output, weights.mean(1) if arguments.get("average_attn_weights", True) else weights


@explainer(family="attention", upsampled=True, context=_AttentionRecorder)
def attention_rollout(
    trace: Trace,
    *,
    head_fusion: Literal["mean", "max", "min"] = "mean",
    discard_ratio: float = 0.0,
    query: Literal["first", "mean"] | None = None,
) -> Tensor:
    r"""Attention rollout: the attention from the classification token to each position, through all layers.

    .. math:: M = \operatorname{row}\left(\hat{A}_L \cdots \hat{A}_1\right), \qquad
        \hat{A}_l = \operatorname{norm}\left(\tfrac{1}{2} A_l + \tfrac{1}{2} I\right)

    with :math:`A_l` (T, T) the attention probabilities of layer l, fused over its heads, :math:`I` the residual
    connection, and each row normalised to sum to one. Values, projections and the classifier play no part in it, so it
    is the same for every target. It observes one forward pass, in which nothing of the model is replaced.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call. ``targets`` have no effect.
        head_fusion: How the heads are combined: ``"mean"`` (the paper's), ``"max"`` or ``"min"``.
        discard_ratio: Share of each layer's smallest attentions that is set to zero, at least 0 and less than 1.
        query: Whose attention is shown: the ``"first"`` token's, or the ``"mean"`` over all spatial positions; None:
            the first token's where tokens without a position (class, registers) come first, else the mean.

    Returns:
        (N, H, W) float32, not negative, resized to the images; (N, h, w) with ``upsample=False``, where the map and
        the tokens without a position sum to one.

    Raises:
        ConfigurationError: If the model has no attention between all its tokens (convolutional networks, Swin's
            windows), or an option is out of range.

    Example:
        >>> import torch
        >>> from torchvision.models import VisionTransformer
        >>> model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8)
        >>> maps = attention_rollout(model, torch.rand(2, 3, 32, 32), upsample=False)
        >>> maps.shape, bool((maps.sum((1, 2)) < 1).all())
        (torch.Size([2, 4, 4]), True)

    Reference:
        Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.
    """
    if head_fusion not in _FUSIONS:
        raise ConfigurationError(f"head_fusion takes 'mean', 'max' or 'min', got {head_fusion!r}")
    takes = "a share, at least 0 and less than 1"
    discard_ratio = check_number("discard_ratio", discard_ratio, takes, lambda share: 0 <= share < 1)
    if query not in ("first", "mean", None):
        raise ConfigurationError(f"query takes 'first', 'mean' or None, got {query!r}")
    fused = [_FUSIONS[head_fusion](heads.float()) for heads in _recorded_attention(trace)]
    tokens = fused[0].shape[-1]
    identity = torch.eye(tokens, device=fused[0].device)
    rollout = identity.expand_as(fused[0])
    for attention in fused:
        mixed = _discard_smallest(attention, discard_ratio) + identity
        rollout = (mixed / mixed.sum(-1, keepdim=True)) @ rollout
    height, width = trace.images.shape[-2:]
    prefix_tokens = layout_of(rollout, (height, width))
    if not isinstance(prefix_tokens, int):
        raise ConfigurationError(
            f"the {tokens} tokens of {type(trace.model).__name__} form no grid on images of {height} x {width}; "
            "gradcam takes a layer and reshape="
        )
    uses_first = prefix_tokens > 0 if query is None else query == "first"
    row = rollout[:, 0] if uses_first else rollout[:, prefix_tokens:].mean(1)
    return to_grid(row[:, :, None], (height, width))[:, 0]


def _discard_smallest(attention: Tensor, share: float) -> Tensor:
    """Set the smallest entries of each (T, T) matrix to zero, except the first token's attention to itself."""
    flat = attention.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * share), largest=False).indices
    remaining = flat.scatter(1, smallest, 0)
    remaining[:, 0] = flat[:, 0]
    return remaining.view_as(attention)


def _recorded_attention(trace: Trace) -> list[Tensor]:
    """Return (N, heads, T, T) the probabilities of all attention layers; raise where they do not fit together."""
    model, images, probabilities = trace.model, trace.images, trace.mode.probabilities
    if not probabilities:
        raise ConfigurationError(
            f"{type(model).__name__} shows no attention between tokens; attention_rollout is for vision transformers; "
            "use gradcam, which works on every model"
        )
    tokens = probabilities[0].shape[-1]
    expected = (len(images), tokens, tokens)
    if any(layer.ndim != 4 or (len(layer), *layer.shape[2:]) != expected for layer in probabilities):
        shapes = ", ".join(dict.fromkeys(str(tuple(layer.shape)) for layer in probabilities))
        raise ConfigurationError(
            f"the attention of {type(model).__name__} is not between the same tokens in all layers (windows, as in "
            f"Swin, pooling, or cross-attention), so it cannot be rolled out: expected ({len(images)}, heads, tokens, "
            f"tokens), got {shapes}; use gradcam, which works on every model"
        )
    return list(probabilities)


def _is_attention(result: Tensor, input: Tensor, dim: object = None, *args: object, **kwargs: object) -> bool:
    """Whether a softmax is over all tokens for each token, (N, heads, T, T)."""
    return result.ndim == 4 and dim in (-1, 3) and result.shape[-1] == result.shape[-2] > 1


def _fused_probabilities(attend: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the probabilities of fused attention, masks and scales included: its output for the identity as values."""
    length = key.shape[-2]
    identity = torch.eye(length, dtype=value.dtype, device=value.device).expand(*key.shape[:-2], length, length)
    probabilities: Tensor = attend(query, key, identity, *args, **kwargs)
    return probabilities.detach()
