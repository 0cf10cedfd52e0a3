"""How the maps of a monitor are made: a method, its layer, what it explains, its options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_interp.callbacks.inputs import Needs
from lightning_interp.checks import is_integer
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import Explainer
from lightning_interp.model.locate import find_layer
from lightning_interp.model.targets import Targets
from lightning_interp.model.trace import Trace

__all__ = ["MapMethod", "Method"]

Method = str | Explainer | Callable[..., Tensor]


class MapMethod:
    """A method with everything that a monitor lets its user choose about it.

    Args:
        monitor: The monitor's class, as messages name it.
        methods: The methods that can be chosen by name.
        method: A name, an explainer, or a callable ``(model, images, targets) -> maps`` (N, H, W).
        layer: A dotted name, a module, or None for the last spatial layer.
        target: ``"predicted"``, ``"label"``, or a class number.
        options: The options of the method itself.

    Raises:
        ConfigurationError: If there is no such method, or it takes no such layer, target or option.

    Example:
        >>> from lightning_interp import explain
        >>> MapMethod("CAMMonitor", {"gradcam": explain.gradcam}, "gradcam").needs().layers
        {None: True}
    """

    def __init__(
        self,
        monitor: str,
        methods: Mapping[str, Explainer],
        method: Method,
        layer: str | nn.Module | None = None,
        target: str | int = "predicted",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._monitor = monitor
        self.method = self._resolve(method, methods)
        self.layer = layer
        self.target = target
        self.options = dict(options or {})
        if isinstance(self.method, Explainer):
            self.method.check(layer, self.options)
        elif layer is not None:
            raise ConfigurationError(
                f"{monitor}: a callable finds its layer itself; bind {layer!r} to it, or name a method"
            )
        if layer is not None and not isinstance(layer, (str, nn.Module)):
            raise ConfigurationError(f"a layer is a module or its dotted name, got {layer!r}")
        is_class = is_integer(target) and target >= 0
        if not is_class and target not in ("predicted", "label"):
            raise ConfigurationError(f"target takes 'predicted', 'label' or a class number, got {target!r}")

    @property
    def name(self) -> str:
        """The method's name in tags and captions."""
        method = self.method
        name = method.name if isinstance(method, Explainer) else getattr(method, "__name__", type(method).__name__)
        return re.sub(r"[^\w.\-]", "", name) or "custom"

    @property
    def has_zero(self) -> bool:
        """Whether zero means anything in the maps."""
        return not isinstance(self.method, Explainer) or self.method.has_zero

    def check(self, module: nn.Module) -> None:
        """Raise a :class:`ConfigurationError` where the module has no such layer."""
        if self.layer is not None:
            find_layer(module, self.layer)

    def needs(self) -> Needs:
        """What the forward pass must provide."""
        method = self.method
        if not isinstance(method, Explainer):
            return Needs()
        layers = {} if method.layer is None else {self.layer: method.layer == "gradients"}
        # A method with a context of its own runs a pass of its own.
        return Needs(layers, input_gradients=method.inputs and method.context is None, guard_parameters=False)

    def targets(self, labels: Tensor | None) -> Targets:
        """What is explained of images with these labels."""
        if self.target == "label" and labels is None:
            raise ConfigurationError(
                f"{self._monitor} explains each image's label, but the probe has none; use target='predicted', or give "
                "the probe its targets"
            )
        return labels if self.target == "label" else None if self.target == "predicted" else int(self.target)

    def maps(self, trace: Trace, targets: Targets) -> tuple[Tensor, Tensor]:
        """The maps (N, H, W) float32 of a pass, and the classes (N,) that they explain."""
        trace = trace.with_targets(targets)
        if isinstance(self.method, Explainer):
            layers = () if self.method.layer is None else (trace.layer(self.layer),)
            maps = self.method.attribute(trace, *layers, **self.options)
        else:
            maps = self.method(trace.model, trace.images, trace.targets, **self.options)
        size = (len(trace.images), *trace.images.shape[-2:])
        if not isinstance(maps, Tensor) or tuple(maps.shape) != size:
            given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ConfigurationError(f"{self.name} gave {given}, expected maps {size}, one for each image")
        return maps.detach().float(), trace.targets  # type: ignore[return-value]

    def outputs(self, trace: Trace, labels: Tensor | None) -> dict[str, Tensor]:
        """``maps`` (N, H, W) and ``logits`` (N, K) float32, and ``explained`` int64 (N,), the classes of the maps."""
        maps, classes = self.maps(trace, self.targets(labels))
        return {"maps": maps, "explained": classes, "logits": trace.logits.detach().float()}

    def _resolve(self, method: Method, methods: Mapping[str, Explainer]) -> Explainer | Callable[..., Tensor]:
        if isinstance(method, str):
            if method not in methods:
                raise ConfigurationError(
                    f"{self._monitor} knows no method {method!r}; it takes {', '.join(map(repr, methods))}, "
                    "an explainer of lightning_interp.explain, or a callable (model, images, targets) -> maps"
                )
            return methods[method]
        if not callable(method):
            raise ConfigurationError(f"method takes a name or a callable, got {method!r}")
        return method
