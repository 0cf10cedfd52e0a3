import numpy as np
import pytest
from PIL import Image, ImageDraw

from lightning_interp.render import text as module
from lightning_interp.render.text import draw_text, text_block, text_width

LINES = ["layer1.0.conv1", "fjord", "(gyp)", "Ägypten □", "0.00104", "✓", "w" * 80]


def white(height=60, width=200):
    return np.full((height, width, 3), 255, np.uint8)


def by_pil(line, x, baseline, size, color, height=60, width=200):
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((x, baseline), line, font=module._font(size), fill=color, anchor="ls")
    return np.array(image)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("size", [10, 12, 15])
def test_lines_are_drawn_as_pil_draws_them(line, size):
    canvas = white()
    draw_text(canvas, line, 20, 30, size=size, color=(210, 35, 35))
    np.testing.assert_array_equal(canvas, by_pil(line, 20, 30, size, (210, 35, 35)))


@pytest.mark.parametrize(("x", "baseline"), [(-30, 20), (190, 30), (20, -3), (20, 3), (20, 66), (-900, 30), (500, 500)])
@pytest.mark.parametrize("upwards", [False, True])
def test_what_lies_outside_is_clipped(x, baseline, upwards):
    padded = white(60 + 2000, 200 + 2000)
    draw_text(padded, "clipped at the edge", 1000 + x, 1000 + baseline, upwards=upwards)
    canvas = white()
    draw_text(canvas, "clipped at the edge", x, baseline, upwards=upwards)
    np.testing.assert_array_equal(canvas, padded[1000:1060, 1000:1200])


def test_alignment():
    def ink(**options):
        canvas = white()
        draw_text(canvas, "layer1", 100, 30, **options)
        rows, columns = (canvas < 128).any(2).nonzero()
        return columns.min(), columns.max(), rows.min(), rows.max()

    width = text_width("layer1")
    left, right, top, bottom = ink()
    assert ink(align="right") == (left - width, right - width, top, bottom)
    assert abs(ink(align="center")[0] - (left - width / 2)) <= 1
    first, last, low, high = ink(align="center", upwards=True)
    assert (last - first, high - low) == (bottom - top, right - left)
    assert abs((low + high) / 2 - 30) <= 2
    assert first < 100


def test_text_darkens_only():
    canvas = white()
    canvas[:, :50] = 0
    draw_text(canvas, "wwwwwwwwwwww", 20, 30)
    assert (canvas[:, :50] == 0).all()


def test_the_mark_is_the_first_character_in_colour():
    plain = text_block(["✓ cat", "✓ dog"], 80)
    marked = text_block(["✓ cat", "✓ dog"], 80, mark=(30, 150, 60))
    differs = (plain != marked).any(2)
    assert differs.any()
    rows, columns = differs.nonzero(as_tuple=True)
    assert rows.max() < 20
    assert columns.max() <= 3 + text_width("✓")
    assert marked[:20, : 3 + text_width("✓")].eq(marked.new_tensor([30, 150, 60])).all(2).any()


def test_nothing_is_drawn_for_an_empty_line():
    canvas = white()
    draw_text(canvas, "", 10, 10)
    assert (canvas == 255).all()
