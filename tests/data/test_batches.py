from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from lightning_interp.data.batches import as_images, unpack_batch
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
    images, class_targets = unpack_batch((X, targets))
    assert torch.equal(images, X)
    assert class_targets is None


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
    ("batch", "parts"),
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
def test_what_is_no_batch_of_images_is_refused(batch: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        unpack_batch(batch)
    for part in parts:
        assert part in str(caught.value)


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
