"""Sharded parameters, in a group of one process, and with a group that only pretends to have two."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_interp.model.sharding import full_tensor, is_sharded, local_shard, reset_fsdp_state, reshard


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield DeviceMesh("cpu", [0])
    finally:
        distributed.destroy_process_group()


@pytest.fixture(params=[0, 1], ids=["rank 0", "rank 1"])
def fake_mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """Two processes, of which one is this; nothing is communicated."""
    distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    try:
        yield DeviceMesh("cpu", [0, 1])
    finally:
        distributed.destroy_process_group()


def sharded(mesh: DeviceMesh, values: Tensor) -> DTensor:
    return distribute_tensor(values, mesh, [Shard(0)], src_data_rank=None)


# ---- plain tensors and modules


def test_a_plain_tensor_is_its_own_shard() -> None:
    parameter = nn.Parameter(torch.rand(3, 2))
    full = full_tensor(parameter)
    assert not full.requires_grad
    assert full.data_ptr() == parameter.data_ptr()
    assert local_shard(parameter) is parameter


def test_a_plain_module_is_not_sharded() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert not is_sharded(module)
    reshard(module.modules())
    reset_fsdp_state(module.modules())


def test_plain_modules_import_nothing_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch.distributed.tensor", "torch.distributed.fsdp"):
        monkeypatch.delitem(sys.modules, name)
    module = nn.Linear(2, 2)
    assert not is_sharded(module)
    assert local_shard(module.weight) is module.weight
    assert torch.equal(full_tensor(module.weight), module.weight)
    reshard([module])
    assert not {"torch.distributed.tensor", "torch.distributed.fsdp"} & set(sys.modules)


# ---- distributed tensors


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_the_full_tensor_is_a_plain_one(mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    values = torch.rand(4, 2)
    full = full_tensor(nn.Parameter(distribute_tensor(values, mesh, [placement])))
    assert type(full) is Tensor
    assert not full.requires_grad
    assert torch.equal(full, values)


def test_the_shard_shares_its_memory(mesh: DeviceMesh) -> None:
    parameter = nn.Parameter(sharded(mesh, torch.zeros(4, 2)))
    shard = local_shard(parameter)
    assert type(shard) is Tensor
    assert not shard.requires_grad
    shard.add_(1)
    assert torch.equal(full_tensor(parameter), torch.ones(4, 2))


def test_a_shard_is_a_part_and_may_be_empty(fake_mesh: DeviceMesh) -> None:
    rank = distributed.get_rank()
    values = torch.arange(8.0).view(4, 2)
    assert torch.equal(local_shard(sharded(fake_mesh, values)), values[2 * rank : 2 * rank + 2])
    assert local_shard(sharded(fake_mesh, values[:1])).shape == (1 - rank, 2)


def test_a_distributed_parameter_anywhere_makes_a_module_sharded(fake_mesh: DeviceMesh) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 4)))
    assert not is_sharded(module)
    module[1][0].weight = nn.Parameter(sharded(fake_mesh, module[1][0].weight.detach()))
    assert is_sharded(module)
    assert not is_sharded(module[0])


# ---- FSDP2


class Failing(nn.Linear):
    fails = False

    def forward(self, input: Tensor) -> Tensor:
        if self.fails:
            raise ArithmeticError
        return super().forward(input)


@pytest.fixture
def fsdp_module(mesh: DeviceMesh) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 3), Failing(3, 2))
    for layer in module:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    return fully_shard(module, mesh=mesh, reshard_after_forward=False)


def test_modules_of_fsdp_are_sharded_even_while_gathered(fsdp_module: nn.Sequential) -> None:
    assert is_sharded(fsdp_module)
    fsdp_module(torch.ones(1, 2))
    assert not isinstance(fsdp_module[0].weight, DTensor)  # gathered
    assert is_sharded(fsdp_module)


def test_gathered_parameters_are_resharded(fsdp_module: nn.Sequential) -> None:
    parameters = list(fsdp_module.parameters())
    before = [full_tensor(parameter).clone() for parameter in parameters]
    output = fsdp_module(torch.ones(1, 2))
    reshard(fsdp_module.modules())
    assert all(now is then for now, then in zip(fsdp_module.parameters(), parameters, strict=True))
    assert all(torch.equal(full_tensor(now), then) for now, then in zip(parameters, before, strict=True))
    assert torch.equal(fsdp_module(torch.ones(1, 2)), output)


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="this release of torch has nothing to reset")
def test_a_pass_that_failed_is_reset(fsdp_module: nn.Sequential) -> None:
    images = torch.ones(1, 2)
    expected = fsdp_module(images)
    fsdp_module[1].fails = True
    with pytest.raises(ArithmeticError):
        fsdp_module(images)
    fsdp_module[1].fails = False
    assert not isinstance(fsdp_module[0].weight, DTensor)  # gathered
    reset_fsdp_state(fsdp_module.modules())
    assert all(isinstance(parameter, DTensor) for parameter in fsdp_module.parameters())
    output = fsdp_module(images)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in fsdp_module.parameters())
