import pytest
import torch

import lightning_interp.render.filters as module
from lightning_interp.render import filter_grid
from lightning_interp.render.filters import BACKGROUND, GAP, ZERO


@pytest.fixture
def captions(monkeypatch):
    """The texts that were written, before they are wrapped."""
    written = []
    original = module.wrap

    def spy(text, *args, **kwargs):
        written.append(text)
        return original(text, *args, **kwargs)

    monkeypatch.setattr(module, "wrap", spy)
    return written


def cell(grid, index, columns, factor, side):
    """One filter of an "image" grid, at one value a weight."""
    pitch = side * factor + GAP
    top, left = index // columns * pitch + GAP, index % columns * pitch + GAP
    block = grid[top : top + side * factor, left : left + side * factor]
    values = block[::factor, ::factor]
    assert block.equal(values.repeat_interleave(factor, 0).repeat_interleave(factor, 1))
    return values


def test_colour_filter_has_one_scale_for_its_channels():
    weights = torch.zeros(1, 3, 3, 3)
    weights[0, 0, 0, 0], weights[0, 1, 0, 1], weights[0, 2, 2, 2] = 2.0, -2.0, 1.0
    values = cell(filter_grid(weights), 0, 1, 18, 3)
    assert values[0, 0].tolist() == [255, ZERO, ZERO]
    assert values[0, 1].tolist() == [ZERO, 1, ZERO]
    assert values[2, 2].tolist() == [ZERO, ZERO, round(ZERO + 63.5)]
    assert values[1, 1].tolist() == [128, 128, 128]


def test_grey_filters_each_on_their_own_scale_and_symmetrical():
    pattern = torch.tensor([[1.0, 0.5], [-0.5, -1.0]])
    weights = torch.stack([pattern, 1e-20 * pattern, -1e15 * pattern, 0 * pattern])[:, None]
    grid = filter_grid(weights)
    first, second, third, fourth = (cell(grid, i, 2, 28, 2)[..., 0].int() for i in range(4))
    assert first.flatten().tolist() == [255, 192, 64, 1]
    assert second.equal(first)
    assert third.equal(2 * ZERO - first)
    assert fourth.eq(ZERO).all()


def test_gap_is_one_pixel_on_all_sides():
    grid = filter_grid(torch.zeros(4, 1, 3, 3))
    lines = grid[: 2 * 55, :110].eq(BACKGROUND).all(2)
    assert lines.all(1).nonzero().flatten().tolist() == [0, 55]
    assert lines.all(0).nonzero().flatten().tolist() == [0, 55]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["image", "channels"])
def test_filters_that_are_not_finite_are_grey_and_counted(bad, kind, captions):
    weights = torch.ones(4, 3, 3, 3)
    weights[0, 1, 1, 1] = bad
    grid = filter_grid(weights, kind=kind)
    assert "1 of 4 not finite" in captions[-1]
    if kind == "image":
        assert cell(grid, 0, 2, 18, 3).eq(ZERO).all()
        assert cell(grid, 1, 2, 18, 3).eq(255).all()


@pytest.mark.parametrize("value", [0.0, torch.nan])
@pytest.mark.parametrize("kind", ["image", "channels"])
def test_layers_without_any_filter_to_show(value, kind):
    body = filter_grid(torch.full((5, 3, 3, 3), value), kind=kind)
    assert body.eq(ZERO).all(2).sum() > 5 * 9 * 24


def test_largest_norms_are_shown_in_their_order(captions):
    weights = torch.zeros(6, 1, 2, 2)
    weights[:, 0, 0, 0] = torch.tensor([0.1, 5.0, 0.2, 4.0, -6.0, 0.3])
    grid = filter_grid(weights, max_filters=3, name="conv1")
    assert [int(cell(grid, i, 2, 28, 2)[0, 0, 0]) for i in range(3)] == [255, 255, 1]
    expected = "conv1: 3 of 6 filters, 1 x 2 x 2, each scaled by its largest absolute weight (0 = grey)"
    assert captions == [expected]


def channel_cells(grid, rows, columns, factor, side):
    """The values of a "channels" grid; it stands at the right, above the caption."""
    pitch = side * factor + GAP
    dark = grid.eq(BACKGROUND).all(2)
    left = int((dark.sum(0) >= rows * pitch).nonzero()[0])
    top = int((dark.sum(1) >= columns * pitch).nonzero()[0])
    at = [(top + GAP + row * pitch, left + GAP + column * pitch) for row in range(rows) for column in range(columns)]
    return torch.stack([grid[y : y + side * factor : factor, x : x + side * factor : factor] for y, x in at])


