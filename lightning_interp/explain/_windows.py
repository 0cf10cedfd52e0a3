"""Images that differ from one image by a window each: a model computes what the windows change, and no more.

A convolution spreads a change by its kernel, so the early layers of a network, where activations are large, see
little of a patch. Whatever is not known to keep changes local is computed in full, so any model will do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d, pad

__all__ = ["Windowed"]

# Beyond this share of the area, a window costs as much as the whole.
_LARGE = 0.75


@dataclass(frozen=True)
class _Windows:
    """Tensors (P, C, H, W): ``base`` (1, C, H, W), but for ``inside`` (P, C, h, w) at ``tops`` and ``lefts``."""

    base: Tensor
    inside: Tensor
    tops: list[int]
    lefts: list[int]

    def each(self, function: Callable[[Tensor], Tensor]) -> _Windows:
        """A function of each value by itself."""
        return _Windows(function(self.base), function(self.inside), self.tops, self.lefts)

    def crops(
        self,
        tops: list[int],
        lefts: list[int],
        size: tuple[int, int],
        padding: Sequence[int] = (0, 0),
        value: float = 0,
    ) -> Tensor:
        """What stands in boxes of one size (P, C, *size), one of each tensor, counted in the padded tensors."""
        below, right = padding
        base = pad(self.base, (right, right, below, below), value=value) if any(padding) else self.base
        (height, width), (h, w) = size, self.inside.shape[2:]
        found = base.new_empty((len(tops), base.shape[1], height, width))
        for number, (top, left) in enumerate(zip(tops, lefts, strict=True)):
            found[number] = base[0, :, top : top + height, left : left + width]
            # Where the window lies in the box, of which it may stick out.
            y, x = self.tops[number] + below - top, self.lefts[number] + right - left
            seen = found[number, :, max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)]
            if seen.numel():
                from_y, from_x = max(-y, 0), max(-x, 0)
                seen.copy_(self.inside[number, :, from_y : from_y + seen.shape[1], from_x : from_x + seen.shape[2]])
        return found

    def full(self) -> Tensor:
        """The tensors themselves."""
        zeros = [0] * len(self.tops)
        height, width = self.base.shape[2:]
        return self.crops(zeros, zeros, (height, width))

    def slide(
        self,
        function: Callable[..., Tensor],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        value: float = 0,
    ) -> _Windows:
        """A function ``(tensor, padding)`` that slides a kernel over its input."""
        rows = _reached(self.tops, self.inside.shape[2], self.base.shape[2], kernel[0], stride[0], padding[0])
        columns = _reached(self.lefts, self.inside.shape[3], self.base.shape[3], kernel[1], stride[1], padding[1])
        crops = self.crops(
            [top * stride[0] for top in rows[0]],
            [left * stride[1] for left in columns[0]],
            ((rows[1] - 1) * stride[0] + kernel[0], (columns[1] - 1) * stride[1] + kernel[1]),
            padding,
            value,
        )
        return _Windows(function(self.base, padding=tuple(padding)), function(crops, padding=0), rows[0], columns[0])


def _reached(
    starts: list[int], length: int, side: int, kernel: int, stride: int, padding: int
) -> tuple[list[int], int]:
    """Where in the output the change of an interval begins, and how long it is at most."""
    places = (side + 2 * padding - kernel) // stride + 1
    first = [max(0, -((kernel - 1 - padding - start) // stride)) for start in starts]
    last = [min(places - 1, (start + length - 1 + padding) // stride) for start in starts]
    longest = max(1, *(end - begin + 1 for begin, end in zip(first, last, strict=True)))
    return [min(begin, places - longest) for begin in first], longest


def _aligned(several: list[_Windows]) -> list[_Windows]:
    """The same tensors, with windows at the same places."""
    if all((each.tops, each.lefts) == (several[0].tops, several[0].lefts) for each in several) and (
        len({each.inside.shape[2:] for each in several}) == 1
    ):
        return several
    height, width = several[0].base.shape[2:]
    tops, h = _united([(each.tops, each.inside.shape[2]) for each in several], height)
    lefts, w = _united([(each.lefts, each.inside.shape[3]) for each in several], width)
    return [_Windows(each.base, each.crops(tops, lefts, (h, w)), tops, lefts) for each in several]


def _united(intervals: list[tuple[list[int], int]], side: int) -> tuple[list[int], int]:
    starts = [min(each) for each in zip(*(starts for starts, _ in intervals), strict=True)]
    ends = [max(each) for each in zip(*([start + size for start in starts] for starts, size in intervals), strict=True)]
    longest = max(end - start for start, end in zip(starts, ends, strict=True))
    return [min(start, side - longest) for start in starts], longest


class Windowed(Tensor):
    """Copies (P, C, H, W) of an image, each with a window of its own, as a tensor that models take.

    What is known to keep a change local (convolutions, pooling, norms by running statistics, activations, sums and
    concatenations) is computed for the image once and for the windows; anything else sees the whole copies.

    Args:
        image: (1, C, H, W).
        inside: (P, C, h, w) what stands in the windows.
        tops: The windows' first rows.
        lefts: Their first columns.

    Example:
        >>> copies = Windowed(torch.zeros(1, 1, 3, 4), torch.ones(2, 1, 1, 2), tops=[0, 2], lefts=[0, 1])
        >>> (copies.shape, copies.full()[:, 0].tolist())  # doctest: +NORMALIZE_WHITESPACE
        (torch.Size([2, 1, 3, 4]), [[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
                                    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]])
    """

    _windows: _Windows | None
    _full: Tensor | None

    @staticmethod
    def __new__(cls, image: Tensor, inside: Tensor, tops: list[int], lefts: list[int]) -> Windowed:
        return cls._of(_Windows(image, inside, tops, lefts))

    @classmethod
    def _of(cls, windows: _Windows) -> Windowed:
        inside = windows.inside
        shape = (len(inside), *windows.base.shape[1:])
        # Without memory; by its strides it is not contiguous, so that code in other languages must ask for a copy.
        made = Tensor._make_wrapper_subclass(
            cls, shape, strides=(0,) * len(shape), dtype=inside.dtype, device=inside.device
        )
        made._windows, made._full = windows, None
        return made

    def full(self) -> Tensor:
        """The copies as an ordinary tensor; from then on they are that."""
        windows = self._windows
        if windows is not None:
            self._windows, self._full = None, windows.full()
        return cast(Tensor, self._full)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property
            name = getattr(func.__self__, "__name__", "")
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = _locally(name, func, args, kwargs)
        return func(*_whole(args), **_whole(kwargs)) if found is None else found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Scripted functions and compiled code in other languages pass by the functions that know windows.
        raise RuntimeError(f"{func} asks for numbers, of which a tensor of windows has none before full()")


_METADATA = frozenset({"shape", "dtype", "device", "ndim", "size", "dim", "requires_grad", "is_cuda", "layout"}) | {
    "is_floating_point", "numel", "__len__", "is_inference", "is_complex", "is_sparse", "is_quantized"
}  # fmt: skip


def _whole(value: Any) -> Any:
    """The same arguments, with whole tensors."""
    if isinstance(value, Windowed):
        return value.full()
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_whole(each) for each in value)
    return value


# ---- What keeps changes local: each returns None where it does not.


def _state(value: Any) -> _Windows | None:
    """What is known of a tensor, while its windows are small."""
    windows = value._windows if isinstance(value, Windowed) else None
    if windows is None or windows.inside[0, 0].numel() > _LARGE * windows.base[0, 0].numel():
        return None
    return windows


def _locally(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a function changes within the windows; None where that is not known, or called in a way that is not."""
    local = _LOCAL.get(name)
    if local is None or "out" in kwargs:
        return None
    try:
        _SIGNATURES[name].bind(func, *args, **kwargs)
    except TypeError:
        return None
    return local(func, *args, **kwargs)


