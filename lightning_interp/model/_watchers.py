"""Function modes that watch a forward pass for its last spatial tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.model.hooks import FunctionMode, HookPoint

__all__ = ["ATTENTIONS", "ConvolutionWatcher", "PoolingWatcher"]

# The functions by which tokens attend to each other.
ATTENTIONS = frozenset(
    {"scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention", "softmax"}
)


class ConvolutionWatcher(FunctionMode):
    """Count the calls of conv2d, and remember the name of the last convolution that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = "a convolution"
        self.function: Any = None
        self.calls = 0

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        self.layer = name

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "conv2d":
            self.function = function
            self.calls += 1
        return function(*args, **kwargs)


class PoolingWatcher(FunctionMode):
    """Watches a forward pass for the last call that takes location away, and names the tensor that enters it."""

    _WEIGHTED = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "einsum"})
    # A flattening that follows an average pooling (VGG, AlexNet) or dropout is preceded by what entered those.
    _TRANSPARENT = frozenset({"adaptive_avg_pool2d", "avg_pool2d", "dropout", "dropout2d", "feature_dropout"})
    _REDUCTIONS = frozenset({"mean", "sum", "amax"})
    # A norm over channels turns (N, 1, 1, C) back to (N, C, 1, 1): that is no pooling.
    _REORDERINGS = frozenset({"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"})
    _SELECTIONS = frozenset({"__getitem__", "select"})

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._images = images  # flattened themselves, they are no layer
        self.found: HookPoint | None = None
        self.attended: HookPoint | None = None  # where ``found`` gives a class token: the tokens of the last attention
        self._attending: tuple[HookPoint, torch.Size] | None = None
        self._convolved = False
        self._calls: Counter[Any] = Counter()
        self._module_calls: Counter[nn.Module] = Counter()
        # All results are held until the end: an id is only unique among the living.
        self._outputs: list[tuple[str, nn.Module, int, Tensor, int]] = []
        self._entered: dict[int, tuple[Tensor, Tensor, HookPoint]] = {}

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Remember which module gave which tensor, and in which state."""
        if isinstance(output, Tensor):
            self._outputs.append((name, module, self._module_calls[module], output, output._version))
        self._module_calls[module] += 1

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self._calls[function]
        self._calls[function] += 1
        entering = args[0] if args and isinstance(args[0], Tensor) else None
        point = None
        if entering is self._images:
            entering = None
        if entering is not None and self._convolved and entering.ndim == 4 and self._has_places(name, entering):
            point = self._point_of(entering, function, name, index)
        if name in ATTENTIONS:
            self._attending = self._last_tokens() or self._attending
        result = function(*args, **kwargs)
        self._convolved |= name in self._WEIGHTED
        # x.flatten(2).mean(-1) pools; flattened alone, places may become a transformer's tokens.
        if entering is not None and entering.ndim == 3 and id(entering) in self._entered and name in self._REDUCTIONS:
            self.found = self._entered[id(entering)][2]
        if entering is not None and self._convolved and isinstance(result, Tensor):
            self._watch_tokens(entering, result, function, name, index)
        if point is not None and isinstance(result, Tensor) and entering is not None:
            if id(entering) in self._entered:
                point = self._entered[id(entering)][2]
            if name in self._TRANSPARENT or result.shape == (*entering.shape[:2], entering.shape[2:].numel()):
                self._entered[id(result)] = (result, entering, point)
            if entering.shape[2:].numel() > 1 and self._takes_location(name, entering, result):
                self.found, self.attended = point, None
        return result

    def _watch_tokens(self, entering: Tensor, result: Tensor, function: Any, name: str, call_index: int) -> None:
        """Tokens (N, T, C) of which one is chosen, or which are averaged, leave (N, C)."""
        if (
            entering.ndim != 3
            or result.shape != (entering.shape[0], entering.shape[2])
            or id(entering) in self._entered
        ):
            return
        if entering.shape[1] > 1 and name in self._SELECTIONS | self._REDUCTIONS:
            self.found = self._point_of(entering, function, name, call_index)
            attending = self._attending
            shared = name in self._SELECTIONS and attending is not None and attending[1] == entering.shape
            self.attended = attending[0] if shared and attending is not None else None

    def _last_tokens(self) -> tuple[HookPoint, torch.Size] | None:
        """The last module that gave tokens: a norm, where there are norms, rather than what makes keys and values."""
        tokens = [each for each in self._outputs if each[3].ndim == 3 and each[3].shape[1] > 1]
        norms = [each for each in tokens if "norm" in type(each[1]).__name__.lower()]
        for name, module, call_index, output, _ in reversed(norms or tokens):
            return HookPoint(name, module, call_index=call_index), output.shape
        return None

    def _has_places(self, name: str, entering: Tensor) -> bool:
        # VGG's adaptive pooling makes many places of one, where images are small.
        return entering.shape[2:].numel() > 1 or name in self._TRANSPARENT

    def _takes_location(self, name: str, entering: Tensor, result: Tensor) -> bool:
        n, c, h, w = entering.shape
        if result.ndim == 2 and name in self._REDUCTIONS and result.shape == (n, w):
            return True  # (N, h, w, C)
        if result.ndim == 4:
            return tuple(result.shape[2:]) == (1, 1) and name not in self._REORDERINGS
        if result.ndim == 3:
            return name in self._REDUCTIONS and tuple(result.shape) in {(n, c, h), (n, c, w)}
        return result.ndim == 2 and len(result) == n

    def _point_of(self, tensor: Tensor, function: Any, name: str, call_index: int) -> HookPoint:
        """The outermost module whose output the tensor is, unless it was changed in place since; else the call."""
        for module_name, module, module_call, output, version in reversed(self._outputs):
            if output is tensor and version == tensor._version:
                return HookPoint(module_name, module, call_index=module_call if self._module_calls[module] > 1 else -1)
        return HookPoint(f"input of {name}", function=function, call_index=call_index)
