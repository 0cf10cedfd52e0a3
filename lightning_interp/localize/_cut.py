"""A model up to one of its places, as a module that trains, exports and compiles like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F  # noqa: N812 (the usual name)

from lightning_interp.model.hooks import HookPoint, run_until
from lightning_interp.model.layout import Layout, layout_of, on_grid
from lightning_interp.model.preserve import isolate_rng, preserve_state

__all__ = ["cut"]


def cut(model: nn.Module, images: Tensor, site: HookPoint) -> nn.Module:
    """Keep of a model what comes before a place.

    Three ways, the first that gives the very tensor that passes there: the model's own ``forward_features`` (timm), its
    graph, and running the model until that place is reached, which works for every model but hinders compilers.

    Args:
        model: The model; it is taken apart.
        images: (N, C, H, W) to run it with.
        site: The place.

    Returns:
        A module from images to (N, C, h, w) features, without the parameters that it does not need.
    """
    image_size = (images.shape[2], images.shape[3])
    with preserve_state(model), torch.no_grad():
        wanted = run_until(model, images.clone(), site).clone()
    body = _own_features(model, images, wanted) or _graph(model, images, wanted) or _Until(model, images, site)
    layout = layout_of(wanted, image_size)
    return body if layout == "channels_first" else _OnGrid(body, layout)


class _OnGrid(nn.Module):
    """Tokens, or channels that come last, as (N, C, h, w)."""

    def __init__(self, body: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.body, self.layout = body, layout
        self.training = body.training

    def forward(self, images: Tensor) -> Tensor:
        return on_grid(self.body(images), self.layout, (images.shape[2], images.shape[3]))


class _OwnFeatures(nn.Module):
    """What a model's ``forward_features`` gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return features


class _Until(nn.Module):
    """A model that is run until a place is reached."""

    def __init__(self, model: nn.Module, images: Tensor, site: HookPoint) -> None:
        super().__init__()
        _drop_unused(model, lambda: run_until(model, images.clone(), site))
        self.model, self.site = model, site
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        return run_until(self.model, images, self.site)


def _own_features(model: nn.Module, images: Tensor, wanted: Tensor) -> nn.Module | None:
    forward = getattr(model, "forward_features", None)
    if not callable(forward):
        return None
    with preserve_state(model), torch.no_grad():
        found = forward(images.clone())
    if not _same(found, wanted):
        return None
    _drop_unused(model, lambda: forward(images.clone()))
    return _OwnFeatures(model)


def _same(found: Any, wanted: Tensor) -> bool:
    """Whether two passes came to the same; some GPU kernels add in an order of their own."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def _drop_unused(model: nn.Module, features: Callable[[], Tensor]) -> None:
    """Put identities where no parameter takes part in the features: they would wait for gradients that never come."""
    parameters = list(model.parameters())
    with preserve_state(model):
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
        found = torch.autograd.grad(features().float().sum(), parameters, allow_unused=True)
    used = {id(parameter) for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None}

    def is_unused(module: nn.Module) -> bool:
        own = list(module.parameters())
        return bool(own) and not any(id(parameter) in used for parameter in own)

    def drop(module: nn.Module) -> None:
        for name, child in module.named_children():
            if is_unused(child):
                setattr(module, name, nn.Identity())
            else:
                drop(child)

    drop(model)


# ---- By the model's graph.


def _graph(model: nn.Module, images: Tensor, wanted: Tensor) -> nn.Module | None:
    """The model's graph up to the last node that gives the wanted tensor; None where there is no such graph."""
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        wholes = []
        for training in (False, True):
            model.train(training)
            root = copy.copy(model)  # tracing hangs its constants on the root, with numbers that go on
            with isolate_rng():  # and it runs the model's own code
                wholes.append(fx.GraphModule(root, fx.Tracer().trace(root), type(model).__name__))
        last = _last_equal(model, wholes[0], images, wanted)
        graph = _merged(*(_ended(whole.graph, last) for whole in wholes))
        body = _Graph(wholes[0], graph, type(model).__name__)
    except Exception:  # whatever a model's code does with what is not a tensor
        return None
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    for name, module in body.named_modules():
        module.training = modes.get(name, model.training)
    return body


