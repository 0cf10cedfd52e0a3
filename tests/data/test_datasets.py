"""Labels, class names and normalisation of data sets, read without loading an image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from lightning_interp.data.datasets import read_class_names, read_labels, read_normalization

X = torch.arange(3 * 2 * 4 * 5, dtype=torch.float32).reshape(3, 2, 4, 5)
Y = torch.tensor([2, 0, 1])


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
        normalization = read_normalization(outer)
        assert normalization is not None
        np.testing.assert_allclose(normalization, (MEAN, STD), rtol=1e-6)


def test_normalization_of_a_preset() -> None:
    normalization = read_normalization(Labelled(1, transform=ResNet18_Weights.DEFAULT.transforms()))
    assert normalization == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_no_normalization() -> None:
    class Normalize:
        """One by length, as scikit-learn has it."""

    class Endless:
        def __getattr__(self, name: str) -> Endless:
            return self

    broken = v1.Normalize([0.5], [0.0])
    for transform in (None, v1.ToTensor(), Normalize(), broken, len, Endless()):
        assert read_normalization(Labelled(1, transform=transform)) is None
