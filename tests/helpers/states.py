"""Comparison of a model's state before and after, independent of the library's code."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_TORCH_DICTIONARIES = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all state of a model and of the process that an explanation must preserve."""
    state: dict[str, Any] = {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),  # type: ignore[index, union-attr]
        "torch": torch.get_rng_state(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "function modes": torch.overrides._len_torch_function_stack(),
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            # torch's dictionaries (hooks, parameters, submodules) are compared by the identity of their entries.
            state[f"{name}.{key}"] = _Same(list(value.items())) if key in _TORCH_DICTIONARIES else _copied(value)
        for key, buffer in module._buffers.items():
            state[f"{name}.{key} value"] = _copied(buffer)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                state[f"{name}.{key} value"] = _copied(parameter)
                state[f"{name}.{key} version"] = parameter._version
                state[f"{name}.{key} requires_grad"] = parameter.requires_grad
                state[f"{name}.{key} grad"] = _Same([parameter.grad])
                state[f"{name}.{key} grad value"] = _copied(parameter.grad)
                state[f"{name}.{key} hooks"] = _Same(list((parameter._backward_hooks or {}).values()))
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what differs."""
    return sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not _equal(before[name], after[name])
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fail where the model, or the process, differs after the block, which may raise."""
    before = state_of(model)
    try:
        yield
    finally:
        changed = differences(before, state_of(model))
        assert not changed, f"changed: {changed}"


def hook_count(model: nn.Module) -> int:
    """Return the number of forward hooks and forward pre-hooks of all submodules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def assert_same(got: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    """Fail where values differ by more than a share of the largest one, so that maps of tiny numbers count, too."""
    largest = expected.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(got / largest, expected / largest, atol=share, rtol=0)


def unsettle(model: nn.Module) -> None:
    """Set state of every kind: mixed modes, gradients of some parameters, frozen ones, a user's hooks."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 != 1
        if number % 3 == 0 and not module._forward_hooks:  # models are shared, so this is not their first test
            module.register_forward_pre_hook(_observe)
            module.register_forward_hook(_observe)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
        parameter.requires_grad = number % 5 != 3


def _observe(*args: Any) -> None:
    """A hook that changes nothing."""


class _Same(list[Any]):
    """A list that is compared by the identity of its items."""


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, _Same):
        return len(one) == len(other) and all(_is(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool((one == other).all())
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return (
            isinstance(other, list)
            and len(one) == len(other)
            and all(_equal(a, b) for a, b in zip(one, other, strict=True))
        )
    return one is other or bool(one == other)


def _is(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return one[0] == other[0] and _is(one[1], other[1])
    return one is other or (isinstance(one, (int, str, float, bool)) and one == other)
