"""Boxes and masks in batches and data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_interp.data.annotations import dataset_annotations, unpack_annotated
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError

IMAGES, LABELS = torch.rand(3, 3, 6, 5), torch.tensor([2, 0, 1])
BOXES = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 4.0, 4.0], [2.0, 2.0, 5.0, 6.0]])
MASKS = torch.rand(3, 6, 5) > 0.5
SHAPE = (3, 3, 6, 5)


def rows_of(boxes: tuple[Tensor, ...] | None) -> list[Any]:
    assert boxes is not None
    return [rows.tolist() for rows in boxes]


# ---- batches


@pytest.mark.parametrize(
    "batch",
    [
        {"images": IMAGES, "labels": LABELS, "boxes": BOXES, "masks": MASKS},
        {"Image": IMAGES, "Label": LABELS, "BOXES": list(BOXES), "Masks": MASKS.to(torch.uint8)},
        (IMAGES, {"labels": LABELS, "boxes": BOXES[:, None], "masks": MASKS[:, None]}),
        [IMAGES, {"target": LABELS, "boxes": BOXES.numpy(), "masks": MASKS.numpy()}],
    ],
    ids=["mapping", "other case", "tuple", "list"],
)
def test_annotations_of_a_batch(batch: Any) -> None:
    images, targets, annotations = unpack_annotated(batch)
    assert torch.equal(images, IMAGES)
    assert targets is not None
    assert torch.equal(targets, LABELS)
    assert annotations is not None
    assert rows_of(annotations.boxes) == [[row] for row in BOXES.tolist()]
    assert annotations.masks is not None
    assert torch.equal(annotations.masks, MASKS)
    assert annotations.ignore is None


def test_boxes_or_masks_alone_and_pixels_to_ignore() -> None:
    _, _, boxes_only = unpack_annotated({"images": IMAGES, "boxes": BOXES, "ignore": MASKS})
    assert boxes_only is not None
    assert (boxes_only.masks, boxes_only.ignore) == (None, None), "ignore belongs to masks"
    _, _, masks_only = unpack_annotated({"images": IMAGES, "masks": MASKS, "ignore": ~MASKS})
    assert masks_only is not None
    assert masks_only.boxes is None
    assert masks_only.ignore is not None
    assert torch.equal(masks_only.ignore, ~MASKS)


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES, LABELS), {"images": IMAGES, "ignore": MASKS}])
def test_batches_without_annotations(batch: Any) -> None:
    assert unpack_annotated(batch)[2] is None


def test_unpack_runs_once_and_may_return_annotations() -> None:
    calls = []

    def unpack(batch: Any) -> Any:
        calls.append(batch)
        return {"images": batch[0], "boxes": batch[1]}

    images, targets, annotations = unpack_annotated((IMAGES, BOXES), unpack)
    assert len(calls) == 1
    assert torch.equal(images, IMAGES)
    assert targets is None
    assert annotations is not None
    assert len(rows_of(annotations.boxes)) == 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"boxes": BOXES[:2]}, r"boxes must be .*; got float32 \(2, 4\)"),
        ({"boxes": ["a", "b", "c"]}, "got str for image 0"),
        ({"masks": MASKS.float()}, "masks must be bool or uint8"),
        ({"masks": MASKS, "ignore": MASKS[:, :2]}, r"got bool \(3, 2, 5\)"),
    ],
)
def test_annotations_that_cannot_be_read_are_refused_or_left_out(entries: dict[str, Any], message: str) -> None:
    batch = {"images": IMAGES, "labels": LABELS, **entries}
    with pytest.raises(ConfigurationError, match=message):
        unpack_annotated(batch)
    _, targets, annotations = unpack_annotated(batch, strict=False)
    assert targets is not None
    assert annotations is None


def test_an_unpack_that_fails_runs_once() -> None:
    calls = []

    def unpack(batch: Any) -> Any:
        calls.append(batch)
        raise KeyError("camera")

    for strict in (True, False):
        calls.clear()
        with pytest.raises(ConfigurationError, match="unpack= failed"):
            unpack_annotated((IMAGES, BOXES), unpack, strict=strict)
        assert len(calls) == 1


# ---- data sets


class Annotated(Dataset[Any]):
    """A data set with attributes, none of whose items may be loaded."""

    def __init__(self, length: int = 3, **attributes: Any) -> None:
        self.length = length
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an image was loaded")


def test_annotations_of_a_data_set() -> None:
    annotations = dataset_annotations(Annotated(boxes=BOXES, masks=MASKS), [2, 0], (2, *SHAPE[1:]))
    assert annotations is not None
    assert rows_of(annotations.boxes) == [[row] for row in BOXES[[2, 0]].tolist()]
    assert annotations.masks is not None
    assert torch.equal(annotations.masks, MASKS[[2, 0]])


@pytest.mark.parametrize("boxes", [BOXES, BOXES.numpy(), BOXES.tolist(), [*BOXES[:2], None]], ids=type)
def test_entries_of_a_data_set_may_be_of_many_types(boxes: Any) -> None:
    annotations = dataset_annotations(Annotated(boxes=boxes), [0, 2], (2, *SHAPE[1:]))
    assert annotations is not None
    assert annotations.masks is None
    first, last = rows_of(annotations.boxes)
    assert first == BOXES[:1].tolist()
    assert last == ([] if boxes[2] is None else BOXES[2:].tolist())


class Wrapper(Annotated):
    def __init__(self, dataset: Any, length: int) -> None:
        super().__init__(length, dataset=dataset)


def test_annotations_of_wrapped_data_sets() -> None:
    first, second = Annotated(boxes=BOXES), Annotated(2, boxes=BOXES[:2] + 1)
    both = ConcatDataset([first, second])
    cases = [
        (Subset(first, [2, 1]), [0], [2]),
        (Subset(Subset(first, np.array([2, 1, 0])), [1, 2]), [1, 0], [0, 1]),
        (Wrapper(first, 3), [1], [1]),
    ]
    for dataset, indices, rows in cases:
        annotations = dataset_annotations(dataset, indices, (len(indices), *SHAPE[1:]))
        assert annotations is not None
        assert rows_of(annotations.boxes) == [[BOXES[row].tolist()] for row in rows]
    annotations = dataset_annotations(both, [4, 0, 3], SHAPE)
    assert annotations is not None
    assert rows_of(annotations.boxes) == [[row.tolist()] for row in (BOXES[1] + 1, BOXES[0], BOXES[0] + 1)]


@pytest.mark.parametrize(
    "dataset",
    [
        Annotated(),
        Annotated(boxes=BOXES[:2]),
        Annotated(boxes="ltr"),
        Wrapper(Annotated(boxes=BOXES), 2),
        ConcatDataset([Annotated(boxes=BOXES), Annotated(2)]),
    ],
    ids=["none", "another length", "no sequence", "wrapper of another length", "only a part"],
)
def test_data_sets_without_an_entry_for_each_item(dataset: Any) -> None:
    assert dataset_annotations(dataset, [0, len(dataset) - 1], (2, *SHAPE[1:])) is None


def test_entries_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="got str for image 0"):
        dataset_annotations(Annotated(boxes=["left", "right", "top"]), [1], (1, *SHAPE[1:]))


# ---- probes


class Reversed(Annotated):
    def __getitem__(self, index: int) -> Any:
        return IMAGES[index]


@pytest.mark.parametrize("boxes", [BOXES.flip(1), ["left", "right", "top"]], ids=["reversed", "text"])
def test_a_probe_leaves_invalid_annotations_out_unless_they_are_asked_for(boxes: Any) -> None:
    dataset = Reversed(boxes=boxes, masks=MASKS)
    probe = Probe.from_dataset(dataset, n=3)
    assert (probe.boxes, probe.masks) == (None, None)
    with pytest.raises(ConfigurationError, match="x1, y1, x2, y2"):
        Probe.from_dataset(dataset, n=3, annotated=True)


def test_a_probe_takes_the_annotations_of_its_batch() -> None:
    batch = {"images": IMAGES, "boxes": BOXES, "masks": MASKS}
    probe = Probe.from_batch(batch, n=2)
    assert rows_of(probe.boxes) == [[row] for row in BOXES[:2].tolist()]
    assert probe.masks is not None
    assert torch.equal(probe.masks, MASKS[:2])
    assert Probe.from_batch({**batch, "boxes": BOXES.flip(1)}, n=2).masks is None
