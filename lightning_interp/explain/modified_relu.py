"""Gradients with modified backward rules of ReLUs: guided backpropagation and the deconvnet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_interp.checks import is_integer
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain._explainer import explainer
from lightning_interp.explain.activation_maps import gradcam
from lightning_interp.explain.input_gradients import Channels, check_channels, reduce_channels
from lightning_interp.explain.maps import resize_maps
from lightning_interp.model.hooks import FunctionMode, HookPoint, tap
from lightning_interp.model.locate import find_layer, layer_name
from lightning_interp.model.outputs import first_tensor, run_model
from lightning_interp.model.trace import Trace

__all__ = ["deconvnet", "guided_backprop", "guided_gradcam"]

Rule = Literal["guided", "deconvnet"]


@contextmanager
def _modified(rule: Rule) -> Iterator[_ReLURule]:
    """Apply a backward rule to the ReLUs of forward passes that run inside, and of their backward passes."""
    # Checkpointed blocks run again in the backward pass: in this thread, in which the function mode is active.
    with torch.autograd.set_multithreading_enabled(False), _ReLURule(rule) as mode:
        yield mode


_GUIDED, _DECONVNET = partial(_modified, "guided"), partial(_modified, "deconvnet")


@explainer(family="gradients", inputs=True, context=_GUIDED)
def guided_backprop(trace: Trace, *, channels: Channels = "max_abs") -> Tensor:
    r"""Guided backpropagation: the gradient, of which every ReLU passes the positive part only.

    At each ReLU :math:`y = f(x)` of the model, the incoming gradient :math:`g` becomes

    .. math:: \max(g, 0) \, f'(x), \qquad \text{for ReLU: } g \cdot [g > 0] \cdot [x > 0]

    whether it is called as a module (also one shared between branches), as a function, or in place. ReLU6, LeakyReLU,
    PReLU and similar activations keep their slopes :math:`f'`. Sigmoids (hard ones, too) and softmax, which are used
    as gates, keep their gradient, and so does a callable given as ``targets``.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None for (N, C, H, W).

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If the model has other activations (GELU, SiLU, Hardswish, tanh), or no ReLU at all, so
            that the result would be the plain gradient.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> guided_backprop(model, torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8])

    Reference:
        Springenberg et al., Striving for Simplicity: The All Convolutional Net, ICLR Workshop 2015.
    """
    check_channels(channels)
    return reduce_channels(_class_gradients(trace), channels)


@explainer(family="gradients", inputs=True, context=_DECONVNET)
def deconvnet(
    trace: Trace, *, unit: tuple[str | torch.nn.Module, int] | None = None, channels: Channels = "max_abs"
) -> Tensor:
    r"""Deconvnet: a class score, or a unit's largest activation, projected back to the pixels.

    Each layer is inverted by its transpose: convolutions and linear layers by their transposed filters, max-pooling by
    unpooling to the positions of the maxima (the switches; values of overlapping pools are summed), and ReLUs by a ReLU
    of the signal. That is the gradient, except at the ReLUs :math:`y = f(x)`, where the incoming signal :math:`g`
    becomes

    .. math:: \max(g, 0)

    for every :math:`x`, and for ReLU6 and LeakyReLU alike. With ``unit``, all activations of the layer but the largest
    of that channel are set to zero, and its value is projected; a unit that is nowhere above zero gives an empty map.
    So does a class whose signal is negative everywhere on some layer, as happens in sparse networks.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        unit: (layer, channel) to project instead of a class score; the layer is a module or its dotted name, of which
            the last call is used.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None for (N, C, H, W), the projection in colour.

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If the model has other activations (GELU, SiLU, Hardswish, tanh), if it has no ReLU and no
            unit is given, or if both ``targets`` and ``unit`` are given.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 2))
        >>> deconvnet(model, torch.rand(2, 3, 8, 8), targets=1).shape
        torch.Size([2, 8, 8])
        >>> projected = deconvnet(model, torch.rand(2, 3, 8, 8), unit=("2", 3), channels=None)
        >>> (projected.shape, int((projected[0, 0] != 0).sum()) <= 9)  # 3 x 3 pixels, by the unit's switch
        (torch.Size([2, 3, 8, 8]), True)

    Reference:
        Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014.
    """
    check_channels(channels)
    if unit is None:
        return reduce_channels(_class_gradients(trace), channels)
    if trace.requested_targets is not None:
        raise ConfigurationError("deconvnet projects either a class score or a unit; pass targets or unit, not both")
    return reduce_channels(_projected(trace, unit), channels)


@explainer(family="gradients", layer="gradients", upsampled=False)
def guided_gradcam(trace: Trace, layer: HookPoint, *, channels: Channels = "max_abs") -> Tensor:
    r"""Guided Grad-CAM: the product of guided backpropagation and Grad-CAM.

    .. math:: M(y, x) = \max_c \left| G_c(y, x) \max(L(y, x), 0) \right|

    with :math:`G` of :func:`guided_backprop` and :math:`L` of :func:`gradcam`, resized bilinearly to the image.

    Args:
        trace: The open Trace; :class:`Explainer` lists the arguments of a call.
        layer: Any layer that gives (N, C, h, w); None locates the last spatial one.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None for (N, C, H, W).

    Returns:
        (N, H, W) float32, as large as the images.

    Raises:
        ConfigurationError: As :func:`guided_backprop` and :func:`gradcam` do.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> guided_gradcam(model, torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8])

    Reference:
        Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017.
    """
    check_channels(channels)
    coarse = resize_maps(gradcam.function(trace, layer).relu(), trace.images.shape[-2:])[:, None]
    with trace.rerun_in(_GUIDED, input_gradients=True) as guided:
        return reduce_channels(coarse.to(trace.images.device) * _class_gradients(guided), channels)


def _class_gradients(trace: Trace) -> Tensor:
    """Return (N, C, H, W) the gradients of the class scores by the backward rule of the Trace's mode."""
    if not trace.mode.calls:
        raise ConfigurationError(
            f"{type(trace.model).__name__} calls no ReLU or variant of it whose gradient could be modified; "
            "use saliency or smoothgrad"
        )
    targets = trace.requested_targets
    if callable(targets):
        trace = trace.with_targets(partial(trace.mode.call_unmodified, targets))
    return trace.input_gradients()


