"""The occlusion monitor, and every method by its name in the monitors that take methods."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lightning_interp import CAMMonitor, ConfigurationError, OcclusionMonitor, Probe, SaliencyMonitor, explain
from lightning_interp.callbacks import ProbeMonitor
from lightning_interp.callbacks.monitors import occlusion as occlusion_module
from lightning_interp.model.trace import Trace
from lightning_interp.sinks import MemorySink
from lightning_interp.sinks.records import Picture
from tests.helpers.runs import Net, fit

SLOW: dict[str, dict[str, Any]] = {
    "smoothgrad": {"n_samples": 2},
    "vargrad": {"n_samples": 2},
    "integrated_gradients": {"n_steps": 2},
    "rise": {"n_masks": 4},
}
MAGENTA = torch.tensor([255, 0, 200], dtype=torch.uint8)


class Corner(nn.Module):
    """Class 1 is what shines in the upper right corner."""

    def forward(self, images: Tensor) -> Tensor:
        score = images[:, :, 2:6, 14:18].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score, score - 5], 1)


class Places(nn.Module):
    """Class 0 is what shines low on the left, class 1 what shines high up on the right."""

    def forward(self, images: Tensor) -> Tensor:
        places = [images[:, :, 14:18, 2:6], images[:, :, 2:6, 24:28]]
        return torch.stack([place.mean((1, 2, 3)) for place in places], 1)


def pictures(memory: MemorySink, tag: str) -> list[Picture]:
    return [record for _, record in memory.records if isinstance(record, Picture) and record.tag == tag]


def monitored(**options: Any) -> tuple[OcclusionMonitor, Probe]:
    images = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    return OcclusionMonitor(on_error="raise", **options), Probe(images + 0.5, [1, 0])


def test_marks_the_patch_that_the_class_cannot_do_without() -> None:
    monitor, probe = monitored(patch=4, stride=2, fill=0.0, target=1)
    drops = explain.occlusion(Corner(), probe.images, 1, patch=4, stride=2, fill=0.0, returns="drop")
    seen = {"drops": drops, "explained": torch.ones(2, dtype=torch.int64), "logits": Corner()(probe.images)}
    (picture,) = monitor.draw(seen, probe)
    assert picture.tag == "occlusion/occlusion"
    marked = (picture.image == MAGENTA).all(2).nonzero()
    width = picture.image.shape[1]
    assert len(marked) > 20
    # Two tiles beside each other, each a map and an image: the patch lies to the right in its image, and high up.
    assert (marked[:, 1] > width * 0.3).all()
    heat = explain.perturbation.spread(drops, explain.perturbation.patch_boxes((20, 20), 4, 2), (20, 20))
    torch.testing.assert_close(heat, explain.occlusion(Corner(), probe.images, 1, patch=4, stride=2, fill=0.0))


@pytest.mark.parametrize(
    ("target", "box"), [(1, [24, 2, 28, 6]), ("label", [2, 14, 6, 18]), ("predicted", [24, 2, 28, 6])]
)
def test_the_heat_and_the_mark_stand_where_the_class_is(
    target: str | int, box: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    marks, heats = Mock(wraps=occlusion_module.draw_boxes), Mock(wraps=occlusion_module.overlay)
    monkeypatch.setattr(occlusion_module, "draw_boxes", marks)
    monkeypatch.setattr(occlusion_module, "overlay", heats)
    images = torch.rand(1, 3, 20, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    images[:, :, 2:6, 24:28] += 1  # class 1 is predicted, class 0 is the label
    monitor = OcclusionMonitor(patch=4, stride=2, fill=0.0, target=target, on_error="raise")
    with Trace.record(Places(), images) as trace:
        seen = monitor.outputs(trace, torch.tensor([0]))
    assert len(list(monitor.draw(seen, Probe(images, [0])))) == 1
    enlarged, (boxes,), _ = marks.call_args.args
    assert boxes.flatten().tolist() == [side * enlarged.shape[1] / 20 for side in box]
    heat, (left, top, right, bottom) = heats.call_args.args[1][0], box
    assert heat.max() == 1
    within = torch.zeros_like(heat, dtype=torch.bool)
    within[top:bottom, left:right] = True
    assert heat[within].min() > heat[~within].max()


def test_looks_during_training(memory: MemorySink) -> None:
    fit([OcclusionMonitor(patch=0.5, stride=0.25, probe=3, on_error="raise")])
    assert len(pictures(memory, "occlusion/occlusion")) == 3  # before the two epochs, and after each


@pytest.mark.parametrize("kind", [CAMMonitor, SaliencyMonitor], ids=lambda kind: kind.__name__)
def test_every_method_is_known_by_its_name(kind: type[ProbeMonitor], memory: MemorySink) -> None:
    names = [name for name in kind.methods if name != "attention_rollout"]
    monitors = [
        kind(method=name, method_options=SLOW.get(name), probe=2, on_error="raise")  # type: ignore[call-arg]
        for name in names
    ]
    fit(monitors, max_epochs=1)
    for name in names:
        assert len(pictures(memory, f"{kind.kind}/{name}")) == 2


def test_transformers_show_their_attention(memory: MemorySink) -> None:
    vit = VisionTransformer(
        image_size=12, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3
    )
    fit([CAMMonitor(method="attention_rollout", probe=2, on_error="raise")], Net(net=vit), max_epochs=1)
    assert len(pictures(memory, "cam/attention_rollout")) == 2


@pytest.mark.parametrize(("method", "expected"), [("rise", "min_max"), ("gradcam", "relu")])
def test_maps_without_a_zero_are_shown_from_their_minimum(
    method: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = Mock(wraps=explain.normalize_maps)
    monkeypatch.setattr(explain, "normalize_maps", scaled)
    fit([CAMMonitor(method=method, method_options=SLOW.get(method), probe=2, on_error="raise")], max_epochs=1)
    assert [call.args[1] for call in scaled.call_args_list] == [expected] * 2


def test_every_explainer_has_a_monitor() -> None:
    known = {*CAMMonitor.methods, *SaliencyMonitor.methods}
    assert known == set(explain.explainers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 0}, "patch takes pixels"),
        ({"patch": 1.5}, "patch takes pixels"),
        ({"stride": 0.3}, "stride takes at most the patch"),
        ({"fill": "mean"}, "fill takes a number or None, got 'mean'"),
        ({"alpha": 2}, "alpha takes a number from 0 to 1"),
        ({"cmap": "jett"}, "jet"),
        ({"target": "labels"}, "target takes"),
    ],
)
def test_wrong_arguments_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        OcclusionMonitor(**options)
