"""What stands in the event files afterwards, against numbers found by other means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn

from lightning_interp import NormMonitor, WeightHistogramMonitor, default_monitors
from lightning_interp.sinks import MemorySink
from lightning_interp.sinks.records import Histogram, Scalar
from tests.helpers.runs import Net, dataset, fit, loader, read_events, seed

LAYERS = ["net.0", "net.1", "net.4", "net.9"]
PARAMETERS = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Tensor]]:
    """Two epochs of three steps: the Trainer, its event file, and the untrained weights."""
    folder = tmp_path_factory.mktemp("events")
    seed()
    module = Net()
    untrained = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = fit(default_monitors(probe=3, on_error="raise"), module, logger=TensorBoardLogger(str(folder)))
    return trainer, read_events(trainer.logger.log_dir), untrained


def test_every_tag_is_there_and_no_other(run: Any) -> None:
    _, events, _ = run
    found = events.Tags()
    kinds = ("weight", "gradient", "update_ratio")
    assert set(found["images"]) == {"cam/gradcam", "saliency/saliency", "filters/net.0", *(f"norms/{k}" for k in kinds)}
    assert set(found["histograms"]) == {f"weights/{name}" for name in PARAMETERS}
    norms = {f"norms/{kind}/{layer}" for kind in kinds for layer in (*LAYERS, "total")}
    own = {"loss_step", "loss_epoch", "val_loss", "epoch"}
    assert set(found["scalars"]) == norms | {"weights/not_finite"} | own


def test_pictures_and_curves_stand_at_the_same_x(run: Any) -> None:
    _, events, _ = run
    logged = [event.step for event in events.Scalars("val_loss")]
    assert logged == [event.step for event in events.Scalars("loss_epoch")] == [2, 5]
    for tag in events.Tags()["images"]:
        measured_in_steps = tag in ("norms/gradient", "norms/update_ratio")
        assert [event.step for event in events.Images(tag)] == ([] if measured_in_steps else [0]) + logged, tag
    for tag in events.Tags()["histograms"]:
        assert [event.step for event in events.Histograms(tag)] == [0, *logged], tag
    for kind, first in (("weight", [0]), ("gradient", []), ("update_ratio", [])):
        for layer in (*LAYERS, "total"):
            assert [event.step for event in events.Scalars(f"norms/{kind}/{layer}")] == first + logged


def test_pictures_are_large_enough_to_be_looked_at(run: Any) -> None:
    _, events, _ = run
    for tag, tiles in (("cam/gradcam", 3), ("saliency/saliency", 6), ("filters/net.0", 1), ("norms/weight", 1)):
        for picture in events.Images(tag):
            assert min(picture.width, picture.height) >= 128, tag
            assert picture.width * picture.height >= tiles * 128**2, tag


def test_histograms_hold_the_parameters(run: Any) -> None:
    trainer, events, untrained = run
    for moment, state in ((0, untrained), (-1, trainer.lightning_module.state_dict())):
        for name in PARAMETERS:
            found, values = events.Histograms(f"weights/{name}")[moment].histogram_value, state[name].double()
            assert sum(found.bucket) == found.num == values.numel()
            assert found.sum == pytest.approx(float(values.sum()), rel=1e-5, abs=1e-6)
            assert found.sum_squares == pytest.approx(float(values.square().sum()), rel=1e-5, abs=1e-9)
            if values.unique().numel() > 1:
                assert (found.min, found.max) == pytest.approx((float(values.min()), float(values.max())))
            else:
                assert found.min < float(values[0]) < found.max


def test_weight_norms_are_torchs(run: Any) -> None:
    trainer, events, untrained = run
    for moment, state in ((0, untrained), (-1, trainer.lightning_module.state_dict())):
        whole = []
        for layer in LAYERS:
            flat = torch.cat([state[f"{layer}.{kind}"].flatten() for kind in ("weight", "bias")])
            whole.append(flat)
            assert events.Scalars(f"norms/weight/{layer}")[moment].value == pytest.approx(float(flat.norm()))
        total = events.Scalars("norms/weight/total")[moment].value
        assert total == pytest.approx(float(torch.cat(whole).norm()))


def test_the_layout_puts_all_layers_of_a_kind_into_one_chart(run: Any) -> None:
    _, events, _ = run
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert category.title == "norms/layers"
    assert set(charts) == {"weight", "gradient", "update_ratio", "total"}
    assert len(charts["total"]) == 3


class Witness(Net):
    """A network without random parts that keeps its weights as they are before and after each optimiser step."""

    def __init__(self) -> None:
        super().__init__(plain=True, optimizer="sgd")
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.before.append({name: each.detach().clone() for name, each in self.named_parameters()})

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if len(self.after) < len(self.before):
            self.after.append({name: each.detach().clone() for name, each in self.named_parameters()})


def gradients(weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss over some images, from scratch."""
    module = Witness()
    module.load_state_dict(weights)
    loss = nn.functional.cross_entropy(module.net(images), labels)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def layer(values: dict[str, Tensor], name: str) -> Tensor:
    chosen = [each.flatten() for key, each in values.items() if name == "total" or key.startswith(f"{name}.")]
    return torch.cat(chosen).double()