def _projected(trace: Trace, unit: tuple[str | torch.nn.Module, int]) -> Tensor:
    """Return (N, C, H, W) the projection of a unit's largest activation in each image."""
    if not isinstance(unit, (tuple, list)) or len(unit) != 2 or not is_integer(unit[1]):
        raise ConfigurationError(f"unit takes (layer, channel), got {unit!r}")
    module, channel = find_layer(trace.model, unit[0]), unit[1]
    name, outputs = layer_name(trace.model, module), list[Any]()

    def on_output(name: str, module: torch.nn.Module, output: Any) -> None:
        tensor = first_tensor(output)
        outputs.append(tensor if tensor is None else tensor.clone())  # later layers may overwrite it

    images = trace.images.detach().clone().requires_grad_()
    with tap({name: module}, on_output):
        run_model(trace.model, images.clone(), trace.predict)
        if not outputs or outputs[-1] is None:
            raise ConfigurationError(f"the layer {name!r} gives no tensor in the model's forward pass; choose another")
        activations = outputs[-1]
        if activations.ndim < 2 or not 0 <= channel < activations.shape[1]:
            raise ConfigurationError(
                f"the layer {name!r} gives activations {tuple(activations.shape)}; there is no channel {channel}"
            )
        largest = activations[:, channel].reshape(len(images), -1).max(1).values  # one of several equal ones
        # Backpropagating its value projects a map that is zero elsewhere.
        projection = torch.autograd.grad(largest, images, largest.detach().relu(), allow_unused=True)[0]
    return torch.zeros_like(images) if projection is None else projection


class _ReLURule(FunctionMode):
    """Apply a backward rule to all ReLUs, however they are called, and refuse other activations.

    Attributes:
        calls: Number of ReLUs that were called.
    """

    _RELUS = frozenset({"relu", "relu6", "leaky_relu", "prelu", "rrelu", "threshold"})
    # Functions that are a ReLU where their lower bound is zero, with the default of that bound.
    _CLAMPS: ClassVar = {"hardtanh": -1.0, "clamp": None, "clamp_min": None, "clip": None}
    _REFUSED = frozenset({"gelu", "silu", "hardswish", "mish", "elu", "selu", "celu", "softplus", "softsign", "glu"})
    _REFUSED |= {"tanh", "hardtanh", "log_sigmoid", "tanhshrink", "softshrink", "hardshrink"}

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.calls = 0
        self._is_paused = False

    def call_unmodified(self, function: Callable[[Any], Tensor], output: Any) -> Tensor:
        """Call a function that is not part of the model, with its unmodified gradient."""
        self._is_paused = True
        try:
            return function(output)
        finally:
            self._is_paused = False

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_paused:
            return function(*args, **kwargs)
        name = name.strip("_")
        is_relu = name in self._RELUS or (name in self._CLAMPS and self._clamps_at_zero(name, args, kwargs))
        if name in self._REFUSED and not is_relu:
            raise ConfigurationError(
                f"the model's activation {name!r} is not a ReLU or a variant of it, for which this method is not "
                "defined; use saliency, smoothgrad or integrated_gradients"
            )
        if not is_relu:
            return function(*args, **kwargs)
        self.calls += 1
        tensor = args[0] if args else kwargs.pop("input")

        def rectify(tensor: Tensor) -> Tensor:
            rectified: Tensor = function(tensor, *args[1:], **kwargs)
            return rectified

        if not (torch.is_grad_enabled() and tensor.requires_grad):
            return rectify(tensor)
        if self.rule == "deconvnet":
            output: Tensor = _DeconvnetReLU.apply(tensor, rectify)
            return output
        output = rectify(tensor)
        output.register_hook(torch.relu)  # type: ignore[no-untyped-call]
        return output

    def _clamps_at_zero(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the lower bound of a clamp is zero."""
        low = args[1] if len(args) > 1 else kwargs.get("min_val", kwargs.get("min", self._CLAMPS[name]))
        return isinstance(low, (int, float)) and low == 0


class _DeconvnetReLU(torch.autograd.Function):
    """A ReLU whose backward pass is a ReLU of the gradient, independent of the input."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rectify: Callable[[Tensor], Tensor]) -> Tensor:
        rectified = rectify(tensor)
        if rectified is tensor:
            ctx.mark_dirty(tensor)  # called in place
        return rectified

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].relu(), None
