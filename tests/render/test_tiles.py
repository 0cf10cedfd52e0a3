import threading

import pytest
import torch

from lightning_interp.errors import ConfigurationError
from lightning_interp.render import Caption, ColorScale, colorize, enlarge, side_by_side, tile_grid
from lightning_interp.render.text import clean, text_width, wrap
from lightning_interp.render.tiles import FRAME, NEUTRAL, RIGHT, WRONG

GAP = 8
NASTY = [
    "a_class_name_that_is_far_too_long_to_be_shown_beneath_a_tile_of_128_pixels" * 4,
    "wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww",
    "<b>bold</b> & \"quotes\" 'single' `code` $x_1$ \\n",
    "two\nlines\r\nand\ttabs\x00\x07",
    "\U0001f408\u200d\u2b1b\ufe0f \U0001f9ff",
    "\ud800 lone surrogate",
    "猫 кошка قطة",
    "",
    "   ",
]


def picture(n=1, height=128, width=128, value=70):
    return torch.full((n, height, width, 3), value, dtype=torch.uint8)


def test_enlarge_repeats_pixels_by_a_whole_factor():
    images = torch.randint(0, 256, (2, 30, 50, 3), dtype=torch.uint8)
    out = enlarge(images)
    assert out.shape == (2, 90, 150, 3)
    assert out[:, 1::3, 1::3].equal(images)
    assert out[:, ::3, 2::3].equal(images)


def test_enlarge_keeps_what_fits():
    images = picture(2, 300, 250)
    assert enlarge(images).equal(images)
    assert enlarge(picture(1, 20, 128)).shape == (1, 20, 128, 3)


def test_enlarge_shrinks_photographs_with_antialiasing():
    assert enlarge(picture(1, 1000, 1500)).shape == (1, 213, 320, 3)
    assert enlarge(picture(1, 3000, 300)).shape == (1, 640, 64, 3)
    stripes = torch.zeros(1, 960, 960, 3, dtype=torch.uint8)
    stripes[:, :, ::3] = 180
    inner = enlarge(stripes)[:, 5:-5, 5:-5].int()
    assert (inner - 60).abs().max() <= 20  # without antialiasing the stripes are stepped over: 0


def test_enlarge_does_not_blow_up_a_column_of_pixels():
    assert max(enlarge(picture(1, 500, 1)).shape) <= 640


def test_enlarge_refuses():
    with pytest.raises(ValueError, match="images must be uint8"):
        enlarge(torch.zeros(1, 3, 3, 3))
    with pytest.raises(ValueError, match="0 < min_width <= max_width"):
        enlarge(picture(), min_width=200, max_width=100)


def test_side_by_side():
    out = side_by_side(picture(2, 5, 6, 10), picture(2, 5, 3, 20))
    assert out.shape == (2, 5, 13, 3)
    assert out[1, 2, :, 0].tolist() == [10] * 6 + [255] * 4 + [20] * 3
    with pytest.raises(ValueError, match="equal in number and height"):
        side_by_side(picture(2, 5, 6), picture(2, 4, 6))


@pytest.mark.parametrize(("correct", "color"), [(True, RIGHT), (False, WRONG), (None, NEUTRAL)])
def test_frame_says_whether_it_is_correct(correct, color):
    grid = tile_grid(picture(), [Caption(("cat",), correct)])
    frame = grid[GAP : GAP + 128 + 2 * FRAME, GAP : GAP + 128 + 2 * FRAME]
    expected = torch.tensor(color, dtype=torch.uint8)
    for edge in (frame[:FRAME], frame[-FRAME:], frame[:, :FRAME], frame[:, -FRAME:]):
        assert edge.eq(expected).all()
    assert frame[FRAME:-FRAME, FRAME:-FRAME].eq(70).all()
    assert grid[:GAP].eq(255).all()


def test_right_and_wrong_differ_without_colour():
    strips = [
        tile_grid(picture(), [Caption(("cat",), correct)])[GAP + 128 + 2 * FRAME :].lt(255).any(2)
        for correct in (True, False, None)
    ]
    assert len({strip.numpy().tobytes() for strip in strips}) == 3


def test_mark_is_drawn_without_any_line():
    grid = tile_grid(picture(), [Caption((), True)])
    assert grid[GAP + 128 + 2 * FRAME :].lt(200).any()


