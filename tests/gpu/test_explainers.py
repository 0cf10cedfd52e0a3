"""Explainers on the device: the CPU's maps, in deterministic mode too, and nothing left behind."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from lightning_interp import explain
from lightning_interp.explain import Explainer
from tests.helpers.states import unchanged
from tests.helpers.zoo import Animal, animal

EXPLAINERS = [value for name in explain.__all__ if isinstance(value := getattr(explain, name), Explainer)]
# Fewer passes where a method takes many.
FAST: dict[str, Any] = {"n_samples": 2, "n_channels": 3, "n_steps": 3, "n_masks": 4, "patch": 0.5, "stride": 0.25}
RANDOM = {"smoothgrad", "vargrad", "rise"}
RECTIFIERS = {"guided_backprop", "deconvnet", "guided_gradcam"}


def explains(explainer: Explainer, kind: Animal) -> bool:
    if explainer.name == "attention_rollout":
        return kind.attends
    if explainer.name in RECTIFIERS:
        return not kind.attends
    return explainer.name != "cam" or kind.gap


PAIRS = [
    pytest.param(explainer, kind, id=f"{explainer.name}-{kind.name}")
    for explainer in EXPLAINERS
    for kind in map(animal, ("resnet", "vit"))
    if explains(explainer, kind)
]


def maps_of(explainer: Explainer, kind: Animal, model: nn.Module, device: torch.device) -> torch.Tensor:
    options = {name: value for name, value in FAST.items() if name in explainer.options}
    maps = explainer(model, kind.images(3).to(device), torch.tensor([0, 1, 2], device=device), **options)
    assert maps.device.type == device.type
    return maps


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(("explainer", "kind"), PAIRS)
def test_maps_are_the_cpus(explainer: Explainer, kind: Animal, device: torch.device) -> None:
    model = copy.deepcopy(kind.model).to(device)
    with unchanged(model):
        maps = maps_of(explainer, kind, model, device)
    assert maps.isfinite().all()
    assert torch.equal(maps, maps_of(explainer, kind, model, device)) or device.type == "cuda"
    if explainer.name not in RANDOM:
        expected = maps_of(explainer, kind, kind.model, torch.device("cpu"))
        assert float((maps.cpu() - expected).abs().max()) <= 5e-3 * float(expected.abs().max())


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("explainer", "kind"), PAIRS)
def test_explains_in_deterministic_mode(explainer: Explainer, kind: Animal, device: torch.device) -> None:
    model = copy.deepcopy(kind.model).to(device)
    assert torch.equal(maps_of(explainer, kind, model, device), maps_of(explainer, kind, model, device))


@pytest.mark.usefixtures("deterministic")
def test_what_cuda_refuses_is_refused_here(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.histc(torch.rand(8, device=device), 4, 0, 1)
    pooled = nn.functional.adaptive_avg_pool2d(torch.rand(1, 1, 6, 6, device=device, requires_grad=True), 2)
    with pytest.raises(RuntimeError, match="deterministic"):
        pooled.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "explainer", [explain.gradcam, explain.saliency, explain.occlusion], ids=lambda each: each.name
)
def test_explaining_frees_what_it_took(explainer: Explainer) -> None:
    kind, device = animal("resnet"), torch.device("cuda")
    model = copy.deepcopy(kind.model).to(device)
    held = []
    for _ in range(3):  # the first call allocates the libraries' workspaces
        maps_of(explainer, kind, model, device)
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]
