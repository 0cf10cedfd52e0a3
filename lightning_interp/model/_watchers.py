"""Function modes that locate the last spatial tensor of a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.model.hooks import FunctionMode, HookPoint

__all__ = ["ATTENTIONS", "ConvolutionWatcher", "PoolingWatcher"]

# The functions that compute attention between tokens.
ATTENTIONS = frozenset(
    {"scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention", "softmax"}
)


class ConvolutionWatcher(FunctionMode):
    """Count the calls of conv2d, and record the name of the last convolution that ran."""

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
    """Locate the tensor that enters the last call which removes the spatial dimensions of a forward pass.

    Attributes:
        features: The point of that tensor, or None.
        attention_input: Where a class token is selected of ``features``: the point of the tokens that enter the last
            attention; else None.
    """

    _WEIGHTED = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "einsum"})
    # Where a flattening follows an average pooling (VGG, AlexNet) or dropout, the input of the latter is meant.
    _TRANSPARENT = frozenset({"adaptive_avg_pool2d", "avg_pool2d", "dropout", "dropout2d", "feature_dropout"})
    _REDUCTIONS = frozenset({"mean", "sum", "amax"})
    # A norm over channels permutes (N, 1, 1, C) back to (N, C, 1, 1), which is no pooling.
    _REORDERINGS = frozenset({"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"})
    _SELECTIONS = frozenset({"__getitem__", "select"})

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._images = images  # no layer, even where they are flattened
        self.features: HookPoint | None = None
        self.attention_input: HookPoint | None = None
        self._last_attention: tuple[HookPoint, torch.Size] | None = None
        self._has_weighted = False
        self._calls: Counter[Any] = Counter()
        self._module_calls: Counter[nn.Module] = Counter()
        # Tensors are held until the end, as the id of a freed one may be used again.
        self._outputs: list[tuple[str, nn.Module, int, Tensor, int]] = []
        self._reshaped: dict[int, tuple[Tensor, Tensor, HookPoint]] = {}

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Record which module returned which tensor, and the tensor's version."""
        if isinstance(output, Tensor):
            self._outputs.append((name, module, self._module_calls[module], output, output._version))
        self._module_calls[module] += 1

    def call(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self._calls[function]
        self._calls[function] += 1
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        point = None
        if tensor is self._images:
            tensor = None
        if tensor is not None and self._has_weighted and tensor.ndim == 4 and self._is_spatial(name, tensor):
            point = self._point_of(tensor, function, name, index)
        if name in ATTENTIONS:
            self._last_attention = self._last_tokens() or self._last_attention
        result = function(*args, **kwargs)
        self._has_weighted |= name in self._WEIGHTED
        # x.flatten(2).mean(-1) pools; a flattening alone may also make the tokens of a transformer.
        if tensor is not None and tensor.ndim == 3 and id(tensor) in self._reshaped and name in self._REDUCTIONS:
            self.features = self._reshaped[id(tensor)][2]
        if tensor is not None and self._has_weighted and isinstance(result, Tensor):
            self._watch_tokens(tensor, result, function, name, index)
        if point is not None and isinstance(result, Tensor) and tensor is not None:
            if id(tensor) in self._reshaped:
                point = self._reshaped[id(tensor)][2]
            if name in self._TRANSPARENT or result.shape == (*tensor.shape[:2], tensor.shape[2:].numel()):
                self._reshaped[id(result)] = (result, tensor, point)
            if tensor.shape[2:].numel() > 1 and self._removes_positions(name, tensor, result):
                self.features, self.attention_input = point, None
        return result

    def _watch_tokens(self, tokens: Tensor, result: Tensor, function: Any, name: str, call_index: int) -> None:
        """Recognise the selection or the average of tokens, from (N, T, C) to (N, C)."""
        if tokens.ndim != 3 or result.shape != (tokens.shape[0], tokens.shape[2]) or id(tokens) in self._reshaped:
            return
        if tokens.shape[1] > 1 and name in self._SELECTIONS | self._REDUCTIONS:
            self.features = self._point_of(tokens, function, name, call_index)
            attention = self._last_attention
            is_selected = name in self._SELECTIONS and attention is not None and attention[1] == tokens.shape
            self.attention_input = attention[0] if is_selected and attention is not None else None

    def _last_tokens(self) -> tuple[HookPoint, torch.Size] | None:
        """The last module that returned tokens: a norm, where there are norms, instead of a projection to keys."""
        outputs = [output for output in self._outputs if output[3].ndim == 3 and output[3].shape[1] > 1]
        norms = [output for output in outputs if "norm" in type(output[1]).__name__.lower()]
        for name, module, call_index, tokens, _ in reversed(norms or outputs):
            return HookPoint(name, module, call_index=call_index), tokens.shape
        return None

    def _is_spatial(self, name: str, tensor: Tensor) -> bool:
        # VGG's adaptive pooling turns one position into many, where images are small.
        return tensor.shape[2:].numel() > 1 or name in self._TRANSPARENT

    def _removes_positions(self, name: str, tensor: Tensor, result: Tensor) -> bool:
        n, c, h, w = tensor.shape
        if result.ndim == 2 and name in self._REDUCTIONS and result.shape == (n, w):
            return True  # (N, h, w, C)
        if result.ndim == 4:
            return tuple(result.shape[2:]) == (1, 1) and name not in self._REORDERINGS
        if result.ndim == 3:
            return name in self._REDUCTIONS and tuple(result.shape) in {(n, c, h), (n, c, w)}
        return result.ndim == 2 and len(result) == n

    def _point_of(self, tensor: Tensor, function: Any, name: str, call_index: int) -> HookPoint:
        """Return the outermost module whose output the tensor is, not modified in place since; else the call."""
        for module_name, module, module_call, output, version in reversed(self._outputs):
            if output is tensor and version == tensor._version:
                return HookPoint(module_name, module, call_index=module_call if self._module_calls[module] > 1 else -1)
        return HookPoint(f"input of {name}", function=function, call_index=call_index)
