from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_interp.model import preserve
from lightning_interp.model.preserve import isolate_rng, preserve_state
from tests.helpers.states import differences, state_of, unchanged, unsettle
from tests.helpers.zoo import Net

ENDINGS = pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])


class Module(pl.LightningModule):
    """State of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.metric = torchmetrics.MeanMetric()
        self.kept = torchmetrics.CatMetric()
        self.both = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.SumMetric()])
        self.logged: list[str] = []
        self.switched = 0
        self.register_buffer("empty", None)
        self.register_buffer("table", torch.arange(3.0))

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.logged.append(name)

    def train(self, mode: bool = True) -> Module:
        self.switched += 1
        return super().train(mode)

    def eval(self) -> Module:
        self.switched += 1
        return super().eval()


@pytest.fixture
def module() -> Module:
    module = Module()
    unsettle(module)
    module.metric.update(torch.tensor(2.0))
    module.kept.update(torch.tensor(2.0))
    module.net.register_forward_hook(lambda *_: None)
    return module


def nothing(module: Module) -> None:
    pass


def draw(module: Module) -> None:
    random.random(), np.random.rand(), torch.rand(1)


def reseed(module: Module) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


def change_modes(module: Module) -> None:
    nn.Module.train(module)
    module.net.first.training = False


def change_buffers_in_place(module: Module) -> None:
    module.table.add_(1)
    module.net.first[1].running_mean.fill_(7)
    module.net.first[1].num_batches_tracked += 1


def rebind_buffers(module: Module) -> None:
    module.table.mul_(2)  # in place, and then rebound
    module.table = torch.zeros(5)
    module.empty = torch.ones(1)
    module.register_buffer("another", torch.ones(1))


def run_in_training_mode(module: Module) -> None:
    module.net.train()
    module.net(torch.rand(4, 3, 9, 9))


def leave_hooks(module: Module) -> None:
    layer = module.net.second
    layer.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    layer.register_forward_pre_hook(lambda *_: None, with_kwargs=True, prepend=True)
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_full_backward_pre_hook(lambda *_: None)
    layer.register_state_dict_post_hook(lambda *_: None)
    layer.register_state_dict_pre_hook(lambda *_: None)
    layer.register_load_state_dict_pre_hook(lambda *_: None)
    layer.register_load_state_dict_post_hook(lambda *_: None)


def take_hooks_away(module: Module) -> None:
    module.net._forward_hooks.clear()


def change_gradients(module: Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    module.net(torch.rand(4, 3, 9, 9)).sum().backward()


def swap_modules(module: Module) -> None:
    module.net.head = nn.Linear(8, 2)
    module.net.second[0] = nn.Identity()
    module.extra = nn.Linear(1, 1)


def swap_parameters(module: Module) -> None:
    module.net.head.weight = nn.Parameter(torch.zeros(2, 8))
    module.net.head.bias = None


def update_metrics(module: Module) -> None:
    module.metric.update(torch.tensor(5.0))
    module.metric(torch.tensor(6.0))
    module.metric.compute()
    module.kept.update(torch.tensor(5.0))
    module.kept.value.append(torch.ones(1))
    module.both.update(torch.tensor(5.0))
    module.both.compute()


def reset_metrics(module: Module) -> None:
    module.metric.reset()
    module.kept.reset()


def log(module: Module) -> None:
    module.log("loud", 1)
    module.log_dict({"louder": 1})


def stash(module: Module) -> None:
    module.net.stashed = torch.rand(2, requires_grad=True)
    module.switched += 1
    del module.logged


def switch_grad_mode(module: Module) -> None:
    torch.set_grad_enabled(False)


DISTURBANCES: list[Callable[[Module], None]] = [
    nothing,
    draw,
    reseed,
    change_modes,
    change_buffers_in_place,
    rebind_buffers,
    run_in_training_mode,
    leave_hooks,
    take_hooks_away,
    change_gradients,
    swap_modules,
    swap_parameters,
    update_metrics,
    reset_metrics,
    log,
    stash,
    switch_grad_mode,
]
over_disturbances = pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda disturb: disturb.__name__)


@ENDINGS
@over_disturbances
def test_everything_is_put_back(module: Module, disturb: Callable[[Module], None], fails: bool) -> None:
    class Expected(Exception):
        pass

    with unchanged(module), suppress(Expected), preserve_state(module):
        disturb(module)
        if fails:
            raise Expected
    assert module.metric.compute() == 2
    assert module.kept.compute() == 2


@over_disturbances
def test_the_check_detects_every_disturbance(module: Module, disturb: Callable[[Module], None]) -> None:
    before = state_of(module)
    with isolate_rng() if disturb not in (draw, reseed) else nullcontext():
        disturb(module)
    changed = differences(before, state_of(module))
    torch.set_grad_enabled(True)
    assert bool(changed) is (disturb is not nothing)


@pytest.mark.parametrize(
    ("broken", "disturb"),
    [
        ("_keep_module", change_modes),
        ("_keep_module", leave_hooks),
        ("_keep_module", swap_modules),
        ("_keep_values", change_buffers_in_place),
        ("_keep_gradients", change_gradients),
        ("_keep_metric", update_metrics),
        ("isolate_rng", draw),
    ],
)
def test_the_check_fails_where_a_restore_is_broken(
    module: Module, broken: str, disturb: Callable[[Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preserve, broken, nullcontext if broken == "isolate_rng" else lambda _: lambda: None)
    with pytest.raises(AssertionError, match="changed"), unchanged(module), preserve_state(module):
        disturb(module)


@ENDINGS
def test_parameters_are_put_back_where_asked(module: Module, fails: bool) -> None:
    weight = module.net.head.weight
    values, gradient = weight.detach().clone(), weight.grad
    with suppress(ArithmeticError), preserve_state(module, parameters=True), torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3).data.add_(1)
        module.net.head.weight = nn.Parameter(torch.zeros(1))
        if fails:
            raise ArithmeticError
    assert module.net.head.weight is weight
    assert torch.equal(weight, values)
    assert weight.grad is gradient


def test_modes_gradients_and_logging_inside(module: Module) -> None:
    switched, logged = module.switched, list(module.logged)
    with torch.inference_mode(), preserve_state(module):
        assert not any(submodule.training for submodule in module.modules())
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in module.parameters())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        log(module)
    assert (module.switched, module.logged) == (switched, logged)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_grad_mode_comes_back(module: Module, mode: type) -> None:
    with mode():
        with unchanged(module), preserve_state(module):
            change_buffers_in_place(module)
        assert torch.is_inference_mode_enabled() is (mode is torch.inference_mode)


def test_accumulated_gradients_survive_and_go_on(module: Module) -> None:
    twin = Net()
    twin.load_state_dict(module.net.state_dict())
    images = torch.rand(4, 3, 9, 9)
    for net, is_preserved in ((module.net, True), (twin, False)):
        net.train().zero_grad()
        for parameter in net.parameters():
            parameter.requires_grad_()
        for _ in range(2):
            torch.manual_seed(0)
            net(images).sum().backward()
            if is_preserved:
                with preserve_state(module):
                    change_gradients(module)
    for (name, one), other in zip(module.net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_a_graph_that_waits_for_its_backward_pass_still_runs(module: Module) -> None:
    net = module.net.train()
    net.first[1].eval()  # a frozen norm saves its buffers for the backward pass
    for parameter in net.parameters():
        parameter.requires_grad_()
    loss = net(torch.rand(4, 3, 9, 9)).sum()
    with preserve_state(module, parameters=True):
        net(torch.rand(4, 3, 9, 9))
    loss.backward()
    assert net.head.weight.grad is not None


def test_entering_again_does_nothing(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots: list[nn.Module] = []
    real = preserve._snapshots

    def counted(modules: list[nn.Module], *rest: Any) -> Any:
        snapshots.append(modules[0])
        return real(modules, *rest)

    monkeypatch.setattr(preserve, "_snapshots", counted)
    with unchanged(module), preserve_state(module):
        with preserve_state(module.net), preserve_state(module):
            module.table.add_(1)
        assert module.table[0] == 1  # the outermost one restores
        assert not module.training
        other = Net()
        with preserve_state(other):
            assert not other.training
        assert other.training
    assert snapshots == [module, other]
    with preserve_state(module.net):
        pass
    assert snapshots[2:] == [module.net]


def test_a_larger_module_is_preserved_inside_a_smaller_one(module: Module) -> None:
    with unchanged(module), preserve_state(module.net):
        with preserve_state(module):
            assert not module.training
            module.table.add_(1)
        assert module.table[0] == 0
        assert not module.net.training


def test_buffers_of_inference_mode_are_ordinary_inside(module: Module) -> None:
    with torch.inference_mode():
        module.table = torch.arange(3.0)
    with unchanged(module), preserve_state(module):
        module.table.add_(1)
        (module.table * torch.ones(3, requires_grad=True)).sum().backward()
    assert module.table.is_inference()


def test_tied_weights_and_shared_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.append(model[1])
    model[2].weight = model[0].weight
    unsettle(model)
    with unchanged(model), preserve_state(model):
        model.train()
        model(torch.rand(3, 4))


def test_lazy_and_meta_modules() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Dropout())
    with pytest.raises(ValueError, match="uninitialized parameter"), preserve_state(lazy):
        pass
    assert all(submodule.training for submodule in lazy.modules())
    with torch.device("meta"):
        model = Net()
    with preserve_state(model):
        assert not model.training
    assert model.training


def test_streams_come_back_on_errors_too() -> None:
    with unchanged(nn.Identity()), suppress(ArithmeticError), isolate_rng():
        draw(None)  # type: ignore[arg-type]
        raise ArithmeticError


def test_metrics_cost_no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchmetrics")
    with preserve_state(Net()):
        pass
    assert "torchmetrics" not in sys.modules


def test_hooks_that_run_inside_still_run(module: Module) -> None:
    outputs: list[Tensor] = []
    module.net.register_forward_hook(lambda module, args, output: outputs.append(output))
    with preserve_state(module):
        module.net(torch.rand(2, 3, 9, 9))
    assert len(outputs) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_part_keeps_its_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.BatchNorm2d(4)))
    before = model[1].running_mean.clone()
    with unchanged(model[0]), preserve_state(model):
        assert not model[1].training
        model(torch.rand(2, 3, 8, 8))
    assert model[1].training
    assert torch.equal(model[1].running_mean, before)
