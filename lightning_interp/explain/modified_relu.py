"""Gradients whose way back through the rectifiers is changed: guided backpropagation and the deconvnet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_interp.checks import is_integer
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain._explainer import explainer
from lightning_interp.explain.activation_maps import gradcam
from lightning_interp.explain.input_gradients import Channels, check_channels, reduce_channels
from lightning_interp.model.hooks import FunctionMode, HookPoint, tap
from lightning_interp.model.locate import find_layer, layer_name
from lightning_interp.model.outputs import first_tensor, run_model
from lightning_interp.model.trace import Trace

__all__ = ["deconvnet", "guided_backprop", "guided_gradcam"]

Rule = Literal["guided", "deconvnet"]


@contextmanager
def _changed(rule: Rule) -> Iterator[_Rectifiers]:
    """Change the way back through the rectifiers of forward passes that run inside, until their backward passes."""
    # Checkpointed blocks run again in the backward pass: in this thread, where the change is known.
    with torch.autograd.set_multithreading_enabled(False), _Rectifiers(rule) as rectifiers:
        yield rectifiers


_GUIDED, _DECONVNET = partial(_changed, "guided"), partial(_changed, "deconvnet")


@explainer(inputs=True, context=_GUIDED)
def guided_backprop(trace: Trace, *, channels: Channels = "max_abs") -> Tensor:
    r"""Guided backpropagation: the gradient, of which each rectifier lets only the positive part back.

    At each rectifier :math:`y = f(x)` of the model, the gradient :math:`g` that comes back becomes

    .. math:: \max(g, 0) \, f'(x), \qquad \text{for ReLU: } g \cdot [g > 0] \cdot [x > 0]

    however the rectifier is called: as a module, one that branches share, a function, in place. ReLU6, LeakyReLU, PReLU
    and the like keep their own slopes :math:`f'`. Sigmoids (hard ones, too) and softmax, which gate, keep their
    gradient, and so does a callable that is given as ``targets``.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None, which keeps (N, C, H, W).

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If the model has activations that are no rectifiers (GELU, SiLU, Hardswish, tanh), or has
            no rectifiers: what remained would be the plain gradient.

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


@explainer(inputs=True, context=_DECONVNET)
def deconvnet(
    trace: Trace, *, unit: tuple[str | torch.nn.Module, int] | None = None, channels: Channels = "max_abs"
) -> Tensor:
    r"""Deconvnet: a class score, or a unit's strongest activation, projected down to the pixels.

    Each layer is undone by its transpose: convolutions and linear layers by their transposed filters, max-pooling by
    putting values back where the maxima stood (the switches; where pools overlap, what returns to one place is summed),
    and rectifiers by a rectifier on the way back. That is the gradient, but for the rectifiers :math:`y = f(x)`: the
    signal :math:`g` that comes back becomes

    .. math:: \max(g, 0)

    whatever :math:`x` was, and for ReLU6 and LeakyReLU alike. With ``unit``, of the layer's activations all but
    the largest of that channel are set to zero, and its value is sent down; a unit that is nowhere above zero leaves an
    empty map. So does a class whose signal is negative everywhere on some layer, as happens in sparse networks.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        unit: (layer, channel) to project instead of a class score; the layer is a module or its dotted
            name, and its last call is meant.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None, which keeps (N, C, H, W): the projection as a picture.

    Returns:
        (N, H, W) float32.

    Raises:
        ConfigurationError: If the model has activations that are no rectifiers (GELU, SiLU, Hardswish, tanh), if a
            score's way down has no rectifiers, or if both ``targets`` and ``unit`` are given.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 2))
        >>> deconvnet(model, torch.rand(2, 3, 8, 8), targets=1).shape
        torch.Size([2, 8, 8])
        >>> projected = deconvnet(model, torch.rand(2, 3, 8, 8), unit=("2", 3), channels=None)
        >>> (projected.shape, int((projected[0, 0] != 0).sum()) <= 9)  # the unit sees 3 x 3 pixels, by its switch
        (torch.Size([2, 3, 8, 8]), True)

    Reference:
        Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014.
    """
    check_channels(channels)
    if unit is None:
        return reduce_channels(_class_gradients(trace), channels)
    if trace.requested_targets is not None:
        raise ConfigurationError("deconvnet projects a class score or a unit down; give targets or unit, not both")
    return reduce_channels(_projected(trace, unit), channels)


