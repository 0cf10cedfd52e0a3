"""One recorded forward pass of a model: the tensors that it tapped, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.hooks import HookPoint, never_ran, tap_points
from lightning_interp.model.outputs import Predict, checked_images, output_logits, run_model
from lightning_interp.model.preserve import preserve_state

__all__ = ["ContextFactory", "ForwardPass"]

ContextFactory = Callable[[], AbstractContextManager[Any]]


class ForwardPass:
    """A forward pass that runs when the ``with`` block is entered, and whose tensors are kept until it is left.

    It runs under :func:`~lightning_interp.model.preserve.preserve_state`. No parameter takes part in the graph, which
    starts at the lowest tapped layer whose gradient is wanted, or at the images.

    Args:
        model: The module to run.
        images: (N, C, H, W) floating, as the model takes them.
        layers: The points to tap (see :func:`~lightning_interp.model.locate.locate`), each with whether its gradient
            is wanted.
        input_gradients: Whether the gradient with respect to the images is wanted.
        predict: How to run the model, ``predict(model, images)``; None calls it.
        first_index: The index of the first image in the batch that ``images`` were cut from.
        context: Makes a context in which the pass, and everything up to the end of the block, runs; ``mode`` is what
            entering it returns.

    Raises:
        ConfigurationError: If the images do not fit the contract, a layer did not run, or the model ran without
            gradients.

    Example:
        >>> import torch
        >>> from lightning_interp.model.locate import locate
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
        >>> convolution = locate(model, "0")
        >>> with ForwardPass(model, torch.rand(5, 3, 8, 8), layers={convolution: False}) as forward_pass:
        ...     (forward_pass.logits.shape, forward_pass.tensor(convolution).shape)
        (torch.Size([5, 2]), torch.Size([5, 4, 6, 6]))
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        layers: Mapping[HookPoint, bool] | None = None,
        input_gradients: bool = False,
        predict: Predict | None = None,
        first_index: int = 0,
        context: ContextFactory | None = None,
    ) -> None:
        self.model = model
        self.images = checked_images(images)
        self.predict = predict
        self.first_index = first_index
        self.context = context
        self.mode: Any = None
        self._points = dict(layers or {})
        self._wants_inputs = input_gradients
        self._stack = ExitStack()
        self._kept: dict[HookPoint, list[Tensor]] = {}
        self._leaf: Tensor | None = None
        self._outputs: list[Any] = []  # the model's output and, once they are requested, its logits
        self._is_recording = False
        self._attention_weights: list[Tensor] = []  # which require a gradient while the graph is built
        self._gradients: dict[object, dict[HookPoint | None, Tensor | None]] = {}

    def __enter__(self) -> ForwardPass:
        with ExitStack() as stack:
            stack.enter_context(preserve_state(self.model))
            if self.context is not None:
                self.mode = stack.enter_context(self.context())
            stack.callback(self._end_graph)
            stack.enter_context(tap_points(self._points, self._keep))
            self._run()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kept.clear()
        self._gradients.clear()
        self._leaf = self.mode = None
        self._outputs.clear()
        self._stack.__exit__(kind, error, traceback)

    @property
    def output(self) -> Any:
        """The model's output."""
        return self._outputs[0]

    @property
    def logits(self) -> Tensor:
        """(N, K) the class scores in the output; an output without them raises an error only here."""
        if len(self._outputs) == 1:
            logits = output_logits(self.output)
            if len(logits) != len(self.images):
                raise ConfigurationError(
                    f"the model gave {len(logits)} outputs for {len(self.images)} images; expected one for each"
                )
            self._outputs.append(logits)
        checked: Tensor = self._outputs[1]
        return checked

    def tensor(self, point: HookPoint) -> Tensor:
        """Return the tensor at a point, in the model's layout."""
        return self._kept[point][self.call_number(point) if point.module is not None else 0]

    def call_number(self, point: HookPoint) -> int:
        """Return which call of the module or function a point is, counted from the first."""
        if point.module is None:
            return point.call_index
        calls = len(self._kept[point])
        try:
            return range(calls)[point.call_index]
        except IndexError:
            raise ConfigurationError(
                f"the layer {point.name!r} ran {calls} times; there is no call {point.call_index}"
            ) from None

    def gradient(self, scores: Callable[[], Tensor], key: object, point: HookPoint | None) -> Tensor:
        """Return the gradient of the sum of scores, computed once for all tapped points and then cached.

        Args:
            scores: Returns (N,) scores.
            key: The cache's key for these scores.
            point: The point, or None for the images.

        Returns:
            The gradient, in the shape of the tensor at the point.

        Raises:
            ConfigurationError: If the pass was not opened for this gradient, or the scores do not depend on the point.
        """
        name = "the images" if point is None else f"the layer {point.name!r}"
        if not (self._wants_inputs if point is None else self._points.get(point, False)):
            raise ConfigurationError(
                f"this Trace was not opened for the gradient with respect to {name}; a monitor asks for it in needs()"
            )
        if key not in self._gradients:
            self._gradients[key] = self._backward(scores())
        gradient = self._gradients[key][point]
        if gradient is None:
            raise ConfigurationError(f"the explained score does not depend on {name}; choose another layer")
        return gradient

    def _run(self) -> None:
        images = self.images.detach().clone()  # the model may modify its input in place
        if self._wants_inputs:
            self._leaf = images.requires_grad_()
            images = images.clone()
            self._begin_graph()
        self._kept = {point: [] for point in self._points}
        self._is_recording = True
        with torch.set_grad_enabled(self._wants_inputs or any(self._points.values())):
            self._outputs.append(run_model(self.model, images, self.predict))
        # Checkpointed blocks run again in the backward pass, where taps must return the same but keep nothing.
        self._is_recording = False
        for point, tensors in self._kept.items():
            if not tensors:
                raise never_ran(point)

    def _keep(self, points: list[HookPoint], tensor: Tensor) -> Tensor:
        """Keep a tensor, and return a clone, as later layers may overwrite it."""
        if not any(self._points[point] for point in points):
            if self._is_recording:
                copy = tensor.detach().clone()
                for point in points:
                    self._kept[point].append(copy)
            return tensor
        if not torch.is_grad_enabled():
            if not self._is_recording:
                return tensor  # another pass without gradients, while this one is open
            raise ConfigurationError(
                f"the layer {points[0].name!r} runs without gradients inside the model's forward pass (torch.no_grad, "
                "or checkpointing with use_reentrant=True); checkpoint with use_reentrant=False, or name another layer"
            )
        kept = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        if kept is not tensor:
            self._begin_graph()
        if self._is_recording:
            for point in points:
                self._kept[point].append(kept)
        return kept.clone()

    def _begin_graph(self) -> None:
        """Let attention's packed weights require a gradient, which is never computed.

        torch multiplies tokens (T, N, C) by a weight without gradient position by position, which takes three times as
        long.
        """
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return  # autocast would keep a copy of the weight, with its graph
        for module in self.model.modules():
            weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else None
            if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_inference():
                continue
            if not weight.requires_grad:
                self._attention_weights.append(weight.requires_grad_())

    def _end_graph(self) -> None:
        for weight in self._attention_weights:
            weight.requires_grad_(False)
        self._attention_weights.clear()

    def _backward(self, scores: Tensor) -> dict[HookPoint | None, Tensor | None]:
        inputs: dict[HookPoint | None, Tensor] = {
            point: self.tensor(point) for point, wants_gradient in self._points.items() if wants_gradient
        }
        if self._leaf is not None:
            inputs[None] = self._leaf
        if not scores.requires_grad:
            raise ConfigurationError(
                "the explained score carries no gradient: the model computes it under torch.no_grad or detaches it"
            )
        with torch.enable_grad():
            try:
                # The graph is retained, as another monitor may explain other classes.
                gradients = torch.autograd.grad(
                    scores.sum(), list(inputs.values()), retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                if (known := self._checkpoint_error(error)) is None:
                    raise
                raise known from error
        return dict(zip(inputs, gradients, strict=True))

    def _checkpoint_error(self, error: RuntimeError) -> ConfigurationError | None:
        """Return the error for checkpoints that do not support this gradient; None for other errors."""
        if "use_reentrant=True" in str(error) or "Checkpointing is not compatible" in str(error):
            return ConfigurationError(
                "the model checkpoints with use_reentrant=True, which supports no gradient of a chosen tensor; "
                "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        functions = [point.name for point in self._points if point.module is None]
        if functions and isinstance(error, CheckpointError):
            return ConfigurationError(
                f"the layer {functions[0]!r} is a function inside a checkpointed block, which cannot be found "
                "again when the block runs once more for the gradient; name a module with layer=..."
            )
        return None
