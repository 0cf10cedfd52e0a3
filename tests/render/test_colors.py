import matplotlib
import numpy as np
import pytest
import torch

from lightning_interp.errors import ConfigurationError
from lightning_interp.render import check_colormap, colorize, overlay


def rand(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cmap", ["jet", "viridis", "gray", "coolwarm", "tab10"])
def test_colours_equal_matplotlibs(cmap):
    values = torch.linspace(0, 1, 4097).view(1, 17, 241)
    expected = matplotlib.colormaps[cmap](values.numpy(), bytes=True)[..., :3]
    if cmap == "tab10":  # not 256 colours: the table is sampled, so only away from the steps is it exact
        values = (torch.arange(10.0) / 10 + 0.05).view(1, 1, 10)
        expected = matplotlib.colormaps[cmap](values.numpy(), bytes=True)[..., :3]
    picture = colorize(values, cmap)
    assert picture.dtype == torch.uint8
    np.testing.assert_array_equal(picture.numpy(), expected)


def test_colorize_counts_non_finite_as_zero_and_clamps():
    values = torch.tensor([[torch.nan, torch.inf, -torch.inf, -3.0, 0.0, 7.0]])
    assert colorize(values, "gray")[0, :, 0].tolist() == [0, 0, 0, 0, 0, 255]


def test_colorize_result_is_not_the_table_itself():
    colorize(torch.zeros(1, 1), "gray").fill_(99)
    assert colorize(torch.zeros(1, 1), "gray").tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_colorize_takes_any_real_dtype_and_leading_shape(dtype):
    values = torch.tensor([[0, 1]]).to(dtype).expand(2, 3, 1, 2)
    picture = colorize(values, "gray")
    assert picture.shape == (2, 3, 1, 2, 3)
    assert picture[1, 2, 0, :, 0].tolist() == [0, 255]


def test_unknown_colormap_names_near_matches():
    with pytest.raises(ConfigurationError, match=r"no colour map 'virdis'; did you mean 'viridis'"):
        check_colormap("virdis")
    with pytest.raises(ConfigurationError, match="no colour map None"):
        check_colormap(None)
    with pytest.raises(ConfigurationError):
        colorize(torch.zeros(1, 1), "no such map")
    check_colormap("jet")


def test_colorize_refuses_a_vector():
    with pytest.raises(ValueError, match=r"\(\.\.\., H, W\)"):
        colorize(torch.zeros(3))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_overlay_is_the_alpha_blend(alpha):
    images = (rand(2, 6, 5, 3) * 255).to(torch.uint8)
    heat = rand(2, 6, 5)
    expected = ((1 - alpha) * images.double() + alpha * colorize(heat).double()).round()
    out = overlay(images, heat, alpha=alpha)
    assert out.dtype == torch.uint8
    # a half may fall to either side in float32
    assert (out.double() - expected).abs().max() <= (0 if alpha in (0.0, 1.0) else 1)
    assert (out.double() != expected).double().mean() < 0.05


def test_overlay_resizes_heat_bilinearly():
    heat = torch.tensor([[[0.0, 1.0]]])
    images = torch.zeros(1, 2, 4, 3, dtype=torch.uint8)
    row = overlay(images, heat, "gray", 1.0)[0, 0, :, 0]
    assert row.equal(colorize(torch.tensor([[0.0, 0.25, 0.75, 1.0]]), "gray")[0, :, 0])


def test_overlay_survives_nan_heat():
    heat = torch.full((1, 3, 3), torch.nan)
    images = torch.full((1, 6, 6, 3), 100, dtype=torch.uint8)
    assert overlay(images, heat, "gray").unique().tolist() == [50]


@pytest.mark.parametrize(
    ("images", "heat", "alpha", "message"),
    [
        (torch.zeros(1, 4, 4, 3), torch.zeros(1, 2, 2), 0.5, "images must be uint8"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, 2), 0.5, "images must be uint8"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 2, 2), 0.5, "each of the 2 images"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 2, 2), 1.5, r"alpha must be in \[0, 1\]"),
    ],
)
def test_overlay_refuses(images, heat, alpha, message):
    with pytest.raises(ValueError, match=message):
        overlay(images, heat, alpha=alpha)
