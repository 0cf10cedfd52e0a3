from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from lightning_interp.data.batches import (
    as_images,
    read_class_names,
    read_labels,
    read_normalization,
    unpack_batch,
)
from lightning_interp.errors import ConfigurationError, describe

X = torch.arange(3 * 2 * 4 * 5, dtype=torch.float32).reshape(3, 2, 4, 5)
Y = torch.tensor([2, 0, 1])


class ImageLabel(NamedTuple):
    label: Tensor
    image: Tensor


Positional = namedtuple("Positional", ["first", "second"])


@dataclass
class Sample:
    Image: Tensor
    Target: Tensor


class Slotted:
    __slots__ = ("pixel_values", "y")

    def __init__(self) -> None:
        self.pixel_values, self.y = X, Y


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, torch.tensor([7, 8, 9])),
        (X, Y[:, None]),
        (X, Y.to(torch.uint8)),
        (X, [2, 0, 1]),
        (X, tuple(Y)),
        (list(X), Y),
        (tuple(X), (2, 0, 1)),
        ([X, X + 1], Y),  # two views
        {"image": X, "label": Y},
        {"images": X, "labels": Y},
        {"IMG": X, "Class": Y},
        {"pixel_values": X, "labels": Y},
        {"x": X, "y": Y},
        {"inputs": X, "targets": Y},
        {"data": X, "cls": Y, "index": torch.arange(3)},
        {"image": "a path", "pixel_values": X, "label": Y},
        {"label": ["a", "b", "c"], "category": Y, "input": X},
        UserDict(image=X, label=Y),
        ({"image": X}, Y),
        [{"image": X, "label": Y}],
        ImageLabel(Y, X),
        Positional(X, Y),
        Sample(X, Y),
        Slotted(),
        SimpleNamespace(x=X, y=Y, edges=None),
        (X, [Y, torch.zeros(3, 1, 4, 5)]),  # OxfordIIITPet with category and segmentation
        (X, [torch.zeros(3, 1, 4, 5), Y]),
        (X, {"boxes": torch.zeros(3, 4), "labels": Y}),
        (X, {"target": {"class": Y}}),
        (X, nn.functional.one_hot(Y)),
        (X, nn.functional.one_hot(Y).to(torch.float16)),
        (X, nn.functional.one_hot(Y, 5) * 0.9 + 0.02),
    ],
    ids=lambda batch: describe(batch, 2),
)
def test_images_and_targets_are_found(batch: Any) -> None:
    images, targets = unpack_batch(batch)
    torch.testing.assert_close(images, X, rtol=0, atol=0)
    assert targets is not None
    assert targets.dtype == torch.int64
    assert targets.tolist() == Y.tolist()


@pytest.mark.parametrize(
    "targets",
    [
        None,
        torch.tensor([0.1, 0.2, 0.3]),
        torch.ones(3, 1),
        torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[2.0, -1.0], [0.5, 0.5], [0.5, 0.5]]),
        torch.full((3, 2), torch.nan),
        torch.ones(3, 2, dtype=torch.complex64),
        torch.tensor([1, 2]),
        torch.zeros(3, 4, 5, dtype=torch.int64),
        ["a", "b", "c"],
        [{"labels": torch.tensor([1, 2, 3])}] * 3,  # detection: three boxes by chance
        "text",
        {"boxes": torch.zeros(3, 4)},
        X,
    ],
    ids=describe,
)
def test_targets_that_are_no_classes_are_none(targets: Any) -> None:
    images, found = unpack_batch((X, targets))
    assert torch.equal(images, X)
    assert found is None


@pytest.mark.parametrize("batch", [X, [X], (X,), {"image": X}, list(X)], ids=describe)
def test_images_alone(batch: Any) -> None:
    images, targets = unpack_batch(batch)
    assert torch.equal(images, X)
    assert targets is None


def test_integer_images_keep_their_values() -> None:
    bytes_ = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    images, _ = unpack_batch(bytes_)
    assert images.dtype == torch.float32
    assert torch.equal(images, bytes_.float())
    assert as_images(X.half()).dtype == torch.float16


