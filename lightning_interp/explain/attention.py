"""Where a vision transformer's attention goes."""

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


class _AttentionTap(FunctionMode):
    """Keeps the attention probabilities of a pass, however attention is called; the pass gives what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "multi_head_attention_forward":
            return self._packed(function, args, kwargs)
        result = function(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            self.found.append(_probabilities(function, *args, **kwargs))
        elif name == "softmax" and _is_attention(result, *args, **kwargs):
            self.found.append(result.detach())
        return result

    def _packed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``nn.MultiheadAttention``, whose projections happen inside: asked for its weights."""
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        output, weights = func(**given | {"need_weights": True, "average_attn_weights": False})
        self.found.append(weights.detach())
        if not given.get("need_weights", True):
            return output, None
        return output, weights.mean(1) if given.get("average_attn_weights", True) else weights


@explainer(upsampled=True, context=_AttentionTap)
def attention_rollout(
    trace: Trace,
    *,
    head_fusion: Literal["mean", "max", "min"] = "mean",
    discard_ratio: float = 0.0,
    query: Literal["first", "mean"] | None = None,
) -> Tensor:
    r"""Attention rollout: how much of each place reaches the classifier's token through all layers of attention.

    .. math:: M = \operatorname{row}\left(\hat{A}_L \cdots \hat{A}_1\right), \qquad
        \hat{A}_l = \operatorname{norm}\left(\tfrac{1}{2} A_l + \tfrac{1}{2} I\right)

    with :math:`A_l` (T, T) the attention probabilities of layer l, fused over its heads, :math:`I` the residual
    connection, and each row normalised to sum to one. It knows the attention only, not what is done with it, so it is
    the same for every target. It listens to one forward pass, in which nothing of the model is replaced.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes. ``targets`` change nothing.
        head_fusion: How the heads become one: ``"mean"`` (the paper's), ``"max"`` or ``"min"``.
        discard_ratio: Share of each layer's smallest attentions that is set to zero, at least 0 and less than 1.
        query: Whose attention is shown: the ``"first"`` token's, or the ``"mean"`` of all places'; None: the first
            token's where tokens without a place (class, registers) come first, else the mean.

    Returns:
        (N, H, W) float32, not negative, resized to the images; (N, h, w) with ``upsample=False``, where the map and
        the tokens without a place sum to one.

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
    fused = [_FUSIONS[head_fusion](each.float()) for each in _attentions(trace)]
    tokens = fused[0].shape[-1]
    rollout = torch.eye(tokens, device=fused[0].device).expand_as(fused[0])
    for attention in fused:
        mixed = _without_smallest(attention, discard_ratio) + torch.eye(tokens, device=attention.device)
        rollout = (mixed / mixed.sum(-1, keepdim=True)) @ rollout
    height, width = trace.images.shape[-2:]
    prefix = layout_of(rollout, (height, width))
    if not isinstance(prefix, int):
        raise ConfigurationError(
            f"the {tokens} tokens of {type(trace.model).__name__} form no grid on images of {height} x {width}; "
            "gradcam takes a layer and reshape="
        )
    first = prefix > 0 if query is None else query == "first"
    reaching = rollout[:, 0] if first else rollout[:, prefix:].mean(1)
    return to_grid(reaching[:, :, None], (height, width))[:, 0]


def _without_smallest(attention: Tensor, share: float) -> Tensor:
    """(N, T, T) with the smallest entries of each image set to zero; the first token keeps its own."""
    flat = attention.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * share), largest=False).indices
    kept = flat.scatter(1, smallest, 0)
    kept[:, 0] = flat[:, 0]
    return kept.view_as(attention)


def _attentions(trace: Trace) -> list[Tensor]:
    """(N, heads, T, T) the probabilities of each layer, in order."""
    model, images, found = trace.model, trace.images, trace.mode.found
    if not found:
        raise ConfigurationError(
            f"{type(model).__name__} shows no attention between tokens; attention_rollout is for vision transformers; "
            "use gradcam, which works on every model"
        )
    tokens = found[0].shape[-1]
    if any(each.ndim != 4 or (len(each), *each.shape[2:]) != (len(images), tokens, tokens) for each in found):
        shapes = ", ".join(dict.fromkeys(str(tuple(each.shape)) for each in found))
        raise ConfigurationError(
            f"the attention of {type(model).__name__} is not between the same tokens in all layers (windows, as in "
            f"Swin, pooling, or cross-attention), so it cannot be rolled out: expected ({len(images)}, heads, tokens, "
            f"tokens), got {shapes}; use gradcam, which works on every model"
        )
    return list(found)


def _is_attention(result: Tensor, input: Tensor, dim: object = None, *args: object, **kwargs: object) -> bool:
    """Whether a softmax is one of each token over all others, (N, heads, T, T)."""
    return result.ndim == 4 and dim in (-1, 3) and result.shape[-1] == result.shape[-2] > 1


def _probabilities(attend: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What attention gives of the identity is its probabilities: masks and scales are taken as they are."""
    length = key.shape[-2]
    identity = torch.eye(length, dtype=value.dtype, device=value.device).expand(*key.shape[:-2], length, length)
    found: Tensor = attend(query, key, identity, *args, **kwargs)
    return found.detach()
