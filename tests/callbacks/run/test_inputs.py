"""Images, batches, data sets and names that people really have, however odd.

Proven elsewhere: 1, 3 and 5 channels, several validation loaders, iterable data sets, no validation, forms of batches
(``test_monitor_models_and_data``), no labels (``test_monitor_misuse``), several monitors of a class, schedules
(``test_monitor_schedules``), second fits, ``fast_dev_run``, loggers (``test_monitor_loggers``), tags (``test_sinks``).
"""

from __future__ import annotations

import math
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

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
from lightning_interp.callbacks import Monitor
from lightning_interp.sinks import MemorySink
from lightning_interp.sinks.records import Picture
from tests.helpers.runs import (
    TRAINER,
    Items,
    Net,
    dataset,
    fit,
    loader,
    loggers,
    make_trainer,
    read_events,
    steps,
    tags,
)

PICTURES = ["cam/gradcam", "saliency/saliency", "filters/net.0", "norms/weight"]


def monitors(**options: Any) -> list[Monitor]:
    return default_monitors(**({"probe": 2, "on_error": "raise"} | options))


def check(memory: MemorySink, expected: tuple[int, ...] = (0, 2)) -> None:
    for tag in PICTURES:
        assert steps(memory, tag) == list(expected), tag


class Converting(Net):
    """Turns any images into floats within 0 and 1 in its steps, as people do."""

    def read(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = batch
        scale = 1 if images.is_floating_point() else 255
        return images.float() / scale, labels


# ---- Images.


@pytest.mark.parametrize("n", [1, 3])
def test_few_images(memory: MemorySink, n: int) -> None:
    fit(monitors(probe=8), val=loader(dataset(n)), max_epochs=1)
    check(memory)


def test_two_channels(memory: MemorySink) -> None:
    data = loader(dataset(12, 2))
    fit(monitors(), Net(2), train=data, val=data, max_epochs=1)
    check(memory)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int64, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_images_of_any_type_that_the_step_converts(memory: MemorySink, dtype: torch.dtype) -> None:
    images, labels = dataset().tensors
    given_images = (images * 255).to(dtype) if not dtype.is_floating_point else images.to(dtype)
    data = loader(TensorDataset(given_images, labels))
    module = Converting()
    fit(monitors(), module, train=data, val=data, max_epochs=1)
    assert module.trained == 3
    check(memory)


def test_double_precision(memory: MemorySink) -> None:
    images, labels = dataset().tensors
    data = loader(TensorDataset(images.double(), labels))
    seen: list[torch.dtype] = []

    def method(model: Any, images: Tensor, targets: Tensor) -> Tensor:
        seen.append(images.dtype)
        return images.mean(1)

    all_of_them = [*monitors(), CAMMonitor(method=method, on_error="raise")]
    fit(all_of_them, train=data, val=data, max_epochs=1, precision="64-true")
    check(memory)
    assert set(seen) == {torch.float64}


@pytest.mark.parametrize("size", [(1000, 1500), (1, 2), (3, 200)])
def test_large_small_and_long_images(memory: MemorySink, size: tuple[int, int]) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    )
    data = DataLoader(TensorDataset(torch.rand(2, 3, *size), torch.tensor([0, 1])), batch_size=2)
    fit(monitors(probe=1, at_epochs=[9]), Net(net=net), train=data, val=data, max_epochs=1)
    check(memory, (0,))


def test_nothing_to_look_at_is_said_at_once(memory: MemorySink) -> None:
    with pytest.raises(ConfigurationError, match="at least one image"):
        Probe(torch.rand(0, 3, 8, 8))
    module = Net()
    with pytest.raises(ConfigurationError, match=r"at least one image.*empty"):
        fit([CAMMonitor(probe=TensorDataset(torch.rand(0, 3, 8, 8)))], module)
    assert module.trained == 0


def test_a_validation_set_without_an_image_gives_way_to_training(memory: MemorySink) -> None:
    module = Net()
    empty = loader(TensorDataset(torch.rand(0, 3, 12, 12), torch.zeros(0, dtype=torch.long)))
    with pytest.warns(UserWarning, match="zero"):  # Lightning's
        fit(monitors(), module, val=empty, max_epochs=1)
    assert module.trained == 3
    check(memory)


# ---- Batches.


