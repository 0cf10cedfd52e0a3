"""Boxes on pictures, pixel by pixel."""

import pytest
import torch

from lightning_interp.render import draw_boxes

RED = (255, 0, 0)


def grey(n=1, height=20, width=30):
    return torch.full((n, height, width, 3), 100, dtype=torch.uint8)


def ring(box, inner, height=20, width=30):
    """Which pixels lie within a box and not within the one that is so much smaller."""
    x1, y1, x2, y2 = box
    marked = torch.zeros(height, width, dtype=torch.bool)
    marked[y1:y2, x1:x2] = True
    marked[y1 + inner : y2 - inner, x1 + inner : x2 - inner] = False
    return marked


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_line_lies_within_the_box_and_the_casing_around_it(width):
    box = (5, 4, 21, 17)
    drawn = draw_boxes(grey(), [torch.tensor([box])], RED, width=width)[0]
    assert (drawn == torch.tensor(RED, dtype=torch.uint8)).all(-1).equal(ring(box, width))
    cased = ring((4, 3, 22, 18), width + 2) & ~ring(box, width)
    assert (drawn == 0).all(-1).equal(cased)
    assert (drawn == 100).all(-1).equal(~(cased | ring(box, width)))


def test_images_are_left_as_they_are_and_each_has_its_own_boxes():
    images = grey(3)
    boxes = [torch.tensor([[2, 2, 9, 9], [12, 3, 25, 18]]), torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 30.0, 20.0]])]
    drawn = draw_boxes(images, boxes, RED)
    assert (images == 100).all()
    assert drawn[1].equal(images[1])
    for index, box in ((0, (2, 2)), (0, (12, 3)), (2, (0, 0)), (2, (29, 19))):
        assert drawn[index, box[1], box[0]].tolist() == list(RED)
    assert drawn[0, 10, 18].tolist() == [100, 100, 100]


@pytest.mark.parametrize("box", [[3, 3, 3, 8], [0, 0, 0, 0], [9, 9, 4, 12], [float("nan"), 0, 4, 4]])
def test_empty_boxes_are_not_drawn(box):
    assert draw_boxes(grey(), [torch.tensor([box])], RED).equal(grey())


@pytest.mark.parametrize("box", [[-5.0, -5.0, 300.0, 300.0], [29.2, 19.1, 29.9, 19.8], [4.5, 4.5, 4.6, 4.6]])
def test_what_reaches_outside_is_drawn_at_the_edge(box):
    drawn = draw_boxes(grey(), [torch.tensor([box])], RED, width=1)
    assert drawn.shape == (1, 20, 30, 3)
    assert (drawn == torch.tensor(RED, dtype=torch.uint8)).all(-1).any()


def test_misuse():
    with pytest.raises(ValueError, match="those of 1"):
        draw_boxes(grey(2), [torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="uint8"):
        draw_boxes(grey().float(), [torch.zeros(1, 4)])