def test_caption_text_is_as_high_as_a_person_needs():
    grid = tile_grid(picture(), [Caption(("Hg",))])
    ink = grid[GAP + 128 + 2 * FRAME :].lt(128).all(2).any(1).nonzero()
    assert 11 <= int(ink.max() - ink.min()) + 1 <= 14


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("correct", [True, None])
def test_any_text_stays_beneath_its_tile(text, correct):
    captions = [Caption((text, text), correct), Caption((), None)]
    grid = tile_grid(picture(2), captions, columns=2, title=text, scale=ColorScale("jet", text, text, text))
    below = slice(GAP + 128 + 2 * FRAME, None)
    alone = tile_grid(picture(2), captions, columns=2)[below]
    tile_right = GAP + 128 + 2 * FRAME
    assert alone[:, tile_right:].eq(255).all()
    assert alone[:, tile_right - 2 : tile_right].eq(255).all()
    assert grid.dtype == torch.uint8
    assert grid.shape[1] == 320
    assert grid[:, -2:].eq(255).all()


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("width", [1, 20, 130])
def test_wrapped_rows_fit(text, width):
    rows = wrap(text, width, max_rows=3)
    assert len(rows) <= 3
    assert all(text_width(row) <= width or len(row) == 1 for row in rows)


def test_wrap_prefers_words_and_keeps_the_number_at_the_end():
    assert wrap("great grey owl", 70) == ["great grey", "owl"]
    assert wrap("american_pit_bull_terrier", 110) == ["american_pit_", "bull_terrier"]
    (row,) = wrap("staffordshire bull terrier 0.93", 130, max_rows=1)
    assert row.startswith("staff")
    assert row.endswith("… 0.93")


def test_wrap_loses_nothing_where_there_is_room():
    text = "the quick brown fox jumps_over the lazy dog"
    assert "".join(wrap(text, 60, max_rows=20)).replace(" ", "") == text.replace(" ", "")


def test_clean_leaves_one_drawable_line():
    assert clean("a\n\tb\x00c\u200d") == "a b c"
    assert clean("e\u0301") == "é"
    assert clean("✓ ✗ \U0001f408") == "✓ ✗ □"


def test_every_tile_is_wide_enough_for_its_caption():
    assert tile_grid(picture(1, 28, 28), [Caption()]).shape[1] == 140 + 2 * FRAME + 2 * GAP
    tall = tile_grid(picture(1, 5000, 1), [Caption()])
    assert tall.shape[1] == 128 + 2 * FRAME + 2 * GAP
    assert tall.shape[0] < 2500


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (8, 4), (9, 3), (12, 4), (16, 4), (36, 6)]
)
def test_default_columns(count, columns):
    grid = tile_grid(picture(count, 128, 128), [Caption()] * count)
    pitch = 128 + 2 * FRAME + GAP
    rows = -(-count // columns)
    assert grid.shape == (rows * pitch + GAP, columns * pitch + GAP, 3)


def test_pairs_stand_two_across():
    wide = side_by_side(picture(8), picture(8))
    assert tile_grid(wide, [Caption()] * 8).shape[1] == 2 * (260 + 2 * FRAME + GAP) + GAP


def test_tiles_keep_their_order_and_the_columns_asked_for():
    tiles = torch.stack([picture(1, value=10 * i)[0] for i in range(5)])
    grid = tile_grid(tiles, [Caption()] * 5, columns=2)
    pitch = 128 + 2 * FRAME + GAP
    centres = grid[pitch // 2 :: pitch, pitch // 2 :: pitch, 0]
    assert centres.tolist() == [[0, 10], [20, 30], [40, 255]]


def test_title_and_scale_stand_above_and_below():
    plain = tile_grid(picture(3), [Caption()] * 3)
    full = tile_grid(picture(3), [Caption()] * 3, title="Grad-CAM", scale=ColorScale("viridis", "0", "1", "score"))
    above = (full == 70).all(2).any(1).nonzero()[0].item() - FRAME - GAP
    assert above > 15
    assert full[:above].lt(100).any()
    assert full[above : above + plain.shape[0]].equal(plain)
    below = full[above + plain.shape[0] :]
    ends = colorize(torch.tensor([[0.0, 1.0]]), "viridis")[0]
    assert below.eq(ends[0]).all(2).any()
    assert below.eq(ends[1]).all(2).any()


def test_grid_refuses():
    with pytest.raises(ValueError, match="each of the 2 tiles is expected, got 1"):
        tile_grid(picture(2), [Caption()])
    with pytest.raises(ValueError, match="tiles must be uint8"):
        tile_grid(picture(2)[:0], [])
    with pytest.raises(ValueError, match="columns must be at least 1"):
        tile_grid(picture(2), [Caption()] * 2, columns=0)
    with pytest.raises(ValueError, match=r"write \(text,\)"):
        Caption("cat")
    with pytest.raises(ConfigurationError):
        tile_grid(picture(1), [Caption()], scale=ColorScale("nope", "", "", ""))


def test_grid_is_the_same_from_many_threads():
    def draw():
        results.append(tile_grid(picture(4), [Caption(("cat 0.5", "dog"), True)] * 4, title="t"))

    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result.equal(results[0]) for result in results)