class Mixed(Dataset[Any]):
    def __init__(self, n: int = 8) -> None:
        self.items = [(torch.rand(3, 12 + index % 3, 12), index % 3) for index in range(n)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def as_lists(items: list[Any]) -> Any:
    images, labels = zip(*items, strict=True)
    return list(images), torch.tensor(labels)


class OneByOne(Net):
    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        self.eval()  # batch norm wants more than one image
        logits = torch.cat([self(image[None]) for image in images])
        self.train()
        return nn.functional.cross_entropy(logits, labels)


def test_images_of_several_sizes_are_refused_before_training_unless_a_probe_is_given(memory: MemorySink) -> None:
    data = DataLoader(Mixed(), batch_size=4, collate_fn=as_lists)
    module = OneByOne()
    with pytest.raises(ConfigurationError, match=r"one size.*\(3, 12, 12\).*\(3, 13, 12\).*pass a Probe"):
        fit([CAMMonitor()], module, train=data, val=data)
    assert module.trained == 0
    fit(monitors(probe=Probe(torch.rand(2, 3, 12, 12))), module, train=data, val=data, max_epochs=1)
    assert module.trained == 2
    check(memory, (0, 1))


def test_images_of_one_size_as_a_list(memory: MemorySink) -> None:
    class Stacking(Net):
        def read(self, batch: Any) -> tuple[Tensor, Tensor]:
            return torch.stack(batch[0]), batch[1]

    data = loader(Items(lambda image, label: (image, int(label))), collate_fn=as_lists)
    fit(monitors(), Stacking(), train=data, val=data, max_epochs=1)
    check(memory)


def test_batches_made_by_the_data_set_itself(memory: MemorySink) -> None:
    images, labels = dataset().tensors
    whole = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 12, 4)]
    data = DataLoader(whole, batch_size=None)  # type: ignore[arg-type]
    module = Net()
    fit(monitors(), module, train=data, val=data, max_epochs=1, num_sanity_val_steps=0)
    assert module.trained == 3
    check(memory)


# ---- Names.

ODD = [
    "a/../../b",
    "..",
    "/etc",
    'say "no"',
    "<script>alert(1)</script>",
    "\N{CAT FACE}",
    "new\nline",
    "",
    "\udc80",
    "x" * 300,
]


class Named(Dataset[Any]):
    classes = ODD[:3]

    def __init__(self, names: list[str]) -> None:
        self.classes = names  # type: ignore[misc]
        self.inner = dataset(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


@pytest.mark.parametrize("names", [ODD[:3], ODD[3:6], ODD[6:9], ODD[9:]], ids=["paths", "marks", "odd", "long"])
def test_classes_of_any_name(memory: MemorySink, names: list[str]) -> None:
    fit(monitors(probe=8), val=loader(Named(names)), max_epochs=1)
    check(memory)


@pytest.mark.parametrize("target", ["tensorboard", "files", "csv"])
def test_layers_of_any_name_write_nothing_outside_the_run(tmp_path: Path, target: str) -> None:
    odd = [name for name in ODD if name and "." not in name and "\udc80" not in name]
    parts = {name: nn.Conv2d(3, 3, 1) for name in [*odd, "a/" + "\N{FULLWIDTH FULL STOP}" * 2 + "/b"]}
    net = nn.Sequential(nn.ModuleDict(parts), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    net[0].forward = lambda images: sum(each(images) for each in net[0].values())  # type: ignore[method-assign, misc]
    root = tmp_path / "deep" / "root"
    logger: Any = {"tensorboard": TensorBoardLogger(str(root)), "csv": CSVLogger(str(root)), "files": False}[target]
    module = Net(net=net)
    names = {"name": "..", "on_error": "raise"}
    fit(
        [
            FilterMonitor(layers=[f"net.0.{name}" for name in parts], **names),
            WeightHistogramMonitor(**names),
            NormMonitor(**names),
            SaliencyMonitor(probe=2, **names),
        ],
        module,
        logger=logger,
        default_root_dir=str(root),
        max_epochs=1,
    )
    assert module.trained == 3
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and root not in path.resolve().parents]
    assert not outside
    if target == "tensorboard":
        found = read_events(logger.log_dir).Tags()["images"]
        assert len([tag for tag in found if tag.startswith("filters-../")]) == len(parts)
    else:
        assert len(list(root.rglob("*.png"))) >= 2 * len(parts)


# ---- Settings of the Trainer.


def test_more_settings_at_once(memory: MemorySink) -> None:
    trainer = make_trainer(monitors(), max_epochs=1, limit_train_batches=1, limit_val_batches=0.5)
    module = Net()
    trainer.fit(module, loader(dataset()), loader(dataset(8)))
    assert module.trained == 1
    check(memory, (0, 0))
    memory.records.clear()
    # Another module, with the same monitors and Trainer.
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Net(), loader(dataset()), loader(dataset(8)))
    assert all(steps(memory, tag) == [1] for tag in PICTURES)


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_epochs": 0}, {"max_steps": 1}], ids=str)
def test_hardly_any_training(memory: MemorySink, options: dict[str, Any]) -> None:
    fit(monitors(), **options)
    assert len(steps(memory, "norms/weight")) <= 2


