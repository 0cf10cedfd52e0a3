import subprocess
import sys
import threading
from itertools import pairwise

import matplotlib
import pytest
import torch

from lightning_interp.render import history_heatmap
from lightning_interp.render import plots as module

GREY = torch.tensor([211, 211, 211], dtype=torch.uint8)  # "lightgrey"


def count(picture, color):
    return int(picture.eq(torch.as_tensor(color, dtype=torch.uint8)).all(2).sum())


def viridis(share):
    return [round(255 * part) for part in matplotlib.colormaps["viridis"](share)[:3]]


def test_positive_values_are_coloured_by_their_logarithm():
    picture = history_heatmap(["a", "b", "c"], [0], torch.tensor([[1.0], [10.0], [100.0]]), "t", "norm")
    column = picture[:, picture.shape[1] // 3]
    for share in (0.0, 0.5, 1.0):
        # within the neighbouring entry of the colour table
        assert int(((column.int() - torch.tensor(viridis(share))).abs() <= 2).all(1).sum()) >= 20


def test_signed_values_are_coloured_as_they_are():
    picture = history_heatmap(["a", "b", "c"], [0], torch.tensor([[-1.0], [0.0], [1.0]]), "t", "norm")
    column = picture[:, picture.shape[1] // 3]
    for share in (0.0, 0.5, 1.0):
        # within the neighbouring entry of the colour table
        assert int(((column.int() - torch.tensor(viridis(share))).abs() <= 2).all(1).sum()) >= 20


def test_missing_values_are_grey_and_zeros_black():
    values = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf], [0.0, 3.0]])
    picture = history_heatmap(["a", "b", "c"], [0, 1], values, "t", "norm")
    quarter = 150 * 30  # one of the six cells, less its border
    assert 1.8 * quarter < count(picture, GREY) < 2.2 * quarter
    assert 0.8 * quarter < count(picture, (0, 0, 0)) < 1.6 * quarter  # and the axes


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30, 1e30, torch.nan, torch.inf])
@pytest.mark.parametrize(("layers", "steps"), [(1, 1), (3, 4)])
def test_constants_of_any_size(value, layers, steps):
    names = [f"layer{i}" for i in range(layers)]
    picture = history_heatmap(names, range(steps), torch.full((layers, steps), value), "title", "label")
    assert picture.dtype == torch.uint8
    assert picture.shape[2] == 3
    assert (count(picture, GREY) > 10_000) == (value in (torch.inf,) or value != value)


def test_height_grows_up_to_120_layers_and_then_stays():
    heights = [
        history_heatmap([f"layer{i}.weight" for i in range(n)], [0, 1], torch.rand(n, 2), "t", "l").shape[0]
        for n in (10, 50, 120, 400)
    ]
    assert heights[1] - heights[0] == 40 * 18
    assert heights[2] - heights[1] == 70 * 18
    assert heights[3] == heights[2]


def test_names_are_inside_the_picture_whatever_they_are():
    names = ["$x^$ \\frac{", "<b>\n\U0001f408</b>", "w" * 300, "", "_a_"]
    picture = history_heatmap(names, [10**9] * 3, torch.rand(5, 3), "t$" * 200, "l$ \U0001f408" * 100)
    assert picture[:, :2].eq(255).all()
    assert picture[:, -2:].eq(255).all()
    assert picture[:2].eq(255).all()
    assert picture.shape[1] < 1000


@pytest.mark.parametrize("layers", [1, 3, 200])
def test_a_long_label_leaves_the_title_alone(layers):
    arguments = ([f"layer{i}" for i in range(layers)], [0, 1], torch.rand(layers, 2))
    plain = history_heatmap(*arguments, "title" * 100, "l")
    assert history_heatmap(*arguments, "title" * 100, "label " * 100)[:34].equal(plain[:34])


