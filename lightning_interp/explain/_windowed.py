"""Copies of an image that differ from it within a window: models compute only what the windows change.

A convolution enlarges a window by its kernel, so in the early layers of a network, whose activations are large, only a
small part is computed again. Operations that are not known to be local run on the whole copies, so any model will do.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d

from lightning_interp.explain._windows import Windows, align

__all__ = ["Windowed", "call_with_windows"]

Result = TypeVar("Result")

# Beyond this share of the area, a window costs as much as the whole image.
_MAX_SHARE = 0.75

# Errors of code that reads the memory of a tensor subclass which has none.
_MEMORY_ERROR = re.compile("tensor subclass|data pointer|data is not allocated|storage")
_unsupported_calls: ContextVar[list[str]] = ContextVar("_unsupported_calls")


def call_with_windows(function: Callable[[Tensor], Result], copies: Windowed) -> Result:
    """Call a function with windowed copies, and once more with whole ones where it cannot run on windows.

    That is so for code that bypasses ``__torch_function__``, such as TorchScript and compiled extensions. Other errors
    are the function's own, and raised at once.
    """
    calls: list[str] = []
    token = _unsupported_calls.set(calls)
    try:
        return function(copies)
    except RuntimeError as error:
        if not calls and not _MEMORY_ERROR.search(str(error)):
            raise
    finally:
        _unsupported_calls.reset(token)
    return function(copies.full())


class Windowed(Tensor):
    """Copies (P, C, H, W) of an image, which differ from it within one window each, as a tensor that models take.

    Local operations (convolutions, pooling, norms by running statistics, activations, sums and concatenations) run on
    the image once and on the windows; all others run on the whole copies.

    Args:
        image: (1, C, H, W).
        inside: (P, C, h, w) the values within the windows.
        tops: The windows' first rows.
        lefts: The windows' first columns.

    Example:
        >>> copies = Windowed(torch.zeros(1, 1, 3, 4), torch.ones(2, 1, 1, 2), tops=[0, 2], lefts=[0, 1])
        >>> (copies.shape, copies.full()[:, 0].tolist())  # doctest: +NORMALIZE_WHITESPACE
        (torch.Size([2, 1, 3, 4]), [[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
                                    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]])
    """

    _windows: Windows | None
    _full: Tensor | None

    @staticmethod
    def __new__(cls, image: Tensor, inside: Tensor, tops: list[int], lefts: list[int]) -> Windowed:
        return cls._of(Windows(image, inside, tops, lefts))

    @classmethod
    def _of(cls, windows: Windows) -> Windowed:
        inside = windows.inside
        shape = (len(inside), *windows.base.shape[1:])
        # Without memory, and with strides that are not contiguous, so that extensions must copy it.
        tensor = Tensor._make_wrapper_subclass(
            cls, shape, strides=(0,) * len(shape), dtype=inside.dtype, device=inside.device
        )
        tensor._windows, tensor._full = windows, None
        return tensor

    def full(self) -> Tensor:
        """Return the copies as a plain tensor, which replaces the windows from then on."""
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
        result = _call_locally(name, func, args, kwargs)
        return func(*_to_full(args), **_to_full(kwargs)) if result is None else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # TorchScript and extensions bypass __torch_function__; the former drops the message of this error.
        _unsupported_calls.get([]).append(str(func))
        raise RuntimeError(f"{func} reads the values of a windowed tensor, which has none in memory before full()")


_METADATA = frozenset({"shape", "dtype", "device", "ndim", "size", "dim", "requires_grad", "is_cuda", "layout"}) | {
    "is_floating_point", "numel", "__len__", "is_inference", "is_complex", "is_sparse", "is_quantized"
}  # fmt: skip


def _to_full(value: Any) -> Any:
    """Replace windowed tensors in arguments by plain ones."""
    if isinstance(value, Windowed):
        return value.full()
    if isinstance(value, dict):
        return {key: _to_full(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to_full(item) for item in value)
    return value


# ---- Local operations; each returns None where it is not local.


def _windows_of(value: Any) -> Windows | None:
    """Return the windows of a tensor, while they are small."""
    windows = value._windows if isinstance(value, Windowed) else None
    if windows is None or windows.inside[0, 0].numel() > _MAX_SHARE * windows.base[0, 0].numel():
        return None
    return windows


def _call_locally(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Call a function on the windows; None where it is not known to be local, or called with unknown arguments."""
    local = _LOCAL.get(name)
    if local is None or "out" in kwargs:
        return None
    try:
        _SIGNATURES[name].bind(func, *args, **kwargs)
    except TypeError:
        return None
    return local(func, *args, **kwargs)


def _alias(func: Any, tensor: Any) -> Tensor | None:
    """Return the tensor itself for a function that shares its memory, so that in-place changes reach both."""
    return None if _windows_of(tensor) is None else cast(Windowed, tensor)