def _itself(func: Any, tensor: Any) -> Tensor | None:
    """A tensor that shares its values: without gradients the same one, as what changes in place must reach both."""
    return None if _state(tensor) is None else cast(Windowed, tensor)


def _value_by_value(func: Any, tensor: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
    tensor = kwargs.pop("input", tensor)
    windows = _state(tensor)
    if windows is None or not all(_is_per_channel(each) for each in (*args, *kwargs.values())):
        return None
    changed = windows.each(lambda values: cast(Tensor, func(values, *args, **kwargs)))
    if changed.inside is windows.inside:  # in place, or nothing to do
        return cast(Windowed, tensor)
    return Windowed._of(changed)


def _is_per_channel(value: Any) -> bool:
    return not isinstance(value, Tensor) or (
        not isinstance(value, Windowed) and (value.ndim == 0 or (value.ndim in (3, 4) and _is_spatially_one(value)))
    )


def _is_spatially_one(value: Tensor) -> bool:
    return value.shape[-2:] == (1, 1) and (value.ndim == 3 or len(value) == 1)


def _together(operation: Callable[..., Tensor], func: Any, left: Any, right: Any, **kwargs: Any) -> Tensor | None:
    """A sum, difference or product."""
    first, second = _state(left), _state(right)
    if not isinstance(right, Windowed):
        return _value_by_value(func, left, right, **kwargs)
    if first is None or second is None or left.shape != right.shape:
        return None
    one, other = _aligned([first, second])
    result = _Windows(
        operation(one.base, other.base, **kwargs), operation(one.inside, other.inside, **kwargs), one.tops, one.lefts
    )
    if func.__name__ in {"add_", "__iadd__", "sub_", "__isub__", "mul_", "__imul__"}:
        left._windows = result
        return cast(Windowed, left)
    return Windowed._of(result)


def _concatenated(func: Any, tensors: Any, dim: int = 0) -> Tensor | None:
    found = [_state(each) for each in tensors]
    if dim not in (1, -3) or any(each is None for each in found) or len({each.shape[2:] for each in tensors}) != 1:
        return None
    several = _aligned(cast("list[_Windows]", found))
    base, inside = (torch.cat([getattr(each, name) for each in several], 1) for name in ("base", "inside"))
    return Windowed._of(_Windows(base, inside, several[0].tops, several[0].lefts))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _convolved(
    func: Any,
    input: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    windows = _state(input)
    if windows is None or isinstance(padding, str) or isinstance(weight, Windowed):
        return None
    spread = _pair(dilation)
    kernel = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], spread, strict=True)]

    def convolve(tensor: Tensor, padding: Any) -> Tensor:
        return conv2d(tensor, weight, bias, stride, padding, dilation, groups)

    return Windowed._of(windows.slide(convolve, kernel, _pair(stride), _pair(padding)))