@explainer(layer="gradients", upsampled=False)
def guided_gradcam(trace: Trace, layer: HookPoint, *, channels: Channels = "max_abs") -> Tensor:
    r"""Guided Grad-CAM: guided backpropagation where Grad-CAM points.

    .. math:: M(y, x) = \max_c \left| G_c(y, x) \max(L(y, x), 0) \right|

    with :math:`G` of :func:`guided_backprop` and :math:`L` of :func:`gradcam`, resized bilinearly to the image.

    Args:
        trace: Made by the call; see :class:`Explainer` for what a call takes.
        layer: Any layer that gives (N, C, h, w); None finds the last spatial one.
        channels: ``"max_abs"``, ``"sum"`` (signed), or None, which keeps (N, C, H, W).

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
    where = gradcam.function(trace, layer).relu()[:, None]
    where = interpolate(where, trace.images.shape[-2:], mode="bilinear", align_corners=False)
    with trace.rerun_in(_GUIDED, input_gradients=True) as look:
        return reduce_channels(where.to(trace.images.device) * _class_gradients(look), channels)


def _class_gradients(trace: Trace) -> Tensor:
    """(N, C, H, W) what comes back to the images from the class scores, by the rule that the look is under."""
    if not trace.mode.met:
        raise ConfigurationError(
            f"{type(trace.model).__name__} calls no rectifier (ReLU and its kin) whose gradient could be changed; "
            "use saliency or smoothgrad"
        )
    asked = trace.requested_targets
    if callable(asked):
        trace = trace.with_targets(partial(trace.mode.unchanged, asked))
    return trace.input_gradients()


def _projected(trace: Trace, unit: tuple[str | torch.nn.Module, int]) -> Tensor:
    """(N, C, H, W) what a unit's largest activation in each image comes down to."""
    if not isinstance(unit, (tuple, list)) or len(unit) != 2 or not is_integer(unit[1]):
        raise ConfigurationError(f"unit takes (layer, channel), got {unit!r}")
    module, channel = find_layer(trace.model, unit[0]), unit[1]
    name, passed = layer_name(trace.model, module), list[Any]()

    def heard(name: str, module: torch.nn.Module, output: Any) -> None:
        tensor = first_tensor(output)
        passed.append(tensor if tensor is None else tensor.clone())  # what follows may overwrite it

    images = trace.images.detach().clone().requires_grad_()
    with tap({name: module}, heard):
        run_model(trace.model, images.clone(), trace.predict)
        if not passed or passed[-1] is None:
            raise ConfigurationError(f"the layer {name!r} gives no tensor in the model's forward pass; choose another")
        activations = passed[-1]
        if activations.ndim < 2 or not 0 <= channel < activations.shape[1]:
            raise ConfigurationError(
                f"the layer {name!r} gives activations {tuple(activations.shape)}; there is no channel {channel}"
            )
        strongest = activations[:, channel].reshape(len(images), -1).max(1).values  # one, where several are equal
        # Its gradient, times its value, is what a map of zeros but for this value sends down.
        found = torch.autograd.grad(strongest, images, strongest.detach().relu(), allow_unused=True)[0]
    return torch.zeros_like(images) if found is None else found


class _Rectifiers(FunctionMode):
    """Changes the gradient of rectifiers, whoever calls them, and refuses other activations."""

    _ALWAYS = frozenset({"relu", "relu6", "leaky_relu", "prelu", "rrelu", "threshold"})
    _BOUNDED: ClassVar = {
        "hardtanh": -1.0,
        "clamp": None,
        "clamp_min": None,
        "clip": None,
    }  # by name: the bound's default
    _OTHERS = frozenset({"gelu", "silu", "hardswish", "mish", "elu", "selu", "celu", "softplus", "softsign", "glu"})
    _OTHERS |= {"tanh", "hardtanh", "log_sigmoid", "tanhshrink", "softshrink", "hardshrink"}

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.met = 0
        self.paused = False

    def unchanged(self, function: Callable[[Any], Tensor], output: Any) -> Tensor:
        """What a function that is no part of the model gives, with the gradient that it has."""
        self.paused = True
        try:
            return function(output)
        finally:
            self.paused = False

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.paused:
            return function(*args, **kwargs)
        name = name.strip("_")
        is_rectifier = name in self._ALWAYS or (name in self._BOUNDED and self._starts_at_zero(name, args, kwargs))
        if name in self._OTHERS and not is_rectifier:
            raise ConfigurationError(
                f"the model's activation {name!r} is no rectifier, so this method says nothing of it; use saliency, "
                "smoothgrad or integrated_gradients"
            )
        if not is_rectifier:
            return function(*args, **kwargs)
        self.met += 1
        entering = args[0] if args else kwargs.pop("input")

        def rectify(tensor: Tensor) -> Tensor:
            leaving: Tensor = function(tensor, *args[1:], **kwargs)
            return leaving

        if not (torch.is_grad_enabled() and entering.requires_grad):
            return rectify(entering)
        if self.rule == "deconvnet":
            changed: Tensor = _Deconvolved.apply(entering, rectify)
            return changed
        leaving = rectify(entering)
        leaving.register_hook(torch.relu)  # type: ignore[no-untyped-call]
        return leaving

    def _starts_at_zero(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function that cuts values off does so below zero."""
        low = args[1] if len(args) > 1 else kwargs.get("min_val", kwargs.get("min", self._BOUNDED[name]))
        return isinstance(low, (int, float)) and low == 0


class _Deconvolved(torch.autograd.Function):
    """A rectifier that rectifies what comes back, wherever it was open."""

    @staticmethod
    def forward(ctx: Any, entering: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        leaving = call(entering)
        if leaving is entering:
            ctx.mark_dirty(entering)  # called in place
        return leaving

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].relu(), None