def test_subclasses_become_plain_tensors() -> None:
    images, _ = unpack_batch((tv_tensors.Image(X), Y))
    assert type(images) is Tensor


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (X[:, 0], ["(N, C, H, W), got (3, 4, 5)", "images[None]", "images[:, None]"]),
        ([X[:, 0]], ["images[:, None]", "list (float32 (3, 4, 5))"]),
        ((X[:, :, None], Y), ["(3, 2, 1, 4, 5)"]),
        (Y, ["int64 (3,)"]),
        (torch.zeros(0, 3, 4, 4), ["at least one image", "(0, 3, 4, 4)"]),
        (torch.zeros(2, 3, 0, 4), ["at least one pixel"]),
        (X.to(torch.complex64), ["real numbers", "complex64"]),
        ([torch.zeros(3, 4, 5), torch.zeros(3, 6, 5)], ["(3, 4, 5), (3, 6, 5)", "Resize", "pass a Probe"]),
        (([torch.zeros(3, 4, 5), torch.zeros(3, 6, 5)], Y), ["(3, 4, 5), (3, 6, 5)", "pass a Probe"]),
        ({"picture": X, "label": Y}, ["dict {picture: float32 (3, 2, 4, 5)", "unpack=", "pixel_values"]),
        (("a", "b"), ["tuple (str, str)", "unpack="]),
        ((), ["tuple ()"]),
        (np.zeros((2, 3, 4, 4), np.float32), ["ndarray float32 (2, 3, 4, 4)"]),
        (SimpleNamespace(frames=X), ["SimpleNamespace with frames: float32"]),
        (None, ["NoneType"]),
    ],
)
def test_what_is_no_batch_of_images_is_refused(batch: Any, said: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        unpack_batch(batch)
    for words in said:
        assert words in str(caught.value)


def test_unpack() -> None:
    batch = {"sensors": {"camera": X}, "annotation": [Y.tolist()]}
    images, targets = unpack_batch(batch, lambda b: b["sensors"]["camera"])
    assert torch.equal(images, X)
    assert targets is None
    _, targets = unpack_batch(batch, lambda b: (b["sensors"]["camera"], b["annotation"][0]))
    assert targets is not None
    assert targets.tolist() == Y.tolist()
    assert unpack_batch((X, Y), lambda b: (b[0], None))[1] is None


def test_unpack_that_fails_or_gives_something_else() -> None:
    with pytest.raises(ConfigurationError, match=r"unpack= failed on the batch tuple .*KeyError: 'a'") as caught:
        unpack_batch((X, Y), lambda b: {}["a"])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ConfigurationError, match="no images in what unpack= gave"):
        unpack_batch((X, Y), lambda b: "nothing")
    with pytest.raises(ConfigurationError, match=r"what unpack= gave.*images\[None\]"):
        unpack_batch((X, Y), lambda b: b[0][0])


def test_as_images_refuses_what_is_no_tensor() -> None:
    with pytest.raises(ConfigurationError, match=r"images must be a tensor .*got list \(int, int\)"):
        as_images([1, 2])


def test_descriptions_are_short() -> None:
    assert describe(list(range(9))) == "list (int, int, int, int, int, int, ... 9 in all)"
    assert describe([[[[[1]]]]]) == "list (list (list (list ())))"
    assert describe(int) == "type"


class Labelled(Dataset[Any]):
    """A data set with any attributes, none of whose items may be loaded."""

    def __init__(self, length: int, **attributes: Any) -> None:
        self.length = length
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an image was loaded")


@pytest.mark.parametrize("name", ["targets", "labels", "_labels", "y"])
@pytest.mark.parametrize(
    "labels",
    [[2, 0, 1], (2, 0, 1), np.array([2, 0, 1]), Y, list(Y), list(np.array([2, 0, 1], np.uint8))],
    ids=["list", "tuple", "ndarray", "tensor", "list of tensors", "list of NumPy numbers"],
)
def test_labels_in_attributes(name: str, labels: Any) -> None:
    assert read_labels(Labelled(3, **{name: labels})) == [2, 0, 1]


@pytest.mark.parametrize("name", ["samples", "imgs", "_samples"])
def test_labels_beside_paths(name: str) -> None:
    assert read_labels(Labelled(2, **{name: [("a.png", 1), ("b.png", 0)]})) == [1, 0]


def test_labels_may_be_names() -> None:
    assert read_labels(Labelled(2, labels=["dog", "cat"])) == ["dog", "cat"]


@pytest.mark.parametrize(
    "labels",
    [[0, 1], [0.5, 1.5, 2.5], [0, "a", 1], torch.zeros(3, 4), torch.full((3,), 0.5), "abc", [], 3, [None] * 3],
    ids=repr,
)
def test_what_is_no_list_of_labels_is_passed_over(labels: Any) -> None:
    assert read_labels(Labelled(3, targets=labels)) is None
    assert read_labels(Labelled(3, targets=labels, y=Y)) == [2, 0, 1]


