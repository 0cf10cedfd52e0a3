"""Random streams and gradients of a device, as preserve_state leaves them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_interp import Probe, explain
from lightning_interp.model.preserve import isolate_rng, preserve_state
from tests.helpers.zoo import animal


def streams() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def same(before: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(before, streams(), strict=True))


def draw(device: torch.device) -> Tensor:
    return torch.rand(4, device=device)


def test_streams_are_put_back(device: torch.device) -> None:
    draw(device)
    before = streams()
    with isolate_rng():
        first = draw(device)
    assert same(before)
    assert torch.equal(draw(device), first)
    assert not same(before)


def test_streams_are_put_back_on_errors(device: torch.device) -> None:
    model = copy.deepcopy(animal("plain").model).to(device)
    draw(device)
    before = streams()

    def draw_and_fail() -> None:
        with preserve_state(model):
            draw(device)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert same(before)


@pytest.mark.parametrize("name", ["smoothgrad", "vargrad", "rise"])
def test_random_explainers_leave_the_streams(name: str, device: torch.device) -> None:
    kind = animal("plain")
    model = copy.deepcopy(kind.model).to(device)
    draw(device)
    before = streams()
    options = {"n_masks": 4} if name == "rise" else {"n_samples": 2}
    getattr(explain, name)(model, kind.images().to(device), **options)
    assert same(before)


def test_gradients_and_parameters_stay_the_same_tensors(device: torch.device) -> None:
    kind = animal("plain")
    model = copy.deepcopy(kind.model).to(device)
    images = kind.images().to(device)
    model(images).sum().backward()
    before = {name: (parameter.data_ptr(), parameter.grad) for name, parameter in model.named_parameters()}
    explain.gradcam(model, images)
    for name, parameter in model.named_parameters():
        pointer, gradient = before[name]
        assert parameter.data_ptr() == pointer
        assert parameter.grad is gradient


def test_a_probe_leaves_the_streams_and_is_on_the_cpu(device: torch.device) -> None:
    draw(device)
    images, before = torch.rand(8, 3, 6, 6), streams()
    first, second = (
        Probe.from_dataset(
            TensorDataset(images, torch.arange(8) % 4),
            transfer=lambda batch: [batch[0].to(device) + draw(device)[0], batch[1].to(device)],
        )
        for _ in range(2)
    )
    assert same(before)
    assert torch.equal(first.images, second.images)
    assert first.images.device.type == "cpu"