@pytest.mark.parametrize("clip", [None, 1e-2])
def test_gradients_are_accumulated_and_not_yet_clipped(memory: MemorySink, clip: float | None) -> None:
    images, labels = (each[:16] for each in dataset(16).tensors)
    seed()
    module = Witness()
    fit(
        [NormMonitor(on_error="raise"), WeightHistogramMonitor(gradients=True, on_error="raise")],
        module,
        train=loader(dataset(16)),  # four batches, two steps an epoch
        accumulate_grad_batches=2,
        gradient_clip_val=clip,
        max_epochs=2,
    )
    assert len(module.before) == 4
    for epoch, step in enumerate((1, 3)):
        weights = module.before[2 * epoch + 1]
        whole = gradients(weights, images[8:], labels[8:])
        logged = {r.tag: r for at, r in memory.records if at == step and isinstance(r, (Scalar, Histogram))}
        total = float(layer(whole, "total").norm())
        shrink = 1.0 if clip is None else min(1.0, clip / total)
        assert clip is None or shrink < 0.5, "the clipping has something to do"
        for name in ("net.0", "net.3", "net.7", "total"):
            gradient, weight = float(layer(whole, name).norm()), float(layer(weights, name).norm())
            assert logged[f"norms/gradient/{name}"].value == pytest.approx(gradient, rel=1e-4)
            ratio = 0.1 * shrink * gradient / weight
            assert logged[f"norms/update_ratio/{name}"].value == pytest.approx(ratio, rel=1e-3)
        for name, gradient in whole.items():
            histogram = logged[f"gradients/{name}"]
            assert histogram.count == gradient.numel()
            assert histogram.total == pytest.approx(float(gradient.sum()), rel=1e-3, abs=1e-6)
            assert float(histogram.edges[-1]) == pytest.approx(float(gradient.max()), rel=1e-3, abs=1e-7)


def test_the_last_step_of_an_epoch_may_be_a_shorter_accumulation(memory: MemorySink) -> None:
    images, labels = dataset(12).tensors
    seed()
    module = Witness()
    fit([NormMonitor(on_error="raise")], module, train=loader(dataset(12)), accumulate_grad_batches=2, max_epochs=1)
    whole = gradients(module.before[-1], images[8:], labels[8:])
    found = {record.tag: record.value for step, record in memory.records if step == 1 and isinstance(record, Scalar)}
    # Lightning divides by two even where only one batch came.
    assert found["norms/gradient/total"] == pytest.approx(float(layer(whole, "total").norm()) / 2, rel=1e-4)


@pytest.mark.parametrize("order", [1, 3.0, float("inf")])
def test_norms_of_other_orders(memory: MemorySink, order: float) -> None:
    seed()
    module = Witness()
    fit([NormMonitor(ord=order, on_error="raise")], module, max_epochs=1)
    found = {record.tag: record.value for step, record in memory.records if step == 2 and isinstance(record, Scalar)}
    weights = dict(module.named_parameters())
    for name in ("net.0", "net.7", "total"):
        flat = layer({key: each.detach() for key, each in weights.items()}, name)
        assert found[f"norms/weight/{name}"] == pytest.approx(float(torch.linalg.vector_norm(flat, order)), rel=1e-5)


def test_a_frozen_layer_has_a_weight_but_no_gradient(memory: MemorySink) -> None:
    seed()
    module = Witness()
    module.net[0].requires_grad_(False)
    fit([NormMonitor(on_error="raise")], module, max_epochs=1)
    found = {record.tag: record.value for _, record in memory.records if isinstance(record, Scalar)}
    assert "norms/weight/net.0" in found
    assert "norms/gradient/net.0" not in found
    assert found["norms/gradient/net.7"] > 0


def test_pictures_of_the_first_and_the_last_look_differ(run: Any, tmp_path: Path) -> None:
    _, events, _ = run
    for tag in ("cam/gradcam", "saliency/saliency", "filters/net.0"):
        first, *_, last = events.Images(tag)
        assert first.encoded_image_string != last.encoded_image_string