def test_channels_are_grey_rows_sorted_by_norm_with_one_scale_a_row(captions):
    weights = torch.zeros(3, 2, 3, 3)
    weights[0] = 1.0
    weights[1, 0], weights[1, 1] = 10.0, -5.0
    weights[2, 0] = -2.0
    grid = filter_grid(weights, kind="channels", name="layer1")
    values = channel_cells(grid, 3, 2, 8, 3)
    assert values.eq(values[..., :1]).all()
    assert values.amin((1, 2, 3)).equal(values.amax((1, 2, 3)))
    # filters 1 (10, -5), 2 (-2, 0) and 0 (1, 1): their norms are 33.5, 6 and 4.2
    assert values[:, 0, 0, 0].tolist() == [255, 64, 1, ZERO, 255, 255]
    assert captions == [
        "layer1: 3 of 3 filters (rows, largest norm first) x 2 of 2 input channels (columns), 3 x 3, "
        "each scaled by its largest absolute weight (0 = grey)"
    ]


def test_many_channels_are_cut_to_those_of_largest_norm(captions):
    weights = torch.zeros(2, 300, 1, 1)
    weights[:, 200:264] = 1.0
    grid = filter_grid(weights, kind="channels")
    assert "x 64 of 300 input channels (columns, those of largest norm)" in captions[0]
    assert grid.shape[1] <= 1200
    values = channel_cells(grid, 2, 64, 17, 1)
    assert values.eq(255).all()


@pytest.mark.parametrize("kind", ["image", "channels"])
@pytest.mark.parametrize("count", [1, 7, 64, 1024])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 3), (7, 7), (1, 7), (7, 1), (11, 11), (32, 32)])
def test_pictures_are_seen_but_bounded(kind, count, height, width):
    weights = torch.zeros(1, 3, 1, 1).expand(count, 3, height, width)
    grid = filter_grid(weights, kind=kind, max_filters=min(count, 200))
    assert grid.dtype == torch.uint8
    assert 360 <= grid.shape[1] <= 1200
    assert grid.shape[0] <= 8000


def test_a_small_filter_is_at_least_24_pixels():
    grid = filter_grid(torch.zeros(1024, 3, 3, 3), max_filters=1024)
    dark = grid[5].eq(BACKGROUND).all(1).nonzero().flatten()
    assert int(dark.diff().min()) - GAP >= 24


def test_depthwise_filters_become_a_grid_sorted_by_norm(captions):
    weights = torch.tensor([1.0, -3.0, 2.0, -0.5])[:, None, None, None].expand(4, 1, 3, 3)
    grid = filter_grid(weights, kind="channels")
    assert [int(cell(grid, i, 2, 18, 3)[0, 0, 0]) for i in range(4)] == [1, 255, 255, 1]
    assert "largest norm first" in captions[0]


def test_weights_are_left_alone_and_any_float_will_do():
    weights = torch.nn.Parameter(torch.randn(8, 3, 5, 5).bfloat16())
    before = weights.detach().clone()
    grid = filter_grid(weights)
    assert weights.equal(before)
    assert not grid.requires_grad
    assert filter_grid(weights.double()).equal(grid)


def test_title_stands_above():
    weights = torch.zeros(4, 3, 3, 3)
    plain, titled = filter_grid(weights), filter_grid(weights, title="First $ <convolution>")
    assert titled[-plain.shape[0] :].equal(plain)
    assert titled[: -plain.shape[0]].lt(100).any()


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (torch.zeros(4, 3, 3), {}, r"floating \(F, C, kh, kw\)"),
        (torch.zeros(0, 3, 3, 3), {}, r"floating \(F, C, kh, kw\)"),
        (torch.zeros(4, 3, 3, 3, dtype=torch.int8), {}, r"floating \(F, C, kh, kw\)"),
        (torch.zeros(4, 2, 3, 3), {}, "use kind='channels'"),
        (torch.zeros(4, 3, 3, 3), {"kind": "rgb"}, "'image' or 'channels', got 'rgb'"),
        (torch.zeros(4, 3, 3, 3), {"max_filters": 0}, "max_filters must be at least 1"),
    ],
)
def test_refuses(weights, options, message):
    with pytest.raises(ValueError, match=message):
        filter_grid(weights, **options)
