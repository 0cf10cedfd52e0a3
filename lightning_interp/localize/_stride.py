"""Finer maps without new weights: dilation in place of stride."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.hooks import FunctionMode, HookPoint, run_until, tap
from lightning_interp.model.layout import to_grid
from lightning_interp.model.locate import ATTENTIONS, plain_name
from lightning_interp.model.preserve import preserve_state

__all__ = ["refine"]

_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def refine(model: nn.Module, images: Tensor, site: HookPoint, output_stride: int) -> None:
    """Change a model's strided layers so that a place has finer maps.

    A layer that would make the stride larger than ``output_stride`` keeps its kernel and makes no stride; those after
    it are dilated by what it no longer skips. So every second position of a map that is twice as fine is the coarse
    map's. A max pooling without a convolution between it and the place is left out.

    Args:
        model: Changed in place.
        images: (N, C, H, W) to run it with.
        site: The place.
        output_stride: How many pixels a step on the finer map is.

    Raises:
        ConfigurationError: If the model has attention, or makes its stride by other means.
    """
    kind = type(model).__name__
    before, passed, attends = _strides(model, images, site)
    if attends:
        raise ConfigurationError(
            f"output_stride={output_stride} is for convolutional models; {kind} has attention, whose weights are made "
            "for its number of places. Leave output_stride out"
        )
    size = images.shape[2]
    reached = _power_of_two(size / before)
    if reached <= output_stride:
        return
    last_convolution = max((i for i, (_, module, _) in enumerate(passed) if isinstance(module, nn.Conv2d)), default=-1)
    for index, (name, module, height) in enumerate(passed):
        stride = _first(module.stride or module.kernel_size)
        entering = _power_of_two(size / height)
        rate = max(entering // output_stride, 1)
        leaving = entering * stride
        if leaving > output_stride and isinstance(module, nn.MaxPool2d) and index > last_convolution:
            _replace(model, name, nn.Identity())
        elif rate > 1 or (stride > 1 and leaving > output_stride):
            keeps = max(output_stride // entering, 1)  # what of its stride may stay
            _dilate(model, name, module, rate, keeps)
    try:
        after, *_ = _strides(model, images, site)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{kind} cannot have output_stride={output_stride}: it makes some of its stride by functions, which cannot "
            f"be changed ({error}). Leave output_stride out"
        ) from error
    if _power_of_two(size / after) > output_stride:
        raise ConfigurationError(
            f"{kind} cannot have output_stride={output_stride}: it makes stride by other means than convolutions and "
            f"poolings, and stays at {_power_of_two(size / after)}. Leave output_stride out"
        )


def _strides(model: nn.Module, images: Tensor, site: HookPoint) -> tuple[int, list[tuple[str, Any, int]], bool]:
    """The map's height; the layers that can make stride, each with the height that enters it; if there is attention."""
    passed: dict[nn.Module, tuple[str, Any, int]] = {}  # by its first use
    watcher = _Watcher()

    def heard(name: str, module: nn.Module, output: Any) -> None:
        if watcher.entered.get(type(module).__name__) is not None:
            passed.setdefault(module, (name, module, watcher.entered[type(module).__name__]))

    modules = {plain_name(name): each for name, each in model.named_modules() if type(each) in _STRIDED}
    with preserve_state(model), torch.no_grad(), tap(modules, heard), watcher:
        found = to_grid(run_until(model, images.clone(), site), (images.shape[2], images.shape[3]))
    return found.shape[2], list(passed.values()), watcher.attends


class _Watcher(FunctionMode):
    """The height that entered the latest convolution and pooling, and whether anything attends."""

    _KINDS = {"conv2d": "Conv2d", "max_pool2d": "MaxPool2d", "avg_pool2d": "AvgPool2d"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.entered: dict[str, int] = {}
        self.attends = False

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.attends |= name in ATTENTIONS
        kind = self._KINDS.get(name.removeprefix("_"))
        if kind is not None and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            self.entered[kind] = args[0].shape[2]
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
        _replace(model, name, _DilatedPool(module, rate))


class _DilatedPool(nn.Module):
    """Pooling over places that lie apart, at each place; torch pads and dilates less, or not at all."""

    def __init__(self, pool: nn.MaxPool2d | nn.AvgPool2d, rate: int) -> None:
        super().__init__()
        self.kernel, self.padding, self.rate = _pair(pool.kernel_size), _pair(pool.padding), rate
        # Rounding up takes windows in that reach beyond the end.
        self.beyond = rate * (_first(pool.stride) - 1) if pool.ceil_mode else 0
        self.takes_max = isinstance(pool, nn.MaxPool2d)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h', w')."""
        (height, width), (down, across) = self.kernel, (pad * self.rate for pad in self.padding)
        if self.takes_max:
            around = (across, across + self.beyond, down, down + self.beyond)
            padded = F.pad(features, around, value=-torch.inf)
            return F.max_pool2d(padded, self.kernel, stride=1, dilation=self.rate)
        weight = features.new_full((features.shape[1], 1, height, width), 1 / (height * width))
        return F.conv2d(features, weight, padding=(down, across), dilation=self.rate, groups=features.shape[1])


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _power_of_two(ratio: float) -> int:
    return int(2 ** round(math.log2(max(ratio, 1))))


def _first(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
