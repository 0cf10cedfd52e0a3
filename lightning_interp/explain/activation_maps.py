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


@explainer(layer="activations")
def cam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""Class activation map: the exact share of each place in a class's logit.

    For a model that ends in global average pooling and one linear layer, or in pooled class maps (a fully
    convolutional head). With activations :math:`A` of the layer that is pooled and the classifier's weights :math:`w`,

    .. math:: M_t(y, x) = \sum_c w_{tc} A_c(y, x), \qquad \text{logit}_t = b_t + \frac{1}{hw} \sum_{y, x} M_t(y, x)

    The identity is checked on the model's own logits, where these are finite and as far as their precision goes, so a
    map that is returned is right.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        layer: The layer that is pooled; None finds it.

    Returns:
        (N, H, W) float32, signed, resized to the images; (N, h, w) with ``upsample=False``.

    Raises:
        ConfigurationError: If the model has no such head; Grad-CAM works on every model.

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
    # Half precision, which stands in for float32 where that is allowed, keeps three digits; a wrong head is wrong in
    # the first.
    exact = {trace.logits.dtype, trace.activations(layer).dtype} <= {torch.float32, torch.float64}
    exact = exact and torch.get_float32_matmul_precision() == "highest"
    of_terms, of_sum = (1e-4, 1e-6) if exact else (3e-2, 1e-2)
    pooled, strengths = activations.mean((2, 3)), activations.abs().mean((2, 3))

    def are_logits(sums: Tensor, terms: Tensor) -> bool:
        """Whether sums, whose terms add up to so much without their signs, are the logits where these are finite."""
        near = (sums - logits).abs() <= of_terms * terms + of_sum * logits.abs()
        return bool(near[logits.isfinite().all(1)].all())

    for head in linear_heads(trace.model):
        if (head.out_features, head.in_features) != (logits.shape[1], activations.shape[1]):
            continue
        weight = head.weight.detach().float()
        sums = pooled @ weight.T + (0 if head.bias is None else head.bias.detach().float())
        if are_logits(sums, strengths @ weight.abs().T):
            return torch.einsum("nc,nchw->nhw", weight[column] * sign[:, None], activations)
    if activations.shape[1] == logits.shape[1] and are_logits(pooled, strengths):
        chosen = activations.gather(1, column.view(-1, 1, 1, 1).expand(-1, 1, *activations.shape[2:]))[:, 0]
        return chosen * sign.view(-1, 1, 1)
    raise ConfigurationError(
        f"{type(trace.model).__name__} has no head of global average pooling and one linear layer on {layer.name!r}, "
        "so it has no exact class activation map; use gradcam, which works on every model"
    )


@explainer(layer="gradients")
def gradcam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""Grad-CAM: activations weighted by the mean gradient of the class score.

    .. math:: M(y, x) = \sum_c \alpha_c A_c(y, x), \qquad
        \alpha_c = \frac{1}{hw} \sum_{y, x} \frac{\partial s}{\partial A_c(y, x)}

    The sign is kept; the paper's rectifier is applied where maps become pictures, ``maps.relu()``.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        layer: Any layer that gives (N, C, h, w); None finds the last spatial one.

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


@explainer(layer="gradients")
def gradcam_plus_plus(trace: Trace, layer: HookPoint) -> Tensor:
    r"""Grad-CAM++: positive gradients, each place weighted so that several objects count alike.

    .. math:: M(y, x) = \sum_c w_c A_c(y, x), \qquad w_c = \sum_{y, x} \alpha_c(y, x) \max(g_c(y, x), 0), \qquad
        \alpha_c = \frac{g_c^2}{2 g_c^2 + g_c^3 \sum_{a, b} A_c(a, b)} = \frac{1}{2 + g_c \sum_{a, b} A_c(a, b)}

    with :math:`g_c = \partial s / \partial A_c`: the paper's closed form for the score :math:`\exp(s)`, without its
    factor :math:`\exp(s)`, which is the same for all channels and places. The rectifier of the gradients belongs to the
    definition; that of the map is applied where maps become pictures. Where the denominator vanishes, which takes
    negative activations, the weight is zero.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        layer: Any layer that gives (N, C, h, w) or tokens; None finds the last spatial one. The definition means
            activations that are not negative: after a ReLU.

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
    # Divided by the squared gradient, which is often too small for float32.
    denominators = 2 + gradients * activations.sum((2, 3), keepdim=True)
    positive = torch.where(denominators.abs() > 1e-6, gradients.relu() / denominators, 0)
    return torch.einsum("nc,nchw->nhw", positive.sum((2, 3)), activations)


@explainer(layer="gradients")
def hirescam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""HiResCAM: activations times gradients, place by place; what it shows was used by the model.

    .. math:: M(y, x) = \sum_c \frac{\partial s}{\partial A_c(y, x)} A_c(y, x)

    For a model that is linear behind the layer, the sum over the places plus the bias is the score.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        layer: Any layer that gives (N, C, h, w) or tokens; None finds the last spatial one.

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


@explainer(layer="gradients")
def xgradcam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""XGrad-CAM: activations weighted by their channel's mean gradient, which counts where the channel is active.

    .. math:: M(y, x) = \sum_c w_c A_c(y, x), \qquad
        w_c = \sum_{y, x} \frac{A_c(y, x)}{\sum_{a, b} A_c(a, b)} \frac{\partial s}{\partial A_c(y, x)}

    A channel whose activations sum to zero has no weight.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        layer: Any layer that gives (N, C, h, w) or tokens; None finds the last spatial one. The definition means
            activations that are not negative: after a ReLU.

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
    total = activations.sum((2, 3))
    weights = torch.where(total == 0, 0, (activations * gradients).sum((2, 3)) / total)
    return torch.einsum("nc,nchw->nhw", weights, activations)


@explainer(layer="gradients")
def layercam(trace: Trace, layer: HookPoint) -> Tensor:
    r"""LayerCAM: activations times positive gradients, place by place; sharp in early layers, too.

    .. math:: M(y, x) = \sum_c \max\!\left(\frac{\partial s}{\partial A_c(y, x)}, 0\right) A_c(y, x)

    The rectifier of the gradients belongs to the definition; that of the map is applied where maps become pictures.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        layer: Any layer that gives (N, C, h, w) or tokens; None finds the last spatial one.

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
