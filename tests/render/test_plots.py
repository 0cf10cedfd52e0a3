import subprocess
import sys
import threading

import matplotlib
import pytest
import torch

from lightning_interp.render import history_heatmap

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
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("names", "steps", "values"),
    [(["a"], [0, 1], torch.zeros(1, 1)), ([], [], torch.zeros(0, 0)), (["a"], [0], torch.zeros(1))],
)
def test_refuses(names, steps, values):
    with pytest.raises(ValueError, match=r"values must be \(layers, steps\)"):
        history_heatmap(names, steps, values, "t", "l")
