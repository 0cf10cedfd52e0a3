"""The probe: its checks, copies, subsets, and taking it from a batch."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from tests.helpers.data import MEAN, STD, images

# ---- the probe itself


def test_a_probe_keeps_what_it_was_given() -> None:
    x = images(2)
    probe = Probe(
        x,
        [1, 0],
        boxes=torch.tensor([[0, 0, 2, 2], [1, 1, 1, 4]]),
        masks=torch.ones(2, 6, 5, dtype=torch.bool),
        class_names=["cat", "dog"],
        mean=MEAN,
        std=np.array(STD),
    )
    assert len(probe) == 2
    assert torch.equal(probe.images, x)
    assert probe.targets is not None
    assert probe.targets.dtype == torch.int64
    assert probe.targets.tolist() == [1, 0]
    assert probe.boxes is not None
    assert [box.tolist() for box in probe.boxes] == [[[0, 0, 2, 2]], [[1, 1, 1, 4]]]
    assert {box.dtype for box in probe.boxes} == {torch.float32}
    assert probe.masks is not None
    assert probe.masks.all()
    assert probe.class_names == {0: "cat", 1: "dog"}
    assert probe.mean == tuple(MEAN)
    assert probe.std == tuple(STD)
    assert repr(probe) == "Probe(2 x 3 x 6 x 5, targets, boxes, masks, class_names)"


def test_a_probe_of_images_alone() -> None:
    probe = Probe(images(1))
    assert (probe.targets, probe.boxes, probe.masks, probe.class_names, probe.mean, probe.std) == (None,) * 6
    assert repr(probe) == "Probe(1 x 3 x 6 x 5)"


def test_boxes_in_a_list() -> None:
    probe = Probe(images(3), boxes=[torch.zeros(2, 4), torch.zeros(0, 4), torch.ones(4, dtype=torch.float64)])
    assert probe.boxes is not None
    assert [tuple(box.shape) for box in probe.boxes] == [(2, 4), (0, 4), (1, 4)]


def test_integer_images_keep_their_values_and_floats_their_type() -> None:
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(Probe(x).images, x.to(torch.float32))
    assert Probe(images().to(torch.bfloat16)).images.dtype == torch.bfloat16
    assert type(Probe(tv_tensors.Image(images())).images) is Tensor


def test_a_probe_owns_its_tensors() -> None:
    x, y = images().requires_grad_(), torch.tensor([0, 1, 2, 3])
    boxes, masks = torch.zeros(4, 4), torch.zeros(4, 6, 5, dtype=torch.bool)
    probe = Probe(x * 1, y, boxes=boxes, masks=masks)
    kept = probe.images.clone()
    with torch.no_grad():
        x.zero_()
    y.zero_()
    boxes += 1
    masks[:] = True
    assert torch.equal(probe.images, kept)
    assert not probe.images.requires_grad
    assert probe.targets is not None
    assert probe.targets.tolist() == [0, 1, 2, 3]
    assert probe.boxes is not None
    assert not any(box.any() for box in probe.boxes)
    assert probe.masks is not None
    assert not probe.masks.any()


def test_a_probe_made_in_inference_mode_takes_gradients() -> None:
    with torch.inference_mode():
        whole = Probe.from_batch((images(), torch.arange(4)))
        part = whole.subset([1])
    for probe in (whole, part):
        x = probe.images.requires_grad_()
        x.square().sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Probe)])
def test_attributes_cannot_be_set(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Probe(images()), name, None)


def test_probes_are_equal_by_identity() -> None:
    x = images()
    first, second = Probe(x), Probe(x)
    assert first == first
    assert first != second
    assert len({first, second}) == 2


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_probes_are_copied_and_pickled(remake: Callable[[Probe], Probe]) -> None:
    probe = Probe(images(), [0, 1, 2, 3], boxes=torch.zeros(4, 4), class_names={0: "a"}, mean=MEAN, std=STD)
    again = remake(probe)
    assert again is not probe
    assert torch.equal(again.images, probe.images)
    assert again.class_name(0) == "a"
    assert torch.equal(again.to_display(), probe.to_display())
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.mean = None  # type: ignore[misc]


def test_class_names() -> None:
    listed, mapped, unnamed = (Probe(images(), class_names=c) for c in (("cat", "dog"), {7: "owl"}, None))
    assert [listed.class_name(index) for index in (0, 1, 2, -1)] == ["cat", "dog", "2", "-1"]
    assert [mapped.class_name(index) for index in (7, 0)] == ["owl", "0"]
    assert unnamed.class_name(3) == "3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.rand(3, 4, 4)}, "images[None]"),
        ({"images": torch.rand(0, 3, 4, 4)}, "at least one image"),
        ({"images": torch.rand(1, 3, 0, 4)}, "at least one pixel"),
        ({"images": [[1.0]]}, "got list (list (float))"),
        ({"targets": [0, 1]}, "each of the 4 images, int64 (4,) or a list of ints; got int64 (2,)"),
        ({"targets": 1}, "targets must be a sequence of whole numbers, got int"),
        ({"targets": [0.5] * 4}, "targets must be a sequence of whole numbers"),
        ({"targets": torch.rand(4)}, "got float32 (4,)"),
        ({"targets": torch.ones(4, dtype=torch.bool)}, "got bool (4,)"),
        ({"targets": [0, 1, -1, 2]}, "counted from 0; got -1"),
        ({"boxes": torch.zeros(3, 4)}, "a tensor (4, 4) or a list of 4 tensors (M, 4); got float32 (3, 4)"),
        ({"boxes": torch.zeros(4, 5)}, "got float32 (5,) for image 0"),
        ({"boxes": [torch.zeros(1, 4)] * 3 + [[0, 0, 1, 1]]}, "got list (int, int, int, int) for image 3"),
        ({"boxes": "all"}, "got str"),
        ({"boxes": torch.tensor([[3.0, 0.0, 2.0, 5.0]] * 4)}, "torchvision.ops.box_convert"),
        ({"boxes": torch.full((4, 4), torch.nan)}, "x1 <= x2"),
        ({"masks": torch.zeros(4, 6, 5)}, "got float32 (4, 6, 5)"),
        ({"masks": torch.zeros(4, 5, 6, dtype=torch.bool)}, "(4, 6, 5) like the images"),
        ({"masks": torch.zeros(4, 6, 5, dtype=torch.int64)}, "masks == 1"),
        ({"class_names": "cat"}, "class_names must be a list of str or a mapping from int to str, got str"),
        ({"class_names": [1, 2]}, "got list (int, int)"),
        ({"class_names": {"a": "b"}}, "got dict"),
        ({"mean": MEAN}, "mean and std are given together"),
        ({"std": STD}, "mean and std are given together"),
        ({"mean": 0.5, "std": 0.5}, "mean must be a sequence of 3 numbers, got 0.5"),
        ({"mean": [0.5, 0.5], "std": STD}, "mean must be 3 finite numbers"),
        ({"mean": [torch.nan] * 3, "std": STD}, "mean must be 3 finite numbers"),
        ({"mean": MEAN, "std": [0.0, 1.0, 1.0]}, "std must be above 0"),
        ({"mean": MEAN, "std": ["a"]}, "std must be a sequence of 3 numbers"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Probe(**{"images": images(), **arguments})
    assert message in str(caught.value)


# ---- subset


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([2, 0], [2, 0]),
        ((1,), [1]),
        ([-1, 1, 1], [3, 1, 1]),
        (range(1, 3), [1, 2]),
        (torch.tensor([3, 2]), [3, 2]),
        (np.array([0]), [0]),
        (slice(1, None, 2), [1, 3]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        ([], []),
        (slice(9, None), []),
    ],
    ids=repr,
)
def test_subset_keeps_everything_aligned(indices: Any, expected: list[int]) -> None:
    x = images()
    boxes = [torch.full((index, 4), float(index)) for index in range(4)]
    probe = Probe(x, [4, 5, 6, 7], boxes=boxes, masks=x[:, 0] > 0.5, class_names=["a"], mean=MEAN, std=STD)
    part = probe.subset(indices)
    assert len(part) == len(expected)
    assert torch.equal(part.images, x[expected])
    assert part.targets is not None
    assert part.targets.tolist() == [4 + index for index in expected]
    assert part.boxes is not None
    assert [len(box) for box in part.boxes] == expected
    assert part.masks is not None
    assert torch.equal(part.masks, x[expected, 0] > 0.5)
    assert part.class_name(0) == "a"
    assert torch.equal(part.to_display(), probe.to_display()[expected])


def test_subset_of_what_is_not_there() -> None:
    probe = Probe(images())
    for indices, message in (([4], "has no image 4"), ([-5], "has no image -5"), ([0.5], "whole numbers")):
        with pytest.raises(ConfigurationError, match=message):
            probe.subset(indices)  # type: ignore[arg-type]
    assert len(probe.subset([]).to_display()) == 0


@pytest.mark.parametrize("low", [0.0, -2.0])
def test_a_part_is_shown_as_the_whole_is(low: float) -> None:
    x = torch.cat([images(1) * 200 + low, torch.zeros(1, 3, 6, 5), torch.ones(1, 3, 6, 5)]).round()
    probe = Probe(x)
    for index in range(3):
        assert torch.equal(probe.subset([index]).to_display()[0], probe.to_display()[index])


# ---- from a batch


def test_a_probe_from_a_batch() -> None:
    x, y = images(12), torch.arange(12)
    probe = Probe.from_batch((x, y), class_names=["a"], mean=MEAN, std=STD)
    assert len(probe) == 8
    x.zero_()
    assert torch.equal(probe.images, images(12)[:8])
    assert probe.targets is not None
    assert probe.targets.tolist() == list(range(8))
    assert probe.class_name(0) == "a"
    assert probe.mean == tuple(MEAN)
    assert len(Probe.from_batch({"camera": x}, n=20, unpack=lambda batch: batch["camera"])) == 12
    with pytest.raises(ConfigurationError, match="n takes a positive integer, got 0"):
        Probe.from_batch((x, y), n=0)
    with pytest.raises(ConfigurationError, match="unpack="):
        Probe.from_batch({"camera": x})


# ---- around it


def test_neither_lightning_nor_matplotlib_is_loaded() -> None:
    heavy = ("lightning", "pytorch_lightning", "matplotlib")
    code = f"import sys, lightning_interp.data.probe; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