def _max_pooled(
    func: Any,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    windows = _state(input)
    if windows is None or ceil_mode or return_indices or _pair(dilation) != (1, 1):
        return None
    steps = _pair(stride or kernel_size)
    pool = partial(max_pool2d, kernel_size=kernel_size, stride=steps)
    return Windowed._of(windows.slide(pool, _pair(kernel_size), steps, _pair(padding), -torch.inf))


def _average_pooled(
    func: Any,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor | None:
    windows = _state(input)
    if windows is None or ceil_mode or divisor_override or (_pair(padding) != (0, 0) and not count_include_pad):
        return None
    steps = _pair(stride or kernel_size)
    pool = partial(avg_pool2d, kernel_size=kernel_size, stride=steps)
    return Windowed._of(windows.slide(pool, _pair(kernel_size), steps, _pair(padding)))


def _normed(
    func: Any,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    windows = _state(input)
    if windows is None or training or running_mean is None:
        return None
    rest = (running_mean, running_var, weight, bias, training, momentum, eps)
    return Windowed._of(windows.each(lambda values: cast(Tensor, func(values, *rest))))


def _dropped(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    return None if training or _state(input) is None else cast(Windowed, input)


_ACTIVATIONS = {"relu", "relu6", "leaky_relu", "hardtanh", "silu", "gelu", "elu", "mish", "hardswish", "hardsigmoid"}
_ACTIVATIONS |= {"sigmoid", "tanh", "clamp", "clamp_min", "clamp_max"}
_ACTIVATIONS |= {name + "_" for name in _ACTIVATIONS}
_OTHERS = {"clone", "contiguous", "to", "float", "div", "__truediv__", "__rmul__", "__radd__"}

_LOCAL: dict[str, Callable[..., Tensor | None]] = {
    "conv2d": _convolved,
    "max_pool2d": _max_pooled,
    "avg_pool2d": _average_pooled,
    "batch_norm": _normed,
    "cat": _concatenated,
    "concat": _concatenated,
    "detach": _itself,
    **dict.fromkeys(["dropout", "dropout2d"], _dropped),
    **dict.fromkeys(["add", "add_", "__add__", "__iadd__"], partial(_together, torch.add)),
    **dict.fromkeys(["sub", "sub_", "__sub__", "__isub__"], partial(_together, torch.sub)),
    **dict.fromkeys(["mul", "mul_", "__mul__", "__imul__"], partial(_together, torch.mul)),
    **dict.fromkeys(_ACTIVATIONS | _OTHERS, _value_by_value),
}
_SIGNATURES = {name: inspect.signature(local) for name, local in _LOCAL.items()}
