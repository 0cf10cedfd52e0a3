"""Models, batches, stages and precisions that people really have."""

from __future__ import annotations

import copy
import importlib
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_interp import CAMMonitor, FilterMonitor, NormMonitor, Probe, SaliencyMonitor, default_monitors
from lightning_interp.callbacks import Monitor
from lightning_interp.render import filter_grid
from lightning_interp.sinks import MemorySink
from lightning_interp.sinks.records import Picture, Scalar
from tests.helpers.runs import (
    Items,
    Net,
    Stream,
    body,
    dataset,
    fit,
    for_flavour,
    loader,
    make_trainer,
    seed,
    steps,
    tags,
    tensors,
)

PICTURES = ["cam/gradcam", "saliency/saliency", "filters/net.0", "norms/weight"]


class Witness:
    """An explanation that keeps what it was asked to explain."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def __call__(self, model: Any, images: Tensor, targets: Tensor) -> Tensor:
        self.images.append(images.clone())
        return images.float().mean(1)


def monitors(**options: Any) -> list[Monitor]:
    return default_monitors(**({"probe": 2, "on_error": "raise"} | options))


def check(memory: MemorySink, expected: tuple[int, ...] = (0, 2)) -> None:
    for tag in PICTURES:
        assert steps(memory, tag) == list(expected), tag


# ---- Validation.


@pytest.mark.parametrize(
    "options", [{"val": None}, {"limit_val_batches": 0}, {"val": [loader(dataset(8)), loader(dataset(4))]}]
)
def test_with_and_without_validation(memory: MemorySink, options: dict[str, Any]) -> None:
    module = Net()
    if isinstance(options.get("val"), list):
        module.validation_step = lambda batch, batch_idx, dataloader_idx=0: None  # type: ignore[method-assign]
    fit(monitors(), module, max_epochs=1, **options)
    check(memory)


# ---- Batches.


class Sample(NamedTuple):
    image: Tensor
    label: Tensor


def as_tuple(image: Tensor, label: Tensor) -> Any:
    return image, label


def as_dict(image: Tensor, label: Tensor) -> Any:
    return {"name": "x", "image": image, "label": label}


def as_named(image: Tensor, label: Tensor) -> Any:
    return Sample(image, label)


def as_nested(image: Tensor, label: Tensor) -> Any:
    return {"meta": {"id": label}, "views": {"front": image}}


def front(batch: Any) -> Any:
    return batch["views"]["front"], batch["meta"]["id"]


@pytest.mark.parametrize(
    ("make", "read", "unpack"),
    [
        (as_tuple, lambda batch: tuple(batch), None),
        (as_dict, lambda batch: (batch["image"], batch["label"]), None),
        (as_named, lambda batch: (batch.image, batch.label), None),
        (as_nested, front, front),
    ],
)
def test_batches_of_many_forms(memory: MemorySink, make: Any, read: Any, unpack: Any) -> None:
    module = Net()
    module.read = read  # type: ignore[method-assign]
    data = loader(Items(make))
    fit(monitors(unpack=unpack), module, train=data, val=data)
    check(memory, (0, 2, 5))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_of_any_number_of_channels(memory: MemorySink, channels: int) -> None:
    data = loader(dataset(12, channels))
    fit(monitors(), Net(channels), train=data, val=data, max_epochs=1)
    check(memory)


def test_an_iterable_data_set_loses_no_batch(memory: MemorySink) -> None:
    train, val = Stream(12), Stream(8)
    module = Net()
    order: list[tuple[str, int]] = []
    witness = Witness()
    spy = pl.Callback()
    spy.on_before_zero_grad = lambda *args: order.append(("trained", len(witness.images)))  # type: ignore[method-assign]
    all_of_them = [*monitors(), CAMMonitor(method=witness, probe=2, name="seen", on_error="raise"), spy]
    fit(all_of_them, module, train=loader(train), val=loader(val), num_sanity_val_steps=0, max_epochs=1)
    assert module.trained == 3
    assert (train.taken, val.taken) == (12, 8)
    check(memory)
    assert order[0] == ("trained", 1), "the untrained model is looked at before the first step"
    # The first batch that passes is one of training.
    assert all(torch.equal(images, train.images[:2]) for images in witness.images)


class Normalizing(Net):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return (images - 0.5) / 0.25 + (100 if self.trainer.training else 0), labels


def test_the_probe_goes_through_the_modules_hooks_as_in_validation(memory: MemorySink) -> None:
    witness = Witness()
    fit([CAMMonitor(method=witness, probe=8, on_error="raise")], Normalizing(), max_epochs=1)
    images = dataset(8).tensors[0]
    order = [0, 1, 2, 3, 4, 5, 6, 7]
    for seen in witness.images:
        assert torch.equal(
            seen.sum((1, 2, 3)).sort().values, ((images[order] - 0.5) / 0.25).sum((1, 2, 3)).sort().values
        )


# ---- Models.


class Wrapped(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = body(), form

    def forward(self, images: Tensor) -> Any:
        logits = self.inner(images)
        if self.form == "dict":
            return {"brightness": images.mean((1, 2, 3)), "logits": logits}
        return SimpleNamespace(logits=logits) if self.form == "object" else (logits, images)


@pytest.mark.parametrize("form", ["dict", "object", "tuple"])
def test_outputs_of_many_forms(memory: MemorySink, form: str) -> None:
    class Model(Net):
        def score(self, images: Tensor) -> Tensor:
            output = self(images)
            if form == "tuple":
                return output[0]
            return output["logits"] if form == "dict" else output.logits

    fit(monitors(), Model(net=Wrapped(form)), max_epochs=1)
    assert steps(memory, "cam/gradcam") == steps(memory, "saliency/saliency") == [0, 2]


def headless() -> Any:
    base = importlib.import_module("pytorch_lightning").LightningModule

    class Headless(base):  # type: ignore[misc, name-defined, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.optimizer, self.trained = body(), "adam", 0

        def score(self, images: Tensor) -> Tensor:
            return self.net(images)

    for name in ("read", "loss", "training_step", "validation_step", "configure_optimizers"):
        setattr(Headless, name, Net.__dict__[name])
    return Headless()


def test_a_module_without_forward(memory: MemorySink) -> None:
    fit(monitors(predict=lambda model, images: model.score(images)), headless(), max_epochs=1)
    check(memory)


class Talkative(Net):
    def forward(self, images: Tensor) -> Any:
        found = super().forward(images)
        if self._trainer is not None:
            self.log("spread", found.std(), on_step=True, on_epoch=True, batch_size=4)
            self.log_dict({"level": found.mean()}, batch_size=4)
        return found


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 1}], ids=["epochs", "steps"])
def test_what_forward_logs_is_logged_as_without_monitors(memory: MemorySink, options: dict[str, Any]) -> None:
    found = []
    for callbacks in ([], monitors(**options)):
        seed()
        trainer = fit(callbacks, Talkative())
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert "spread_epoch" in found[0]
    assert found[0] == found[1]


# ---- Stages.


def test_validate_and_test_look_once(memory: MemorySink) -> None:
    module = Net()
    trainer = make_trainer(monitors())
    trainer.validate(module, loader(dataset(8)), verbose=False)
    assert steps(memory, "cam/gradcam") == [0]
    trainer.test(module, loader(dataset(8)), verbose=False)
    for tag in ("cam-test/gradcam", "saliency-test/saliency", "filters-test/net.0", "norms-test/weight"):
        assert steps(memory, tag) == [0], tag
    assert steps(memory, "weights-test/net.0.weight") == [0]
    assert steps(memory, "cam/gradcam") == [0]
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_an_iterable_data_set_in_test(memory: MemorySink) -> None:
    stream = Stream(8)
    make_trainer(monitors()).test(Net(), loader(stream), verbose=False)
    assert steps(memory, "cam-test/gradcam") == [0]
    assert stream.taken == 8


def test_prediction_is_left_alone(memory: MemorySink) -> None:
    make_trainer(monitors()).predict(Net(), loader(dataset(8)[:][0]))
    assert not memory.records


# ---- Precision.


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.filterwarnings("ignore:.*bf16 is supported for historical reasons")
def test_half_precision(memory: MemorySink, precision: str) -> None:
    fit([*monitors(), CAMMonitor(method="cam", probe=2, on_error="raise")], max_epochs=1, precision=precision)
    check(memory)
    assert steps(memory, "cam/cam") == [0, 2]
    assert torch.get_default_dtype() == torch.float32


# ---- More than one run.


def test_a_resumed_run_goes_on(memory: MemorySink, tmp_path: Path) -> None:
    first, second = Witness(), Witness()
    save = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    norms = NormMonitor(on_error="raise")
    fit(
        [norms, CAMMonitor(method=first, probe=4, on_error="raise"), save],
        max_epochs=1,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    assert steps(memory, "cam/Witness") == steps(memory, "norms/weight") == [0, 2]
    memory.records.clear()
    resumed = NormMonitor(on_error="raise")
    again = [resumed, CAMMonitor(method=second, probe=4, on_error="raise"), save]
    fit(again, max_epochs=2, ckpt_path=str(tmp_path / "last.ckpt"), num_sanity_val_steps=0, enable_checkpointing=True)
    assert steps(memory, "cam/Witness") == steps(memory, "norms/weight") == [5]
    assert sorted(resumed._history["weight"]) == [0, 2, 5]
    assert sorted(resumed._history["gradient"]) == [2, 5]
    assert torch.equal(resumed._history["weight"][2], norms._history["weight"][2])
    assert torch.equal(first.images[0], second.images[-1])


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_in_both_lightnings(memory: MemorySink, name: str) -> None:
    package = pytest.importorskip(name)
    seed()
    fit(monitors(), for_flavour(package)(), package=package, max_epochs=1)
    check(memory)


def test_monitors_can_be_copied_and_sent(memory: MemorySink) -> None:
    made = [*monitors(), CAMMonitor(method="cam", probe=Probe(*tensors(2)), layer="net.5")]
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert [repr(each) for each in again] == [repr(each) for each in made]
        assert [each.state_key for each in again] == [each.state_key for each in made]
        memory.records.clear()
        fit(again, max_epochs=1)
        check(memory)
        assert steps(memory, "cam/cam") == [0, 2]
        # After a run, too.
        pickle.dumps(again)
        copy.deepcopy(again)


def test_a_slow_writer_shows_what_was_there_at_the_look(memory: MemorySink, monkeypatch: pytest.MonkeyPatch) -> None:
    write = memory.write

    def slow(record: Any, step: int) -> None:
        time.sleep(0.03)
        write(record, step)

    monkeypatch.setattr(memory, "write", slow)
    seed()
    module = Net()
    kept: dict[int, Tensor] = {0: module.net[0].weight.detach().clone()}

    def keep(*args: Any) -> None:
        kept[module.trainer.fit_loop.epoch_loop._batches_that_stepped] = module.net[0].weight.detach().clone()

    module.on_train_batch_end = keep  # type: ignore[method-assign]
    looks = {"every_n_train_steps": 2, "on_error": "raise"}
    fit([FilterMonitor(**looks), NormMonitor(**looks), CAMMonitor(probe=2, **looks)], module)
    shown = {step: r for step, r in memory.records if isinstance(r, Picture) and r.tag == "filters/net.0"}
    assert list(shown) == [0, 1, 3, 5]
    del shown[0], kept[0]  # the first batch steps at 0, too
    for step, record in shown.items():
        expected = filter_grid(kept[step], name="net.0", kind="image", max_filters=64)
        assert torch.equal(record.image, expected), f"step {step} shows a later state"


def test_a_user_defined_monitor(memory: MemorySink) -> None:
    class Largest(Monitor):
        kind = "largest"

        def observe(self, module: nn.Module, step: int) -> float:
            return max(float(each.abs().max()) for each in module.parameters())

        def report(self, seen: float, step: int) -> Any:
            yield Scalar(self.tag("weight"), seen)

    fit([Largest(), Largest(name="b", every_n_epochs=2)])
    assert steps(memory, "largest/weight") == [0, 2, 5]
    assert steps(memory, "largest-b/weight") == [0, 5]


def test_two_probes_of_one_run(memory: MemorySink) -> None:
    wide, few = Witness(), Witness()
    fit([CAMMonitor(method=wide, probe=6, name="a"), SaliencyMonitor(method=few, probe=dataset(3))], max_epochs=1)
    assert [len(images) for images in wide.images] == [6, 6]
    assert [len(images) for images in few.images] == [3, 3]
    assert tags(memory) == {"cam-a/Witness", "saliency/Witness"}
