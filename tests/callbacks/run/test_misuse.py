"""What cannot work is said before the first batch is trained, and says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_interp import (
    CAMMonitor,
    ConfigurationError,
    FilterMonitor,
    NormMonitor,
    Probe,
    SaliencyMonitor,
    WeightHistogramMonitor,
    default_monitors,
)
from lightning_interp.callbacks import MeasureMonitor, ProbeMonitor, WeightMonitor
from lightning_interp.sinks import MemorySink, Scalar
from tests.helpers.runs import Items, Net, body, dataset, fit, loader, make_trainer


def no_space() -> Net:
    return Net(net=nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 8), nn.ReLU(), nn.Linear(8, 3)))


def no_average() -> Net:
    return Net(net=nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 12 * 12, 3)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CAMMonitor(every_n_epochs=0), ["every_n_epochs", "positive integer", "0"]),
        (lambda: CAMMonitor(every_n_epochs=1.5), ["every_n_epochs", "1.5"]),
        (lambda: NormMonitor(at_epochs=[]), ["at_epochs", "[]"]),
        (lambda: NormMonitor(at_epochs=[0, -1]), ["at_epochs", "-1"]),
        (lambda: NormMonitor(at_epochs=3), ["at_epochs", "list", "3"]),
        (lambda: NormMonitor(at_epochs="03"), ["at_epochs", "list", "'03'"]),
        (lambda: FilterMonitor(every_n_train_steps=0), ["every_n_train_steps", "positive integer"]),
        (lambda: FilterMonitor(every_n_epochs=2, at_epochs=[1]), ["every_n_epochs and at_epochs", "exclude"]),
        (lambda: FilterMonitor(at_epochs=[1], every_n_train_steps=5), ["at_epochs and every_n_train_steps"]),
        (lambda: FilterMonitor(at_start=1), ["at_start", "True or False"]),
        (lambda: CAMMonitor(on_error="ignore"), ["on_error", "'warn'", "'raise'", "'ignore'"]),
        (lambda: CAMMonitor(name="a/b"), ["name", "'a/b'"]),
        (lambda: CAMMonitor(name=""), ["name"]),
        (lambda: CAMMonitor(method="gradcamm"), ["'gradcamm'", "'gradcam'"]),
        (lambda: SaliencyMonitor(method="gradcam"), ["'gradcam'", "'smoothgrad'"]),
        (lambda: CAMMonitor(method=3), ["method", "3"]),
        (lambda: CAMMonitor(method_options={"n_samples": 3}), ["gradcam", "n_samples"]),
        (lambda: SaliencyMonitor(method="smoothgrad", method_options={"sample": 3}), ["'sample'", "n_samples"]),
        (lambda: CAMMonitor(method=lambda m, i, t: i.mean(1), layer="net.0"), ["callable", "'net.0'"]),
        (lambda: CAMMonitor(layer=4), ["layer", "4"]),
        (lambda: CAMMonitor(target="labels"), ["'label'", "'predicted'", "'labels'"]),
        (lambda: CAMMonitor(target=-1), ["target", "-1"]),
        (lambda: CAMMonitor(target=True), ["target", "True"]),
        (lambda: CAMMonitor(probe=0), ["probe", "0"]),
        (lambda: CAMMonitor(probe=iter([])), ["probe", "data set"]),
        (lambda: CAMMonitor(cmap="jett"), ["jett", "jet"]),
        (lambda: CAMMonitor(alpha=1.2), ["alpha", "0 to 1", "1.2"]),
        (lambda: CAMMonitor(alpha="half"), ["alpha", "'half'"]),
        (lambda: WeightHistogramMonitor(bins=0), ["bins", "0"]),
        (lambda: WeightHistogramMonitor(parameters=[]), ["parameters", "glob"]),
        (lambda: WeightHistogramMonitor(gradients="yes"), ["gradients", "'yes'"]),
        (lambda: FilterMonitor(layers="conv1"), ["layers", "list", "'conv1'"]),
        (lambda: FilterMonitor(max_filters=0), ["max_filters", "0"]),
        (lambda: NormMonitor(ord=0), ["ord", "0"]),
        (lambda: NormMonitor(ord="fro"), ["ord", "'fro'"]),
        (lambda: NormMonitor(weights=False, gradients=False, updates=False), ["nothing to measure"]),
        (lambda: NormMonitor(updates=2), ["updates", "2"]),
    ],
)
def test_a_wrong_argument_is_refused_at_once(make: Any, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("make", [CAMMonitor, SaliencyMonitor, FilterMonitor, NormMonitor, default_monitors])
def test_an_unknown_option_is_a_type_error(make: Any) -> None:
    with pytest.raises(TypeError, match="every_n_epoch"):
        make(every_n_epoch=2)


def unlabelled(image: Any, label: Any) -> Any:
    return image


def unreadable(image: Any, label: Any) -> Any:
    return {"left": image, "right": label}


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize(
    ("make", "module", "words"),
    [
        (lambda **o: CAMMonitor(layer="net.44", **o), Net, ["no layer 'net.44'", "'net.4'"]),
        (lambda **o: CAMMonitor(layer=nn.ReLU(), **o), Net, ["ReLU", "not part of"]),
        (lambda **o: CAMMonitor(layer="net.9", **o), Net, ["net.9", "(N, C, h, w)"]),
        (lambda **o: CAMMonitor(target=3, **o), Net, ["target 3 is out of range", "0 to 2"]),
        (lambda **o: SaliencyMonitor(target=99, **o), Net, ["target 99 is out of range"]),
        (
            lambda **o: CAMMonitor(probe=Probe(torch.rand(2, 3, 12, 12)), target="label", **o),
            Net,
            ["label", "predicted"],
        ),
        (lambda **o: CAMMonitor(**o), no_space, ["no spatial layer", "layer="]),
        (lambda **o: CAMMonitor(method="cam", **o), no_average, ["gradcam"]),
        (lambda **o: FilterMonitor(**o), no_space, ["no two-dimensional convolution", "layers=[...]"]),
        (lambda **o: FilterMonitor(layers=["net.9"], **o), Net, ["'net.9'", "filters (O, C, h, w)"]),
        (lambda **o: FilterMonitor(layers=["net.00"], **o), Net, ["no layer 'net.00'", "'net.0'"]),
        (lambda **o: WeightHistogramMonitor(parameters="layer4.*", **o), Net, ["'layer4.*'", "net.0.weight"]),
        (lambda **o: CAMMonitor(unpack=lambda batch: batch[7], **o), Net, ["unpack", "IndexError"]),
        (lambda **o: CAMMonitor(method=lambda m, i, t: i, **o), Net, ["expected maps"]),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_batch(
    memory: MemorySink, make: Any, module: Any, words: list[str], at_start: bool
) -> None:
    model = module()
    # Even where the monitor itself would not look before the second epoch, and failures only warn.
    monitor = make(at_epochs=[1], at_start=at_start)
    with pytest.raises(ConfigurationError) as caught:
        fit([NormMonitor(), monitor], model)
    assert model.trained == 0
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("make", [unreadable])
def test_a_batch_that_cannot_be_read(memory: MemorySink, make: Any) -> None:
    model = Net()
    model.read = lambda batch: (batch["left"], batch["right"])  # type: ignore[method-assign]
    data = loader(Items(make))
    with pytest.raises(ConfigurationError, match=r"found no images.*unpack="):
        fit([CAMMonitor()], model, train=data, val=data)
    assert model.trained == 0


def test_labels_that_are_not_there(memory: MemorySink) -> None:
    model = Net()
    model.read = lambda batch: (batch, torch.zeros(len(batch), dtype=torch.long))  # type: ignore[method-assign]
    data = loader(Items(unlabelled))
    with pytest.raises(ConfigurationError, match="target='predicted'"):
        fit([CAMMonitor(target="label")], model, train=data, val=data)
    assert model.trained == 0
    fit([CAMMonitor(on_error="raise")], model, train=data, val=data)


def test_a_module_without_forward_names_predict(memory: MemorySink) -> None:
    class Headless(Net):
        def score(self, images: Any) -> Any:
            return self.net(images)

    Headless.forward = torch.nn.Module.forward  # type: ignore[method-assign, assignment]
    model = Headless()
    with pytest.raises(ConfigurationError, match="predict="):
        fit([CAMMonitor()], model)
    assert model.trained == 0


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_misuse_is_said_in_every_stage(memory: MemorySink, stage: str) -> None:
    trainer = make_trainer([CAMMonitor(layer="net.44")])
    with pytest.raises(ConfigurationError, match=r"did you mean 'net\.4'"):
        getattr(trainer, stage)(Net(), loader(dataset(8)), verbose=False)


def test_a_failure_that_is_no_misuse_does_not_end_the_run(memory: MemorySink) -> None:
    def method(model: Any, images: Any, targets: Any) -> Any:
        raise RuntimeError("too little memory")

    model = Net(net=body())
    with pytest.warns(UserWarning, match="too little memory"):
        fit([CAMMonitor(method=method)], model)
    assert model.trained == 6


# ---- Monitors of one's own.


def test_a_class_that_lacks_something_is_refused_at_once(memory: MemorySink) -> None:
    class Silent(WeightMonitor):
        kind = "silent"

        def capture(self, module: nn.Module, step: int) -> None:
            return None

    class Kindless(Silent):
        kind = None  # type: ignore[assignment]

    class Bare(MeasureMonitor):
        kind = "bare"

        def __init__(self) -> None:
            pass

    for monitor, words in (
        (Silent, "Silent lacks records"),
        (Kindless, "Kindless lacks kind"),
        (Bare, r"Bare.__init__ does not call super\(\).__init__"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            fit([monitor()])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"a": 1}], "yield Picture, Scalar, .* got dict"),
        (None, "must return or yield records, got NoneType"),
        (Scalar("a/b", 1.0), "must return or yield records, got Scalar"),
    ],
)
def test_what_is_no_record_is_named(memory: MemorySink, given: Any, words: str) -> None:
    class Odd(WeightMonitor):
        kind = "odd"

        def capture(self, module: nn.Module, step: int) -> None:
            return None

        def records(self, data: Any, step: int) -> Any:
            return given

    with pytest.warns(UserWarning, match=words):
        fit([Odd()], max_epochs=1)


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("needs", ["net.3"], "needs\\(\\) must return Needs"),
        ("outputs", torch.zeros(2), "outputs\\(\\) must return named tensors"),
        ("outputs", {"a": torch.zeros(3)}, "returned 3 rows of 'a', expected 1"),
    ],
)
def test_what_a_probe_monitor_returns_is_checked(memory: MemorySink, method: str, given: Any, words: str) -> None:
    class Odd(ProbeMonitor):
        kind = "odd"

        def outputs(self, trace: Any, labels: Any) -> Any:
            return {"a": trace.logits}

        def draw(self, outputs: Any, probe: Any) -> Any:
            return ()

    monitor = Odd(probe=1)
    setattr(monitor, method, lambda *args: given)
    with pytest.raises(ConfigurationError, match=words):
        fit([monitor], max_epochs=1)
