"""Maps of higher resolution without new weights, by dilation in place of stride."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.hooks import FunctionMode, HookPoint, run_until, tap
from lightning_interp.model.layout import to_grid
from lightning_interp.model.locate import ATTENTIONS, plain_name
from lightning_interp.model.preserve import preserve_state

__all__ = ["limit_output_stride"]

_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


class _Layer(NamedTuple):
    """A layer that may have a stride, and the height of its input."""

    name: str
    module: Any
    input_height: int


def limit_output_stride(model: nn.Module, images: Tensor, point: HookPoint, output_stride: int) -> None:
    """Change a model's strided layers so that the stride of its features is at most ``output_stride``.

    A layer that would exceed it keeps its kernel and loses its stride; later layers are dilated by the same factor.
    So every second position of a map of twice the resolution is a position of the original map. A max pooling that no
    convolution follows is removed.

    Args:
        model: Changed in place.
        images: (N, C, H, W) to run it with.
        point: The features.
        output_stride: The stride in pixels.

    Raises:
        ConfigurationError: If the model has attention, or its stride is not that of convolutions and poolings.
    """
    kind = type(model).__name__
    before, layers, has_attention = _strided_layers(model, images, point)
    if has_attention:
        raise ConfigurationError(
            f"output_stride={output_stride} is for convolutional models; {kind} has attention, whose weights are made "
            "for its number of positions. Leave output_stride out"
        )
    size = images.shape[2]
    if _power_of_two(size / before) <= output_stride:
        return
    convolutions = [index for index, layer in enumerate(layers) if isinstance(layer.module, nn.Conv2d)]
    for index, (name, module, height) in enumerate(layers):
        stride = _first(module.stride or module.kernel_size)
        input_stride = _power_of_two(size / height)
        rate = max(input_stride // output_stride, 1)
        exceeds = input_stride * stride > output_stride
        if exceeds and isinstance(module, nn.MaxPool2d) and index > max(convolutions, default=-1):
            model.set_submodule(name, nn.Identity())
        elif rate > 1 or (stride > 1 and exceeds):
            allowed_stride = max(output_stride // input_stride, 1)
            _dilate(model, name, module, rate, allowed_stride)
    try:
        after, *_ = _strided_layers(model, images, point)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{kind} cannot have output_stride={output_stride}: some of its stride is that of functions, which cannot "
            f"be changed ({error}). Leave output_stride out"
        ) from error
    if _power_of_two(size / after) > output_stride:
        raise ConfigurationError(
            f"{kind} cannot have output_stride={output_stride}: its stride is not only that of convolutions and "
            f"poolings, and stays at {_power_of_two(size / after)}. Leave output_stride out"
        )


def _strided_layers(model: nn.Module, images: Tensor, point: HookPoint) -> tuple[int, list[_Layer], bool]:
    """The features' height, the layers that may have a stride in the order of their first call, and any attention."""
    layers: dict[nn.Module, _Layer] = {}
    watcher = _Watcher()

    def record(name: str, module: nn.Module, output: Any) -> None:
        height = watcher.input_heights.get(type(module).__name__)
        if height is not None:
            layers.setdefault(module, _Layer(name, module, height))

    modules = {plain_name(name): module for name, module in model.named_modules() if type(module) in _STRIDED}
    with preserve_state(model), torch.no_grad(), tap(modules, record), watcher:
        features = to_grid(run_until(model, images.clone(), point), (images.shape[2], images.shape[3]))
    return features.shape[2], list(layers.values()), watcher.has_attention


class _Watcher(FunctionMode):
    """Record the input height of the latest convolution and pooling, and whether there is attention."""

    _KINDS = {"conv2d": "Conv2d", "max_pool2d": "MaxPool2d", "avg_pool2d": "AvgPool2d"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.input_heights: dict[str, int] = {}
        self.has_attention = False

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.has_attention |= name in ATTENTIONS
        kind = self._KINDS.get(name.removeprefix("_"))
        if kind is not None and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            self.input_heights[kind] = args[0].shape[2]
        return function(*args, **kwargs)


def _dilate(model: nn.Module, name: str, module: Any, rate: int, stride: int) -> None:
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise ConfigurationError(
                f"the layer {name!r} pads by {module.padding!r} ({module.padding_mode}), so its stride cannot become "
                "dilation; leave output_stride out"
            )
        module.padding = (module.padding[0] * rate, module.padding[1] * rate)
        module.dilation = (module.dilation[0] * rate, module.dilation[1] * rate)
        module.stride = (stride, stride)
    elif rate == 1 and not module.ceil_mode:
        module.stride = stride
    else:
        model.set_submodule(name, _DilatedPool(module, rate))


class _DilatedPool(nn.Module):
    """Dilated pooling with stride 1; torch's own limits the padding to half a kernel, or has no dilation."""

    def __init__(self, pool: nn.MaxPool2d | nn.AvgPool2d, rate: int) -> None:
        super().__init__()
        self.kernel, self.padding, self.rate = _pair(pool.kernel_size), _pair(pool.padding), rate
        # With ceil_mode, windows may exceed the padded input at its end.
        self.excess = rate * (_first(pool.stride) - 1) if pool.ceil_mode else 0
        self.is_max = isinstance(pool, nn.MaxPool2d)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h', w')."""
        (height, width), (vertical, horizontal) = self.kernel, (pad * self.rate for pad in self.padding)
        if self.is_max:
            padding = (horizontal, horizontal + self.excess, vertical, vertical + self.excess)
            padded = F.pad(features, padding, value=-torch.inf)
            return F.max_pool2d(padded, self.kernel, stride=1, dilation=self.rate)
        weight = features.new_full((features.shape[1], 1, height, width), 1 / (height * width))
        return F.conv2d(features, weight, padding=(vertical, horizontal), dilation=self.rate, groups=features.shape[1])


def _power_of_two(ratio: float) -> int:
    return int(2 ** round(math.log2(max(ratio, 1))))


def _first(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