def _elementwise(func: Any, tensor: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
    tensor = kwargs.pop("input", tensor)
    windows = _windows_of(tensor)
    if windows is None or not all(_is_per_channel(argument) for argument in (*args, *kwargs.values())):
        return None
    result = windows.map(lambda values: cast(Tensor, func(values, *args, **kwargs)))
    if result.inside is windows.inside:  # in place, or the identity
        return cast(Windowed, tensor)
    return Windowed._of(result)


def _is_per_channel(value: Any) -> bool:
    """Whether an operand is the same for all positions and copies."""
    if isinstance(value, Windowed):
        return False
    if not isinstance(value, Tensor) or value.ndim == 0:
        return True
    return value.ndim in (3, 4) and value.shape[-2:] == (1, 1) and (value.ndim == 3 or len(value) == 1)


def _binary(operation: Callable[..., Tensor], func: Any, left: Any, right: Any, **kwargs: Any) -> Tensor | None:
    """Apply a sum, difference or product."""
    left_windows, right_windows = _windows_of(left), _windows_of(right)
    if not isinstance(right, Windowed):
        return _elementwise(func, left, right, **kwargs)
    if left_windows is None or right_windows is None or left.shape != right.shape:
        return None
    first, second = align([left_windows, right_windows])
    result = Windows(
        operation(first.base, second.base, **kwargs),
        operation(first.inside, second.inside, **kwargs),
        first.tops,
        first.lefts,
    )
    if func.__name__ in {"add_", "__iadd__", "sub_", "__isub__", "mul_", "__imul__"}:
        left._windows = result
        return cast(Windowed, left)
    return Windowed._of(result)


def _concatenate(func: Any, tensors: Any, dim: int = 0) -> Tensor | None:
    parts = [_windows_of(tensor) for tensor in tensors]
    sizes = {tensor.shape[2:] for tensor in tensors}
    if dim not in (1, -3) or any(windows is None for windows in parts) or len(sizes) != 1:
        return None
    aligned = align(cast("list[Windows]", parts))
    base, inside = (torch.cat([getattr(windows, name) for windows in aligned], 1) for name in ("base", "inside"))
    return Windowed._of(Windows(base, inside, aligned[0].tops, aligned[0].lefts))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _convolve(
    func: Any,
    input: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    windows = _windows_of(input)
    if windows is None or isinstance(padding, str) or isinstance(weight, Windowed):
        return None
    kernel = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], _pair(dilation), strict=True)]

    def convolve(tensor: Tensor, padding: Any) -> Tensor:
        return conv2d(tensor, weight, bias, stride, padding, dilation, groups)

    return Windowed._of(windows.slide(convolve, kernel, _pair(stride), _pair(padding)))


def _max_pool(
    func: Any,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    windows = _windows_of(input)
    if windows is None or ceil_mode or return_indices or _pair(dilation) != (1, 1):
        return None
    steps = _pair(stride or kernel_size)
    pool = partial(max_pool2d, kernel_size=kernel_size, stride=steps)
    return Windowed._of(windows.slide(pool, _pair(kernel_size), steps, _pair(padding), -torch.inf))


def _average_pool(
    func: Any,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor | None:
    windows = _windows_of(input)
    if windows is None or ceil_mode or divisor_override or (_pair(padding) != (0, 0) and not count_include_pad):
        return None
    steps = _pair(stride or kernel_size)
    pool = partial(avg_pool2d, kernel_size=kernel_size, stride=steps)
    return Windowed._of(windows.slide(pool, _pair(kernel_size), steps, _pair(padding)))


def _batch_norm(
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
    windows = _windows_of(input)
    if windows is None or training or running_mean is None:
        return None
    options = (running_mean, running_var, weight, bias, training, momentum, eps)
    return Windowed._of(windows.map(lambda values: cast(Tensor, func(values, *options))))


def _dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    return None if training or _windows_of(input) is None else cast(Windowed, input)


_ACTIVATIONS = {"relu", "relu6", "leaky_relu", "hardtanh", "silu", "gelu", "elu", "mish", "hardswish", "hardsigmoid"}
_ACTIVATIONS |= {"sigmoid", "tanh", "clamp", "clamp_min", "clamp_max"}
_ACTIVATIONS |= {name + "_" for name in _ACTIVATIONS}
_OTHER_ELEMENTWISE = {"clone", "contiguous", "to", "float", "div", "__truediv__", "__rmul__", "__radd__"}

_LOCAL: dict[str, Callable[..., Tensor | None]] = {
    "conv2d": _convolve,
    "max_pool2d": _max_pool,
    "avg_pool2d": _average_pool,
    "batch_norm": _batch_norm,
    "cat": _concatenate,
    "concat": _concatenate,
    "detach": _alias,
    **dict.fromkeys(["dropout", "dropout2d"], _dropout),
    **dict.fromkeys(["add", "add_", "__add__", "__iadd__"], partial(_binary, torch.add)),
    **dict.fromkeys(["sub", "sub_", "__sub__", "__isub__"], partial(_binary, torch.sub)),
    **dict.fromkeys(["mul", "mul_", "__mul__", "__imul__"], partial(_binary, torch.mul)),
    **dict.fromkeys(_ACTIVATIONS | _OTHER_ELEMENTWISE, _elementwise),
}
_SIGNATURES = {name: inspect.signature(local) for name, local in _LOCAL.items()}
