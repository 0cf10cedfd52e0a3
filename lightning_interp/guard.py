"""The only place that saves and restores state: ``with undisturbed(module):``."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["preserved_streams", "undisturbed"]

_guarded: ContextVar[frozenset[int]] = ContextVar("_guarded", default=frozenset())

# What a module keeps in dictionaries: hooks of every kind, and the entries that could be rebound.
_DICTIONARIES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@contextmanager
def undisturbed(module: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Explain a module inside, and find it afterwards as it was, on success and on error.

    Inside, every submodule is in eval mode, no parameter requires a gradient and ``.grad`` is empty, gradients
    are enabled even under ``no_grad`` and ``inference_mode``, compiled code runs eagerly, and ``self.log`` is
    mute. Afterwards, these are what they were: each submodule's own mode, hooks and entries; ``requires_grad``
    and ``.grad``; buffers; states of torchmetrics; the random streams of Python, NumPy, torch and CUDA.
    Entering it again for a module that is already guarded costs nothing and does nothing.

    Args:
        module: The module that will be run, with all its submodules.
        parameters: Also keep a copy of the parameters' values: for code that is not ours.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
        >>> with undisturbed(model):
        ...     (model.training, model[1].training, model[0].weight.requires_grad)
        (False, False, False)
        >>> (model.training, model[1].training, model[0].weight.requires_grad)
        (True, True, True)
    """
    modules = list(module.modules())
    if _guarded.get().issuperset(map(id, modules)):
        yield
        return
    with ExitStack() as stack:
        # Enter the contexts first: what is restored below must be restored under the caller's own grad mode.
        token = _guarded.set(_guarded.get() | {id(each) for each in modules})
        stack.callback(_guarded.reset, token)
        stack.enter_context(preserved_streams())
        for restore in _snapshots(module, modules, parameters):
            stack.callback(restore)
        for each in modules:
            # Not .eval(): users override train() and eval(), and those may do more than set the flag.
            each.training = False
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            if parameter.grad is not None:
                parameter.grad = None
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_running_eagerly())
        yield


@contextmanager
def preserved_streams() -> Iterator[None]:
    """Give the global random streams of Python, NumPy, torch and CUDA back as they were, on errors too."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _snapshots(module: nn.Module, modules: list[nn.Module], parameters: bool) -> Iterator[Callable[[], None]]:
    """What puts each kind of state back."""
    yield _keep_values(list(module.parameters()) if parameters else [])
    yield _keep_values(list(module.buffers()))
    yield _keep_gradients(list(module.parameters()))
    for each in modules:
        yield _keep_module(each)
        if _is_metric(each):
            yield _keep_metric(each)
        if callable(getattr(each, "log", None)) and hasattr(each, "_current_fx_name"):
            yield _mute(each)


def _keep_module(module: nn.Module) -> Callable[[], None]:
    mode = module.training
    kept = {name: value.copy() for name in _DICTIONARIES if (value := module.__dict__.get(name)) is not None}

    def restore() -> None:
        module.training = mode
        for name, before in kept.items():
            now = module.__dict__[name]
            # Compared by identity of the entries: comparing tensors would compare their values.
            if list(now) != list(before) or (
                isinstance(before, dict) and any(now[key] is not before[key] for key in before)
            ):
                now.clear()
                now.update(before)

    return restore


def _keep_gradients(parameters: list[nn.Parameter]) -> Callable[[], None]:
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]

    def restore() -> None:
        for parameter, requires_grad, gradient in kept:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not gradient:
                parameter.grad = gradient

    return restore


@torch.no_grad()
def _keep_values(tensors: list[Any]) -> Callable[[], None]:
    kept = [(tensor, tensor.detach().clone(), _version(tensor)) for tensor in tensors if _has_values(tensor)]

    @torch.no_grad()
    def restore() -> None:
        for tensor, values, version in kept:
            if version is None or _version(tensor) != version:
                tensor.copy_(values)

    return restore


def _has_values(tensor: Tensor) -> bool:
    """Lazy and meta tensors have nothing to keep."""
    return not torch.nn.parameter.is_lazy(tensor) and tensor.device.type != "meta"


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_metric(module: nn.Module) -> bool:
    # Asked of the loaded modules, so that explaining a model without metrics never imports torchmetrics.
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(module, torchmetrics.Metric)


def _keep_metric(metric: Any) -> Callable[[], None]:
    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        return [copied(each) for each in value] if isinstance(value, list) else value

    states = {name: copied(getattr(metric, name)) for name in metric._defaults}
    counters = {
        name: metric.__dict__[name] for name in ("_update_count", "_computed", "_cache") if name in metric.__dict__
    }

    def restore() -> None:
        metric.__dict__.update(counters)
        for name, value in states.items():
            setattr(metric, name, value)

    return restore


def _mute(module: nn.Module) -> Callable[[], None]:
    """Make ``self.log`` and ``self.log_dict`` of a LightningModule say nothing."""
    names = ("log", "log_dict")
    kept = {name: module.__dict__[name] for name in names if name in module.__dict__}
    for name in names:
        module.__dict__[name] = _say_nothing

    def restore() -> None:
        for name in names:
            module.__dict__.pop(name, None)
        module.__dict__.update(kept)

    return restore


def _say_nothing(*args: object, **kwargs: object) -> None:
    return None


@contextmanager
def _running_eagerly() -> Iterator[None]:
    """Run compiled modules eagerly without a recompilation; free of charge where nothing was ever compiled."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
