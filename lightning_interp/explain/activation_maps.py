"""Class activation maps: a layer's activations, weighted by the classifier or by gradients, summed over channels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain._explainer import explainer
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.locate import linear_heads
from lightning_interp.model.trace import Trace

__all__ = ["cam", "gradcam", "gradcam_plus_plus", "hirescam", "layercam", "xgradcam"]


@explainer(family="class_activation", layer="activations", signed=True)
def cam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""Class activation map: the exact contribution of each spatial position to a class's logit.

    For a model that ends in global average pooling and one linear layer, or in pooled class maps (a fully
    convolutional head). With activations :math:`A` of the pooled layer and the classifier's weights :math:`w`,

    .. math:: M_t(y, x) = \sum_c w_{tc} A_c(y, x), \qquad \text{logit}_t = b_t + \frac{1}{hw} \sum_{y, x} M_t(y, x)

    The identity is checked against the model's logits, where these are finite and within their precision, so that a
    wrong head raises an error instead of giving a wrong map.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        layer: The layer that is pooled; None locates it.

    Returns:
        (N, H, W) float32, signed, resized to the images; (N, h, w) with ``upsample=False``.

    Raises:
        ConfigurationError: If the model has no such head (Grad-CAM needs none), or ``targets`` is a callable.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> images = torch.rand(4, 3, 10, 10)
        >>> maps = cam(model, images, targets=1, upsample=False)
        >>> maps.shape
        torch.Size([4, 8, 8])
        >>> torch.allclose(maps.mean((1, 2)) + model[3].bias[1], model(images)[:, 1], atol=1e-5)
        True

    Reference:
        Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """
    targets = trace.targets
    if callable(targets) or trace.logits.ndim != 2:
        raise ConfigurationError(
            "cam explains the classes of a GAP + linear head, not a callable's scores; use gradcam"
        )
    activations, logits = trace.activations(layer).float(), trace.logits.detach().float()
    sign = (2 * targets - 1) if logits.shape[1] == 1 else torch.ones_like(targets)
    column = torch.zeros_like(targets) if logits.shape[1] == 1 else targets
    # Half precision, and float32 products where lower precision is allowed, keep three digits; a wrong head differs in
    # the first.
    is_exact = {trace.logits.dtype, trace.activations(layer).dtype} <= {torch.float32, torch.float64}
    is_exact = is_exact and torch.get_float32_matmul_precision() == "highest"
    term_tolerance, sum_tolerance = (1e-4, 1e-6) if is_exact else (3e-2, 1e-2)
    pooled, pooled_magnitudes = activations.mean((2, 3)), activations.abs().mean((2, 3))

    def are_logits(sums: Tensor, magnitudes: Tensor) -> bool:
        """Whether sums equal the finite logits, given the sums of their terms' absolute values."""
        is_close = (sums - logits).abs() <= term_tolerance * magnitudes + sum_tolerance * logits.abs()
        return bool(is_close[logits.isfinite().all(1)].all())

    for head in linear_heads(trace.model):
        if (head.out_features, head.in_features) != (logits.shape[1], activations.shape[1]):
            continue
        weight = head.weight.detach().float()
        sums = pooled @ weight.T + (0 if head.bias is None else head.bias.detach().float())
        if are_logits(sums, pooled_magnitudes @ weight.abs().T):
            return torch.einsum("nc,nchw->nhw", weight[column] * sign[:, None], activations)
    if activations.shape[1] == logits.shape[1] and are_logits(pooled, pooled_magnitudes):
        class_maps = activations.gather(1, column.view(-1, 1, 1, 1).expand(-1, 1, *activations.shape[2:]))[:, 0]
        return class_maps * sign.view(-1, 1, 1)
    raise ConfigurationError(
        f"{type(trace.model).__name__} has no head of global average pooling and one linear layer on {layer.name!r}, "
        "so it has no exact class activation map; use gradcam, which works on every model"
    )