# ---- Any of these at random, through a real look.

Pair = namedtuple("Pair", "image label")
FORMS = {
    "tuple": lambda images, labels: (images, labels),
    "dict": lambda images, labels: {"image": images, "label": labels},
    "named": Pair,
    "list": lambda images, labels: (list(images), labels.tolist()),
    "one-hot": lambda images, labels: [images, nn.functional.one_hot(labels, 3)],
    "alone": lambda images, labels: images,
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]


class Looked(Net):
    """Answers any batch in validation, so that one look is all that happens."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 5),
    channels=st.integers(1, 5),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(sorted(FORMS)),
    bad=st.sampled_from([None, 0.0, math.nan, math.inf, -1e30]),
    asked=st.integers(1, 6),
    iterable=st.booleans(),
)
def test_any_batch_can_be_looked_at(
    n: int, channels: int, height: int, width: int, dtype: Any, form: str, bad: Any, asked: int, iterable: bool
) -> None:
    generator = torch.Generator().manual_seed(n)
    images = torch.rand(n, channels, height, width, generator=generator)
    if bad is not None and dtype.is_floating_point:
        images[0] = bad
    images = images.to(dtype) if dtype.is_floating_point else (images * 255).to(dtype)
    batch = FORMS[form](images, torch.arange(n) % 3)
    memory = MemorySink()
    net = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    # Read by the index, a data set of whole batches gives none; passing by, it does.
    source = [batch] if not iterable else PassingBy(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRAINER, "logger", loggers(memory))
        # A single pixel has no extent that a layer could be found by.
        look: Any = {"probe": asked, "on_error": "raise", "layer": "net.0" if height * width == 1 else None}
        cam = CAMMonitor(**look)
        del look["layer"]
        trainer = make_trainer([cam, SaliencyMonitor(**look)])
        trainer.validate(Looked(net=net), DataLoader(source, batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert tags(memory) == {"cam/gradcam", "saliency/saliency"}
    for _, record in memory.records:
        assert isinstance(record, Picture)
        assert record.image.dtype == torch.uint8
        assert min(record.image.shape[:2]) > 0


class PassingBy(torch.utils.data.IterableDataset[Any]):
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        yield self.batch


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    every=st.one_of(
        st.builds(lambda n: {"every_n_epochs": n}, st.integers(1, 4)),
        st.builds(lambda n: {"every_n_train_steps": n}, st.integers(1, 7)),
        st.builds(lambda e: {"at_epochs": sorted(e)}, st.sets(st.integers(0, 4), min_size=1)),
    ),
    at_start=st.booleans(),
    accumulate=st.integers(1, 3),
    epochs=st.integers(1, 3),
)
def test_any_schedule(every: dict[str, Any], at_start: bool, accumulate: int, epochs: int) -> None:
    memory = MemorySink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRAINER, "logger", loggers(memory))
        fit(
            [NormMonitor(at_start=at_start, on_error="raise", **every)],
            Net(plain=True),
            val=None,
            max_epochs=epochs,
            accumulate_grad_batches=accumulate,
        )
    a_epoch = -(-3 // accumulate)  # three batches; what is left over steps, too
    if "every_n_train_steps" in every:
        due = [step - 1 for step in range(1, epochs * a_epoch + 1) if step % every["every_n_train_steps"] == 0]
    elif "at_epochs" in every:
        due = [(epoch + 1) * a_epoch - 1 for epoch in every["at_epochs"] if epoch < epochs]
    else:
        due = [(epoch + 1) * a_epoch - 1 for epoch in range(epochs) if (epoch + 1) % every["every_n_epochs"] == 0]
    assert steps(memory, "norms/weight/total") == [0] * at_start + due
