"""Save and restore the state of a module: ``with preserve_state(module):``."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_interp.model.sharding import local_shard, reshard

__all__ = ["isolate_rng", "preserve_state"]

_preserved: ContextVar[frozenset[int]] = ContextVar("_preserved", default=frozenset())

# A module's dictionaries: hooks of every kind, and entries that could be rebound.
_DICTIONARIES = {
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
}
# FSDP2 adds hooks to these in its first forward pass, which may run inside, and never again.
_STATE_DICT_HOOKS = frozenset({"_state_dict_pre_hooks", "_load_state_dict_pre_hooks"})


@contextmanager
def preserve_state(module: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Set a module up for inspection, and restore its state afterwards, on success and on error.

    Inside, every submodule is in eval mode, no parameter requires a gradient and ``.grad`` is None, gradients are
    enabled even under ``no_grad`` and ``inference_mode``, compiled code runs eagerly, and ``self.log`` is disabled.
    Restored are each submodule's mode, hooks, entries and attributes; ``requires_grad`` and ``.grad``; buffers; states
    of torchmetrics; the random streams of Python, NumPy, torch and CUDA. Nested contexts for a module that is already
    preserved, or is part of such a module, do nothing.

    Args:
        module: The module that runs inside, with all its submodules.
        parameters: Whether the parameters' values are restored, too, which code of users may change.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
        >>> with preserve_state(model):
        ...     (model.training, model[1].training, model[0].weight.requires_grad)
        (False, False, False)
        >>> (model.training, model[1].training, model[0].weight.requires_grad)
        (True, True, True)
    """
    if id(module) in _preserved.get():  # with all its submodules
        yield
        return
    modules = list(module.modules())
    with ExitStack() as stack:
        reshard(modules)  # to the optimiser's parameters, instead of those that a pass gathered
        token = _preserved.set(_preserved.get() | {id(submodule) for submodule in modules})
        stack.callback(_preserved.reset, token)
        stack.enter_context(isolate_rng())
        for restore in _snapshots(modules, parameters):
            stack.callback(restore)
        stack.callback(reshard, modules)
        # Entered after the callbacks, so that these run in the caller's grad mode.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for submodule in modules:
            # Not .eval(), which users override, and which then may do more than set the flag.
            if submodule.training:
                submodule.training = False
            if hasattr(type(submodule), "log") and hasattr(submodule, "_current_fx_name"):
                _disable_logging(submodule)
        for submodule in modules:
            # Inference tensors, made in validation for example, take part in no graph and cannot be modified in place.
            for name, buffer in submodule._buffers.items():
                if buffer is not None and buffer.is_inference():
                    submodule._buffers[name] = buffer.clone()
        for parameter in _entries(modules, "_parameters"):
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            if parameter.grad is not None:
                parameter.grad = None
        stack.enter_context(_running_eagerly())
        yield


@contextmanager
def isolate_rng() -> Iterator[None]:
    """Restore the global random streams of Python, NumPy, torch and CUDA, on success and on error."""
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


def _entries(modules: list[nn.Module], kind: Literal["_parameters", "_buffers"]) -> list[Any]:
    """Return the entries of all modules; shared ones more than once, which is faster than to remove duplicates."""
    return [entry for module in modules for entry in getattr(module, kind).values() if entry is not None]


def _snapshots(modules: list[nn.Module], parameters: bool) -> Iterator[Callable[[], None]]:
    """Yield functions that restore the state, in the reverse order of their calls."""
    yield _keep_values(_entries(modules, "_parameters") if parameters else [])
    yield _keep_values(_entries(modules, "_buffers"))
    yield _keep_gradients(_entries(modules, "_parameters"))
    for module in modules:
        if _is_metric(module):
            yield _keep_metric(module)  # restored after its attributes, whose tensors it modifies in place
        yield _keep_module(module)


def _keep_module(module: nn.Module) -> Callable[[], None]:
    attributes, training = module.__dict__, module.training  # which is no plain attribute of a scripted module
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    is_sharded = any(local_shard(parameter) is not parameter for parameter in parameters)
    names = _DICTIONARIES - _STATE_DICT_HOOKS if is_sharded else _DICTIONARIES
    # Plain attributes, too: counters, and tensors that a forward pass stores, which would keep its graph alive.
    saved, identities = attributes.copy(), list(map(id, attributes.values()))
    # The views of a scripted module are not dictionaries, and cannot be modified.
    dictionaries: list[Any] = [entry for entry in map(attributes.get, names) if isinstance(entry, (dict, set))]
    empty = [entries for entries in dictionaries if not entries]
    filled = [(entries, entries.copy()) for entries in dictionaries if entries]

    def restore() -> None:
        if module.training is not training:
            module.training = training
        if list(map(id, attributes.values())) != identities or attributes.keys() != saved.keys():
            for name in [name for name in attributes if name not in saved]:
                del attributes[name]
            attributes.update(saved)
        if any(empty):
            for entries in empty:
                entries.clear()
        for entries, before in filled:
            # Compared by identity, as == compares the values of tensors.
            is_changed = list(entries) != list(before) or (
                isinstance(entries, dict) and any(entries[key] is not before[key] for key in before)
            )
            if is_changed:
                entries.clear()
                entries.update(before)

    return restore


def _keep_gradients(parameters: list[nn.Parameter]) -> Callable[[], None]:
    saved = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]

    def restore() -> None:
        for parameter, requires_grad, gradient in saved:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not gradient:
                parameter.grad = gradient

    return restore


@torch.no_grad()
def _keep_values(tensors: list[Any]) -> Callable[[], None]:
    saved = [(tensor, tensor.detach().clone()) for tensor in map(local_shard, tensors) if _has_values(tensor)]

    @torch.no_grad()
    def restore() -> None:
        # Unconditionally, as batch norm updates its statistics without a new version of the tensor. Through .data,
        # which leaves the version, too: the caller's graph may have saved the tensor for its backward pass.
        for tensor, values in saved:
            tensor.data.copy_(values)

    return restore


def _has_values(tensor: Tensor) -> bool:
    """Whether values can be saved: not those of lazy and meta tensors, nor of inference tensors, which are fixed."""
    return not torch.nn.parameter.is_lazy(tensor) and tensor.device.type != "meta" and not tensor.is_inference()


def _is_metric(module: nn.Module) -> bool:
    # Looked up in the loaded modules, so that torchmetrics is not imported for models without metrics.
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(module, (torchmetrics.Metric, torchmetrics.MetricCollection))


def _keep_metric(metric: nn.Module) -> Callable[[], None]:
    """Save a metric's states, counters and caches, which are plain attributes."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if type(value) is dict:
            return {key: copied(item) for key, item in value.items()}
        return [copied(item) for item in value] if isinstance(value, list) else value

    saved = {name: copied(value) for name, value in metric.__dict__.items() if name not in _DICTIONARIES}
    return lambda: metric.__dict__.update(saved)


def _disable_logging(module: nn.Module) -> None:
    """Disable ``self.log`` and ``self.log_dict`` of a LightningModule until its attributes are restored."""
    module.__dict__.update(log=_do_nothing, log_dict=_do_nothing)


def _do_nothing(*args: object, **kwargs: object) -> None:
    return None


@contextmanager
def _running_eagerly() -> Iterator[None]:
    """Run compiled modules eagerly without a recompilation; at no cost where nothing was compiled."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
