"""The only place that saves and restores state: ``with preserve_state(module):``."""

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

_guarded: ContextVar[frozenset[int]] = ContextVar("_guarded", default=frozenset())

# What a module keeps in dictionaries: hooks of every kind, and the entries that could be rebound.
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
# FSDP2 adds its own to these at its first forward pass, which may be ours, and never again.
_STATE_DICT_HOOKS = frozenset({"_state_dict_pre_hooks", "_load_state_dict_pre_hooks"})


@contextmanager
def preserve_state(module: nn.Module, *, parameters: bool = False) -> Iterator[None]:
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
        >>> with preserve_state(model):
        ...     (model.training, model[1].training, model[0].weight.requires_grad)
        (False, False, False)
        >>> (model.training, model[1].training, model[0].weight.requires_grad)
        (True, True, True)
    """
    if id(module) in _guarded.get():  # and with it all that it holds
        yield
        return
    modules = list(module.modules())
    with ExitStack() as stack:
        reshard(modules)  # the parameters that an optimiser knows, not those that a pass gathered
        # Enter the contexts first: what is restored below must be restored under the caller's own grad mode.
        token = _guarded.set(_guarded.get() | {id(each) for each in modules})
        stack.callback(_guarded.reset, token)
        stack.enter_context(isolate_rng())
        for restore in _snapshots(modules, parameters):
            stack.callback(restore)
        stack.callback(reshard, modules)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for each in modules:
            # Not .eval(): users override train() and eval(), and those may do more than set the flag.
            if each.training:
                each.training = False
            if hasattr(type(each), "log") and hasattr(each, "_current_fx_name"):
                _mute(each)
        for each in modules:
            # Made in validation, say: no gradient passes through such a tensor, and none may be changed in place.
            for name, buffer in each._buffers.items():
                if buffer is not None and buffer.is_inference():
                    each._buffers[name] = buffer.clone()
        for parameter in _held(modules, "_parameters"):
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            if parameter.grad is not None:
                parameter.grad = None
        stack.enter_context(_running_eagerly())
        yield


@contextmanager
def isolate_rng() -> Iterator[None]:
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


def _held(modules: list[nn.Module], kind: Literal["_parameters", "_buffers"]) -> list[Any]:
    """What modules hold themselves, each as often as it is held; quicker than to look for doubles."""
    return [each for module in modules for each in getattr(module, kind).values() if each is not None]


def _snapshots(modules: list[nn.Module], parameters: bool) -> Iterator[Callable[[], None]]:
    """What puts each kind of state back."""
    yield _keep_values(_held(modules, "_parameters") if parameters else [])
    yield _keep_values(_held(modules, "_buffers"))
    yield _keep_gradients(_held(modules, "_parameters"))
    for each in modules:
        if _is_metric(each):
            yield _keep_metric(each)  # put back after the module's attributes, whose tensors it may change in place
        yield _keep_module(each)


def _keep_module(module: nn.Module) -> Callable[[], None]:
    own, training = module.__dict__, module.training  # which is no plain attribute of a scripted module
    sharded = any(each is not None and local_shard(each) is not each for each in module._parameters.values())
    names = _DICTIONARIES - _STATE_DICT_HOOKS if sharded else _DICTIONARIES
    # Plain attributes, too: the mode, counters, and what a forward pass stashes, which would keep its graph alive.
    attributes, identities = own.copy(), list(map(id, own.values()))
    # A scripted module shows views of what it keeps, which nothing can be taken out of.
    dictionaries: list[Any] = [each for each in map(own.get, names) if isinstance(each, (dict, set))]
    empty = [each for each in dictionaries if not each]
    full = [(each, each.copy()) for each in dictionaries if each]

    def restore() -> None:
        if module.training is not training:
            module.training = training
        if list(map(id, own.values())) != identities or own.keys() != attributes.keys():
            for name in [each for each in own if each not in attributes]:
                del own[name]
            own.update(attributes)
        if any(empty):
            for now in empty:
                now.clear()
        for now, before in full:
            # Compared by identity of the entries: comparing tensors would compare their values.
            if list(now) != list(before) or any(now[key] is not before[key] for key in before if isinstance(now, dict)):
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
    kept = [(tensor, tensor.detach().clone()) for tensor in map(local_shard, tensors) if _has_values(tensor)]

    @torch.no_grad()
    def restore() -> None:
        # Always: batch norm changes its statistics without counting a version. And through .data, which counts none
        # either: a graph that waits for its backward pass may have saved the tensor.
        for tensor, values in kept:
            tensor.data.copy_(values)

    return restore


def _has_values(tensor: Tensor) -> bool:
    """Lazy and meta tensors have nothing to keep; those made in inference mode cannot be changed in place."""
    return not torch.nn.parameter.is_lazy(tensor) and tensor.device.type != "meta" and not tensor.is_inference()


def _is_metric(module: nn.Module) -> bool:
    # Asked of the loaded modules, so that explaining a model without metrics never imports torchmetrics.
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(module, (torchmetrics.Metric, torchmetrics.MetricCollection))


def _keep_metric(metric: nn.Module) -> Callable[[], None]:
    """Its states, counters and caches are plain attributes."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if type(value) is dict:
            return {key: copied(each) for key, each in value.items()}
        return [copied(each) for each in value] if isinstance(value, list) else value

    kept = {name: copied(value) for name, value in metric.__dict__.items() if name not in _DICTIONARIES}
    return lambda: metric.__dict__.update(kept)


def _mute(module: nn.Module) -> None:
    """Make ``self.log`` and ``self.log_dict`` of a LightningModule say nothing, until its attributes are put back."""
    module.__dict__.update(log=_say_nothing, log_dict=_say_nothing)


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
