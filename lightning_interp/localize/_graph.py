"""A model's torch.fx graph up to one of its tensors, for training and evaluation mode together.

torchvision's ``create_feature_extractor`` records both modes too, but its module is in training mode after a deep copy,
and keeps one mode's graph when it is pickled. Here the graph itself depends on ``training``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F  # noqa: N812 (the usual name)

from lightning_interp.model.preserve import preserve_state

__all__ = ["graph_until", "is_close"]


def graph_until(model: nn.Module, images: Tensor, expected: Tensor) -> nn.Module | None:
    """Return the model's graph up to the last node that gives a tensor.

    Args:
        model: The model; its modules are used, not copied.
        images: (N, C, H, W) to run it with.
        expected: The tensor, as the model computes it in evaluation mode.

    Returns:
        A module with the modules, parameters and modes that the graph needs; None where the model cannot be traced, its
        modes differ by more than flags, or no node gives the tensor.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    traces = _trace(model)
    last = None if traces is None else _last_equal_node(model, traces[0], images, expected)
    if traces is None or last is None:
        return None
    try:
        graph = _merge(*(_truncate(trace.graph, last) for trace in traces))
    except _GraphsDifferError:
        return None
    body = _GraphModule(traces[0], graph, type(model).__name__)
    for name, module in body.named_modules():
        module.training = modes.get(name, model.training)
    return body


def is_close(features: object, expected: Tensor) -> bool:
    """Whether two passes gave the same tensor; some GPU kernels do not add in a fixed order."""
    if not isinstance(features, Tensor) or features.shape != expected.shape:
        return False
    return bool((features - expected).abs().max() <= 1e-5 * expected.abs().max())


def _trace(model: nn.Module) -> list[fx.GraphModule] | None:
    """The model's graphs in evaluation and in training mode, None where it cannot be traced."""
    traces = []
    with preserve_state(model):
        for training in (False, True):
            for module in model.modules():
                module.training = training
            root = copy.copy(model)  # the tracer registers constants on its root
            try:
                graph = fx.Tracer().trace(root)
            except Exception:  # the model's code is run with proxies for tensors, and may fail in any way
                return None
            traces.append(fx.GraphModule(root, graph, type(model).__name__))
    return traces


def _last_equal_node(model: nn.Module, trace: fx.GraphModule, images: Tensor, expected: Tensor) -> str | None:
    """The name of the last node that gives the expected tensor."""
    names: list[str] = []

    class Comparison(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op != "output" and is_close(result, expected):
                names.append(n.name)
            return result

    with preserve_state(model), torch.no_grad():
        Comparison(trace).run(images.clone())
    return names[-1] if names else None


def _truncate(graph: fx.Graph, last: str) -> fx.Graph:
    """Make the node of this name the graph's output."""
    nodes = list(graph.nodes)
    names = [node.name for node in nodes]
    if last not in names:
        raise _GraphsDifferError
    index = names.index(last)
    nodes[-1].args = (nodes[index],)
    for node in reversed(nodes[index + 1 : -1]):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph


class _GraphsDifferError(Exception):
    """The graphs of the two modes differ by more than flags."""


def _merge(evaluation: fx.Graph, training: fx.Graph) -> fx.Graph:
    """One graph for both modes: arguments that are False in evaluation and True in training become ``training``."""
    if len(evaluation.nodes) != len(training.nodes):
        raise _GraphsDifferError
    merged = fx.Graph(tracer_cls=evaluation._tracer_cls)
    copies: dict[fx.Node, fx.Node] = {}
    training_flag: list[fx.Node] = []

    def merge(one: Any, other: Any) -> Any:
        if isinstance(one, fx.Node):
            return copies[one]
        if type(one) is not type(other):
            raise _GraphsDifferError
        if isinstance(one, (tuple, list)) and len(one) == len(other):
            return type(one)(merge(*pair) for pair in zip(one, other, strict=True))
        if isinstance(one, dict) and one.keys() == other.keys():
            return {key: merge(one[key], other[key]) for key in one}
        if isinstance(one, slice):
            return slice(merge(one.start, other.start), merge(one.stop, other.stop), merge(one.step, other.step))
        if one is False and other is True:
            if not training_flag:
                with merged.inserting_before(next(iter(merged.nodes))):
                    training_flag.append(merged.get_attr("training"))
            return training_flag[0]
        if one != other:
            raise _GraphsDifferError
        return one

    for node, twin in zip(evaluation.nodes, training.nodes, strict=True):
        if (node.op, node.target) != (twin.op, twin.target):
            raise _GraphsDifferError
        args, kwargs = merge(node.args, twin.args), merge(node.kwargs, twin.kwargs)
        copies[node] = merged.create_node(node.op, node.target, args, kwargs, node.name)
    return merged


class _GraphModule(fx.GraphModule):
    """A graph that is pickled node by node; torch would trace it again, which fixes the mode."""

    def __reduce__(self) -> tuple[Any, ...]:
        nodes = [
            (
                node.op,
                _by_name(node.target),
                *map_arg((node.args, node.kwargs), lambda argument: _Name(argument.name)),
                node.name,
            )
            for node in self.graph.nodes
        ]
        modes = {name: module.training for name, module in self.named_modules()}
        state = {name: value for name, value in self.__dict__.items() if name not in ("_graph", "_code")}
        return _unpickle, (state, nodes, modes)


class _Name(str):
    """The name of a node, or of a function of ``torch.nn.functional``."""


def _by_name(target: Any) -> Any:
    """A node's target; functions of ``torch.nn.functional`` by name, since pickle cannot import some of them."""
    name = getattr(target, "__name__", "")
    return _Name(name) if callable(target) and getattr(F, name, None) is target else target


def _unpickle(state: dict[str, Any], nodes: list[Any], modes: dict[str, bool]) -> nn.Module:
    root, graph, by_name = nn.Module(), fx.Graph(), dict[str, fx.Node]()
    root.__dict__.update(state)
    for op, target, args, kwargs, name in nodes:
        arguments = map_aggregate(
            (args, kwargs), lambda argument: by_name[argument] if isinstance(argument, _Name) else argument
        )
        function = getattr(F, target) if isinstance(target, _Name) else target
        by_name[name] = graph.create_node(op, function, *arguments, name)
    body = _GraphModule(root, graph)
    for name, module in body.named_modules():
        module.training = modes[name]
    return body