@explainer(family="class_activation", layer="gradients", signed=True)
def gradcam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""Grad-CAM: activations weighted by the mean gradient of the class score.

    .. math:: M(y, x) = \sum_c \alpha_c A_c(y, x), \qquad
        \alpha_c = \frac{1}{hw} \sum_{y, x} \frac{\partial s}{\partial A_c(y, x)}

    The sign is kept; the paper's ReLU is left to the caller, ``maps.relu()``.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        layer: Any layer that gives (N, C, h, w); None locates the last spatial one.

    Returns:
        (N, H, W) float32, signed, resized to the images; (N, h, w) with ``upsample=False``.

    Raises:
        ConfigurationError: If the model has no spatial layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> gradcam(model, torch.rand(4, 3, 8, 8), layer="1").shape
        torch.Size([4, 8, 8])

    Reference:
        Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017.
    """
    activations, gradients = trace.activations(layer).float(), trace.gradients(layer).float()
    return torch.einsum("nc,nchw->nhw", gradients.mean((2, 3)), activations)


@explainer(family="class_activation", layer="gradients")
def gradcam_plus_plus(trace: Trace, layer: HookPoint) -> Tensor:
    r"""Grad-CAM++: activations weighted by positive gradients, scaled so that several objects count alike.

    .. math:: M(y, x) = \sum_c w_c A_c(y, x), \qquad w_c = \sum_{y, x} \alpha_c(y, x) \max(g_c(y, x), 0), \qquad
        \alpha_c = \frac{g_c^2}{2 g_c^2 + g_c^3 \sum_{a, b} A_c(a, b)} = \frac{1}{2 + g_c \sum_{a, b} A_c(a, b)}

    with :math:`g_c = \partial s / \partial A_c`: the paper's closed form for the score :math:`\exp(s)`, without its
    factor :math:`\exp(s)`, which is the same for all channels and positions. The ReLU of the gradients is part of the
    definition; that of the map is left to the caller. Where the denominator vanishes, which takes negative
    activations, the weight is zero.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        layer: Any layer that gives (N, C, h, w) or tokens; None locates the last spatial one. The definition
            assumes non-negative activations, as after a ReLU.

    Returns:
        (N, H, W) float32, resized to the images; (N, h, w) with ``upsample=False``.

    Raises:
        ConfigurationError: If the model has no spatial layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> bool((gradcam_plus_plus(model, torch.rand(4, 3, 8, 8), layer="1") >= 0).all())
        True

    Reference:
        Chattopadhay et al., Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep Convolutional
        Networks, WACV 2018.
    """
    activations, gradients = trace.activations(layer).float(), trace.gradients(layer).float()
    # The second form, as the squared gradient of the first often underflows in float32.
    denominators = 2 + gradients * activations.sum((2, 3), keepdim=True)
    positive = torch.where(denominators.abs() > 1e-6, gradients.relu() / denominators, 0)
    return torch.einsum("nc,nchw->nhw", positive.sum((2, 3)), activations)


@explainer(family="class_activation", layer="gradients", signed=True)
def hirescam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""HiResCAM: element-wise product of activations and gradients, summed over channels.

    .. math:: M(y, x) = \sum_c \frac{\partial s}{\partial A_c(y, x)} A_c(y, x)

    For a model that is linear after the layer, the sum over the positions plus the bias is the score.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        layer: Any layer that gives (N, C, h, w) or tokens; None locates the last spatial one.

    Returns:
        (N, H, W) float32, signed, resized to the images; (N, h, w) with ``upsample=False``.

    Raises:
        ConfigurationError: If the model has no spatial layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> images = torch.rand(4, 3, 8, 8)
        >>> maps = hirescam(model, images, targets=1, layer="1", upsample=False)
        >>> torch.allclose(maps.sum((1, 2)) + model[3].bias[1], model(images)[:, 1], atol=1e-5)
        True

    Reference:
        Draelos and Carin, Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural
        networks, 2020.
    """
    activations, gradients = trace.activations(layer).float(), trace.gradients(layer).float()
    return (activations * gradients).sum(1)


@explainer(family="class_activation", layer="gradients", signed=True)
def xgradcam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""XGrad-CAM: activations weighted by their channel's gradient, averaged with the activations as weights.

    .. math:: M(y, x) = \sum_c w_c A_c(y, x), \qquad
        w_c = \sum_{y, x} \frac{A_c(y, x)}{\sum_{a, b} A_c(a, b)} \frac{\partial s}{\partial A_c(y, x)}

    A channel whose activations sum to zero has weight zero.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        layer: Any layer that gives (N, C, h, w) or tokens; None locates the last spatial one. The definition
            assumes non-negative activations, as after a ReLU.

    Returns:
        (N, H, W) float32, signed, resized to the images; (N, h, w) with ``upsample=False``.

    Raises:
        ConfigurationError: If the model has no spatial layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> xgradcam(model, torch.rand(4, 3, 8, 8), layer="1").shape
        torch.Size([4, 8, 8])

    Reference:
        Fu et al., Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs, BMVC 2020.
    """
    activations, gradients = trace.activations(layer).float(), trace.gradients(layer).float()
    totals = activations.sum((2, 3))
    weights = torch.where(totals == 0, 0, (activations * gradients).sum((2, 3)) / totals)
    return torch.einsum("nc,nchw->nhw", weights, activations)


@explainer(family="class_activation", layer="gradients")
def layercam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""LayerCAM: element-wise product of activations and positive gradients; usable on early layers, too.

    .. math:: M(y, x) = \sum_c \max\!\left(\frac{\partial s}{\partial A_c(y, x)}, 0\right) A_c(y, x)

    The ReLU of the gradients is part of the definition; that of the map is left to the caller.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        layer: Any layer that gives (N, C, h, w) or tokens; None locates the last spatial one.

    Returns:
        (N, H, W) float32, resized to the images; (N, h, w) with ``upsample=False``.

    Raises:
        ConfigurationError: If the model has no spatial layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> bool((layercam(model, torch.rand(4, 3, 8, 8), layer="1") >= 0).all())
        True

    Reference:
        Jiang et al., LayerCAM: Exploring Hierarchical Class Activation Maps for Localization, TIP 2021.
    """
    activations, gradients = trace.activations(layer).float(), trace.gradients(layer).float()
    return (activations * gradients.relu()).sum(1)