class _Graph(fx.GraphModule):
    """A graph that is pickled as it is; torch would trace it once more, and differently."""

    def __reduce__(self) -> tuple[Any, ...]:
        nodes = [
            (
                node.op,
                _portable(node.target),
                *map_arg((node.args, node.kwargs), lambda each: _Named(each.name)),
                node.name,
            )
            for node in self.graph.nodes
        ]
        modes = {name: module.training for name, module in self.named_modules()}
        state = {name: value for name, value in self.__dict__.items() if name not in ("_graph", "_code")}
        return _restored, (state, nodes, modes)


class _Named(str):
    """A node, or a function of ``torch.nn.functional``, by its name."""


def _portable(target: Any) -> Any:
    """What a node calls; some functions there are made in others, and have no place to be found again."""
    name = getattr(target, "__name__", "")
    return _Named(name) if callable(target) and getattr(F, name, None) is target else target


def _restored(state: dict[str, Any], nodes: list[Any], modes: dict[str, bool]) -> nn.Module:
    root, graph, made = nn.Module(), fx.Graph(), dict[str, fx.Node]()
    root.__dict__.update(state)
    for op, target, args, kwargs, own in nodes:
        known = map_aggregate((args, kwargs), lambda each: made[each] if isinstance(each, _Named) else each)
        called = getattr(F, target) if isinstance(target, _Named) else target
        made[own] = graph.create_node(op, called, *known, own)
    body = _Graph(root, graph)
    for each, module in body.named_modules():
        module.training = modes[each]
    return body


class _Different(Exception):  # noqa: N818 (caught a few lines away)
    pass


def _merged(evaluating: fx.Graph, training: fx.Graph) -> fx.Graph:
    """One graph for both modes: what differs by True and False alone asks the module's own ``training``."""
    merged = fx.Graph(tracer_cls=evaluating._tracer_cls)
    copied: dict[fx.Node, fx.Node] = {}
    if len(evaluating.nodes) != len(training.nodes):
        raise _Different
    mode: list[fx.Node] = []

    def both(one: Any, other: Any) -> Any:
        if isinstance(one, fx.Node):
            return copied[one]
        if type(one) is not type(other):
            raise _Different
        if isinstance(one, (tuple, list)) and len(one) == len(other):
            return type(one)(both(a, b) for a, b in zip(one, other, strict=True))
        if isinstance(one, dict) and one.keys() == other.keys():
            return {key: both(one[key], other[key]) for key in one}
        if isinstance(one, slice):
            return slice(both(one.start, other.start), both(one.stop, other.stop), both(one.step, other.step))
        if one is False and other is True:
            if not mode:
                first = next(iter(merged.nodes))
                with merged.inserting_before(first):
                    mode.append(merged.get_attr("training"))
            return mode[0]
        if one != other:
            raise _Different
        return one

    for node, twin in zip(evaluating.nodes, training.nodes, strict=True):
        if (node.op, node.target) != (twin.op, twin.target):
            raise _Different
        copied[node] = merged.create_node(
            node.op, node.target, both(node.args, twin.args), both(node.kwargs, twin.kwargs), node.name
        )
    return merged


def _last_equal(model: nn.Module, whole: fx.GraphModule, images: Tensor, wanted: Tensor) -> str:
    """The name of the last node that gives the wanted tensor."""
    found: list[str] = []

    class Finder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if _same(result, wanted) and n.op != "output":
                found.append(n.name)
            return result

    with preserve_state(model), torch.no_grad():
        Finder(whole).run(images.clone())
    return found[-1]


def _ended(graph: fx.Graph, last: str) -> fx.Graph:
    """The graph, with the node of this name as its output."""
    nodes = list(graph.nodes)
    index = [node.name for node in nodes].index(last)
    nodes[-1].args = (nodes[index],)
    for node in reversed(nodes[index + 1 : -1]):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph
