"""Boxes and masks: every structure that is read, and every value that is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from lightning_interp.data.boxes import check_boxes, check_masks, read_boxes, read_masks
from lightning_interp.errors import ConfigurationError

ROWS = [[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 4.0, 4.0]]


@pytest.mark.parametrize(
    "boxes",
    [
        torch.tensor(ROWS),
        torch.tensor(ROWS).int(),
        np.array(ROWS),
        ROWS,
        tuple(ROWS),
        [torch.tensor(ROWS[:1]), np.array(ROWS[1])],
        [[ROWS[0]], torch.tensor(ROWS[1], dtype=torch.float64)],
        tv_tensors.BoundingBoxes(ROWS, format="XYXY", canvas_size=(4, 4)),
    ],
    ids=lambda boxes: type(boxes).__name__,
)
def test_boxes_are_read_from_any_sequence_of_numbers(boxes: Any) -> None:
    rows = read_boxes(boxes, 2)
    assert [entry.tolist() for entry in rows] == [[row] for row in ROWS]
    assert {entry.dtype for entry in rows} == {torch.float32}
    assert {type(entry) for entry in rows} == {Tensor}


def test_images_without_a_box_are_read() -> None:
    rows = read_boxes([None, [], np.zeros((0, 4)), torch.zeros(2, 4)], 4)
    assert [tuple(entry.shape) for entry in rows] == [(0, 4), (0, 4), (0, 4), (2, 4)]


def test_boxes_are_copied() -> None:
    boxes = torch.tensor(ROWS)
    copies = [*read_boxes(boxes, 2), *check_boxes(boxes, 2)]
    expected = [entry.clone() for entry in copies]
    boxes += 1
    assert all(torch.equal(*pair) for pair in zip(copies, expected, strict=True))


@pytest.mark.parametrize("function", [read_boxes, check_boxes])
@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.zeros(3, 4), r"a tensor \(2, 4\) or a list of 2 tensors \(M, 4\); got float32 \(3, 4\)"),
        ("ab", "got str"),
        (torch.tensor(1.0), r"got float32 \(\)"),
        (7, "got int"),
        (torch.zeros(2, 5), r"got float32 \(5,\) for image 0"),
        ([torch.zeros(1, 4), torch.zeros(1, 1, 4)], r"got float32 \(1, 1, 4\) for image 1"),
        ([torch.zeros(1, 4), "box"], "got str for image 1"),
        (torch.zeros(2, 4, dtype=torch.complex64), "got complex64"),
        (torch.zeros(2, 4, dtype=torch.bool), "got bool"),
    ],
)
def test_boxes_of_another_structure_are_refused(function: Any, boxes: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"boxes must be \(x1, y1, x2, y2\).*{message}"):
        function(boxes, 2)


def test_only_reading_converts_lists_of_numbers() -> None:
    assert len(read_boxes(ROWS, 2)) == 2
    with pytest.raises(ConfigurationError, match=r"got list \(float, float, float, float\) for image 0"):
        check_boxes(ROWS, 2)


@pytest.mark.parametrize(
    ("box", "options", "message"),
    [
        ([3.0, 0.0, 2.0, 5.0], {}, r"box \(3, 0, 2, 5\) of image 1 .* x1 <= x2 .*box_convert"),
        ([0.0, 0.0, float("nan"), 5.0], {}, r"box \(0, 0, nan, 5\) of image 1 is no finite"),
        ([0.0, 0.0, float("inf"), 5.0], {}, "is no finite"),
        ([0.0, 0.0, 9.0, 2.0], {"image_size": (9, 8)}, "outside its image of 8 x 9 pixels"),
        ([0.0, 0.0, 2.0, 9.0], {"image_size": (8, 9)}, "outside its image of 9 x 8 pixels"),
        ([-1.0, 0.0, 2.0, 2.0], {"image_size": (8, 8)}, "outside its image"),
        ([2.0, 1.0, 2.0, 3.0], {"allow_empty": False}, r"box \(2, 1, 2, 3\) of image 1 is empty.*x1 < x2"),
        (torch.zeros(0, 4), {"allow_empty": False}, "image 1 has no box"),
    ],
)
def test_values_that_are_no_box_are_refused(box: Any, options: dict[str, Any], message: str) -> None:
    valid = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert len(check_boxes([valid, valid], 2, **options)) == 2
    with pytest.raises(ConfigurationError, match=message):
        check_boxes([valid, torch.as_tensor(box)], 2, **options)


def test_the_first_invalid_row_of_an_image_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"box \(2, 2, 1, 3\) of image 0"):
        check_boxes([torch.tensor([[0, 0, 1, 1], [2, 2, 1, 3], [9, 9, 1, 1]])], 1)


def test_empty_boxes_and_a_rounding_error_are_allowed() -> None:
    empty = check_boxes([torch.zeros(0, 4), torch.tensor([2, 1, 2, 3])], 2, image_size=(4, 4))
    assert [tuple(rows.shape) for rows in empty] == [(0, 4), (1, 4)]
    assert {rows.dtype for rows in empty} == {torch.float64}
    check_boxes(torch.tensor([[-1e-4, 0, 4.0001, 4]]), 1, image_size=(4, 4))
    assert check_boxes([], 0) == ()


MASKS = torch.tensor([[[True, False]], [[False, True]]])


@pytest.mark.parametrize(
    "masks",
    [
        MASKS,
        MASKS.to(torch.uint8) * 255,
        MASKS[:, None],
        MASKS.numpy(),
        list(MASKS),
        [mask.numpy() for mask in MASKS],
        tv_tensors.Mask(MASKS),
    ],
    ids=lambda masks: type(masks).__name__,
)
def test_masks_are_read(masks: Any) -> None:
    read = read_masks(masks, (2, 1, 2))
    assert type(read) is Tensor
    assert torch.equal(read, MASKS)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (MASKS.float(), r"masks must be bool or uint8 \(0 outside the object\).*got float32"),
        (MASKS[:1], r"\(N, H, W\) = \(2, 1, 2\) like the images; got bool \(1, 1, 2\). Resize them"),
        ([MASKS[0], MASKS[1, :, :1]], "got list"),
        (None, "got NoneType"),
    ],
)
def test_masks_of_another_type_or_size_are_not_read(masks: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_masks(masks, (2, 1, 2))


@pytest.mark.parametrize("masks", [MASKS.to(torch.uint8), MASKS[:1], MASKS.numpy()], ids=["dtype", "shape", "array"])
def test_masks_that_are_not_bool_of_that_shape_are_refused(masks: Any) -> None:
    assert torch.equal(check_masks(MASKS, (2, 1, 2)), MASKS)
    with pytest.raises(ConfigurationError, match=r"ignore must be a bool tensor.*\(2, 1, 2\).*masks == 1"):
        check_masks(masks, (2, 1, 2), "ignore")


def test_an_empty_mask_is_refused_only_where_that_is_asked() -> None:
    masks = MASKS.clone()
    masks[1] = False
    check_masks(masks, (2, 1, 2))
    with pytest.raises(ConfigurationError, match="the mask of image 1 is empty"):
        check_masks(masks, (2, 1, 2), allow_empty=False)