def test_labels_of_tensor_datasets() -> None:
    assert read_labels(TensorDataset(X, torch.rand(3), torch.rand(3, 2), Y)) == [2, 0, 1]
    assert read_labels(TensorDataset(X)) is None
    # The first tensor holds the images' stand-in, never the labels.
    assert read_labels(TensorDataset(Y)) is None


def test_labels_through_other_datasets() -> None:
    first, second = Labelled(3, targets=[0, 1, 2]), Labelled(2, labels=np.array([5, 6]))
    assert read_labels(Subset(Subset(first, [2, 1, 0]), [0, 2])) == [2, 0]
    assert read_labels(ConcatDataset([first, second])) == [0, 1, 2, 5, 6]
    assert read_labels(Subset(ConcatDataset([first, second]), [4, 0])) == [6, 0]
    assert read_labels(ConcatDataset([first, Labelled(2)])) is None
    assert read_labels(ConcatDataset([first, Labelled(2, targets=["a", "b"])])) is None
    assert read_labels(Subset(Labelled(2), [0])) is None
    assert read_labels(Labelled(3, dataset=first)) == [0, 1, 2]
    assert read_labels(Labelled(2, dataset=first)) is None
    assert read_labels(Labelled(2, dataset="imagenet")) is None


def test_class_names() -> None:
    named = Labelled(2, classes=["cat", "dog"])
    assert read_class_names(named) == ("cat", "dog")
    assert read_class_names(Subset(named, [0])) == ("cat", "dog")
    assert read_class_names(ConcatDataset([named, Labelled(1, classes=("x",))])) == ("cat", "dog")
    assert read_class_names(Labelled(2, dataset=named)) == ("cat", "dog")
    assert read_class_names(Labelled(2, classes=[("tench", "Tinca tinca"), ("goldfish",)])) == (
        "tench",
        "goldfish",
    )
    for classes in ([], [0, 1], "ab", None, ["a", 1], [()]):
        assert read_class_names(Labelled(2, classes=classes)) is None


MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


class Shifted:
    """A data set as torchvision's: transform and target_transform in one StandardTransform."""

    def __init__(self, transform: Any) -> None:
        self.transforms = SimpleNamespace(transform=transform, target_transform=None)


@pytest.mark.parametrize(
    "transform",
    [
        v1.Normalize(MEAN, STD),
        v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)]),
        v1.Compose([v1.Compose([v1.Normalize(torch.tensor(MEAN), torch.tensor(STD))]), v1.RandomErasing()]),
        nn.Sequential(v1.CenterCrop(4), v1.Normalize(MEAN, STD)),
        v1.RandomApply([v1.Normalize(MEAN, STD)]),
        v2.Normalize(list(MEAN), list(STD)),
        v2.Compose([v2.ToImage(), v2.Compose([v2.Normalize(np.array(MEAN), np.array(STD))])]),
        v2.Compose([v2.RandomApply(nn.ModuleList([v2.Normalize(list(MEAN), list(STD))]))]),
    ],
    ids=lambda transform: " ".join(repr(transform).split())[:40],
)
@pytest.mark.parametrize("holder", [lambda t: Labelled(1, transform=t), lambda t: Labelled(1, transforms=t), Shifted])
def test_normalization_is_found(transform: Any, holder: Any) -> None:
    dataset = holder(transform)
    for outer in (dataset, Subset(dataset, [0]), ConcatDataset([Labelled(1), Subset(dataset, [0])])):
        if isinstance(outer, ConcatDataset) and holder is Shifted:
            continue
        found = read_normalization(outer)
        assert found is not None
        np.testing.assert_allclose(found, (MEAN, STD), rtol=1e-6)


def test_normalization_of_a_preset() -> None:
    found = read_normalization(Labelled(1, transform=ResNet18_Weights.DEFAULT.transforms()))
    assert found == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_no_normalization() -> None:
    class Normalize:
        """One by length, as scikit-learn has it."""

    class Endless:
        def __getattr__(self, name: str) -> Endless:
            return self

    broken = v1.Normalize([0.5], [0.0])
    for transform in (None, v1.ToTensor(), Normalize(), broken, len, Endless()):
        assert read_normalization(Labelled(1, transform=transform)) is None