def test_zero_in_a_log_scale_and_what_is_below_it():
    values = torch.tensor([[1e8, 1.0, 0.99, 0.0]])
    colors = module._Scale.of(values.double().numpy()).colors(values.double().numpy())[0]
    table = module._Scale.table()
    assert colors.tolist() == [table[-1].tolist(), table[0].tolist(), [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("values", [[[1.0, 100.0]], [[-4.0, 12.0]], [[0.5, 0.5]], [[0.0, 0.0]], [[torch.nan, -3.0]]])
def test_the_bar_says_which_value_has_which_colour(values):
    table = torch.tensor(values).double().numpy()
    scale = module._Scale.of(table)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = torch.tensor([scale.value_at(share)]).double().numpy()
        index = next(i for i, color in enumerate(scale.table().tolist()) if color == scale.colors(value)[0].tolist())
        assert abs(index - share * 256) <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 20, 60, 5000])
@pytest.mark.parametrize("spacing", [1, 2, 3, 7, 100])
def test_labelled_columns_are_apart_and_the_last_is_among_them(count, spacing):
    columns = module._labelled_columns(count, spacing)
    assert columns[-1] == count - 1
    assert len(columns) == 1 or columns[0] == 0
    assert all(right - left >= spacing for left, right in pairwise(columns))
    assert len(columns) >= (count - 1) // spacing


@pytest.mark.parametrize(("count", "first"), [(1, 0), (60, 0), (60, 10**9 - 60)])
def test_no_step_is_clipped_or_runs_into_another(monkeypatch, count, first):
    drawn = []

    def spy(canvas, text, x, baseline, *, align="left", upwards=False, **options):
        if align == "center" and not upwards and text != "step":
            half = module.text_width(text, 12) / 2
            drawn.append((x - half, x + half))

    monkeypatch.setattr(module, "draw_text", spy)
    width = history_heatmap(["a"], range(first, first + count), torch.rand(1, count), "t", "l").shape[1]
    assert drawn
    assert min(drawn)[0] >= 0
    assert max(drawn)[1] <= width
    assert all(left[1] + 5 < right[0] for left, right in pairwise(drawn))


def test_many_steps_are_bounded():
    assert history_heatmap(["a"], range(5000), torch.rand(1, 5000), "t", "l").shape[1] < 1000


def test_the_users_style_changes_nothing():
    arguments = (["a", "b"], [0, 1], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "title", "label")
    plain = history_heatmap(*arguments)
    with matplotlib.rc_context(
        {
            "text.color": "white",
            "axes.facecolor": "black",
            "figure.facecolor": "black",
            "xtick.color": "white",
            "axes.labelcolor": "white",
            "axes.grid": True,
            "font.family": "serif",
            "image.cmap": "gray",
            "image.origin": "lower",
        }
    ):
        assert history_heatmap(*arguments).equal(plain)


def test_drawn_alike_on_another_thread():
    arguments = (["a"], [0], torch.ones(1, 1), "title", "label")
    results = []
    thread = threading.Thread(target=lambda: results.append(history_heatmap(*arguments)))
    thread.start()
    thread.join()
    assert results[0].equal(history_heatmap(*arguments))


def test_pyplot_is_never_loaded_and_matplotlib_only_when_used():
    code = (
        "import sys, torch, lightning_interp.render as render\n"
        "assert 'matplotlib' not in sys.modules\n"
        "render.history_heatmap(['a'], [0], torch.ones(1, 1), 't', 'l')\n"
        "render.tile_grid(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [render.Caption(('a',))])\n"
        "assert not {'matplotlib.pyplot', 'matplotlib.figure'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("names", "steps", "values"),
    [(["a"], [0, 1], torch.zeros(1, 1)), ([], [], torch.zeros(0, 0)), (["a"], [0], torch.zeros(1))],
)
def test_refuses(names, steps, values):
    with pytest.raises(ValueError, match=r"values must be \(layers, steps\)"):
        history_heatmap(names, steps, values, "t", "l")
