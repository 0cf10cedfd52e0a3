import pytest
import torch

from lightning_interp.render.canvas import cells, stack


def one_by_one(pictures, columns, gap, background, factor):
    """The same grid, a picture at a time."""
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    pitch, stride = height * factor + gap, width * factor + gap
    canvas = torch.full((-(-count // columns) * pitch + gap, columns * stride + gap, 3), background).to(torch.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * pitch + gap, index % columns * stride + gap
        large = picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        canvas[top : top + large.shape[0], left : left + large.shape[1]] = large
    return canvas


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("columns", [1, 3, 6])
@pytest.mark.parametrize(("gap", "factor"), [(0, 1), (1, 3), (8, 1), (2, 2)])
def test_cells(count, columns, gap, factor):
    pictures = torch.randint(0, 256, (count, 3, 5, 3), dtype=torch.uint8)
    expected = one_by_one(pictures, columns, gap, 40, factor)
    assert cells(pictures, columns, gap, 40, factor).equal(expected)
    grey = pictures[..., :1].expand(-1, -1, -1, 3)
    assert cells(grey, columns, gap, 40, factor).equal(one_by_one(grey, columns, gap, 40, factor))


def test_stack_fills_with_white():
    strips = [torch.zeros(2, 5, 3, dtype=torch.uint8), torch.full((1, 3, 3), 9, dtype=torch.uint8)]
    assert stack(strips)[:, :, 0].tolist() == [[0] * 5, [0] * 5, [9, 9, 9, 255, 255]]
