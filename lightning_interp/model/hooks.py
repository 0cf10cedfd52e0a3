"""Hooks and function modes; no other file of the library registers any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.outputs import first_tensor, run_model

__all__ = ["FunctionMode", "HookPoint", "never_ran", "replace", "run_until", "tap", "tap_points"]


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A point in a forward pass whose tensor can be tapped.

    Args:
        name: The name in messages and captions.
        module: The module whose output it is, or None.
        function: Without a module: the function whose input it is.
        call_index: Which call of the module (negative: counted from the last) or of the function.
        reshape: From the tensor to (N, C, h, w); None: :func:`~lightning_interp.model.layout.to_grid`.
    """

    name: str
    module: nn.Module | None = None
    function: Callable[..., Any] | None = None
    call_index: int = -1
    reshape: Callable[[Tensor], Tensor] | None = None


class FunctionMode(TorchFunctionMode):
    """Base class whose :meth:`call` receives every call of a torch function.

    Example:
        >>> import torch
        >>> class Negated(FunctionMode):
        ...     def call(self, function, name, args, kwargs):
        ...         return -function(*args, **kwargs) if name == "relu" else function(*args, **kwargs)
        >>> with Negated():
        ...     torch.relu(torch.ones(1))
        tensor([-1.])
    """

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call; ``name`` is the function's ``__name__``."""
        return function(*args, **kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.call(func, getattr(func, "__name__", ""), args, dict(kwargs or {}))


@contextmanager
def tap(modules: Mapping[str, nn.Module], on_output: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Observe the outputs of modules in forward passes that run inside, without changing them.

    Args:
        modules: Named modules.
        on_output: Called with a module's name, the module and its output after each of its calls.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with tap(dict(model.named_children()), lambda name, module, output: print(name, output.shape)):
        ...     _ = model(torch.zeros(1, 2))
        0 torch.Size([1, 3])
        1 torch.Size([1, 3])
    """

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> None:
        on_output(name, module, output)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(hook, name)).remove)
        yield


@contextmanager
def tap_points(points: Iterable[HookPoint], keep: Callable[[list[HookPoint], Tensor], Tensor]) -> Iterator[None]:
    """Pass the tensors at points of a forward pass to a function, and its results to the model.

    Args:
        points: The points. All calls of a module are tapped, but only the given call of a function.
        keep: Takes the points of a tensor and the tensor; returns the tensor that replaces it.

    Raises:
        ConfigurationError: While the model runs, if a module's output holds no tensor.
    """
    by_module: dict[nn.Module, list[HookPoint]] = {}
    functions: list[HookPoint] = []
    for point in points:
        if point.module is None:
            functions.append(point)
        else:
            by_module.setdefault(point.module, []).append(point)
    with ExitStack() as stack:
        for module, tapped in by_module.items():
            stack.callback(module.register_forward_hook(_output_hook(tapped, keep)).remove)
        if functions:
            stack.enter_context(_FunctionInputs(functions, keep))
        yield


@contextmanager
def replace(point: HookPoint, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the tensor at a point, in forward passes that run inside.

    Args:
        point: The point; ``call_index=-1`` means every call of the module.
        change: Takes the tensor; returns the one that replaces it.

    Example:
        >>> import torch
        >>> from lightning_interp.model.locate import locate
        >>> model = nn.Sequential(nn.Identity(), nn.Identity())
        >>> with replace(locate(model, "0"), lambda tensor: tensor + 1):
        ...     model(torch.zeros(2))
        tensor([1., 1.])
    """
    calls = 0

    def keep(points: list[HookPoint], tensor: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        is_meant = point.module is None or point.call_index in (-1, calls - 1)
        return change(tensor) if is_meant else tensor

    with tap_points([point], keep):
        yield


class _Reached(Exception):  # noqa: N818 (not an error: it ends a pass early)
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def run_until(model: nn.Module, images: Tensor, point: HookPoint) -> Tensor:
    """Return the tensor at a point, with its graph; nothing after it runs.

    Args:
        model: The model.
        images: (N, C, H, W) as the model takes them.
        point: Where to stop.

    Returns:
        The tensor.

    Raises:
        ConfigurationError: If the pass does not reach the point.

    Example:
        >>> import torch
        >>> from lightning_interp.model.locate import locate
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
        >>> run_until(model, torch.zeros(1, 3, 8, 8), locate(model, "0")).shape  # the lazy layer stays lazy
        torch.Size([1, 4, 6, 6])
    """

    def stop(tensor: Tensor) -> Tensor:
        raise _Reached(tensor)

    try:
        with replace(point, stop):
            run_model(model, images, None)
    except _Reached as reached:
        return reached.tensor
    raise never_ran(point)


def never_ran(point: HookPoint) -> ConfigurationError:
    """Return the error for a point that a forward pass did not reach."""
    return ConfigurationError(
        f"the layer {point.name!r} did not run in the model's forward pass; choose a layer that does"
    )


def _output_hook(
    points: list[HookPoint], keep: Callable[[list[HookPoint], Tensor], Tensor]
) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        tensor = first_tensor(output)
        if tensor is None:
            raise ConfigurationError(
                f"the layer {points[0].name!r} gives {type(output).__name__}, not a tensor; choose another layer"
            )
        replacement = keep(points, tensor)
        return output if replacement is tensor else _with_tensor(output, tensor, replacement)

    return hook


class _FunctionInputs(FunctionMode):
    """Tap the inputs of function calls."""

    def __init__(self, points: list[HookPoint], keep: Callable[[list[HookPoint], Tensor], Tensor]) -> None:
        super().__init__()
        self._points = points
        self._keep = keep
        self._calls: Counter[Any] = Counter()

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self._calls[function]
        self._calls[function] += 1
        points = [point for point in self._points if point.function is function and point.call_index == index]
        if points:
            args = (self._keep(points, args[0]), *args[1:])
        return function(*args, **kwargs)


def _with_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    items = (new if item is old else item for item in output)
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
