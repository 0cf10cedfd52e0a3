from __future__ import annotations

import io
import math
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import tqdm.auto
from captum.attr import Occlusion
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import occlusion, perturbation, rise
from lightning_interp.explain._windowed import Windowed
from lightning_interp.explain.perturbation import patch_starts
from tests.helpers import references
from tests.helpers.states import assert_same, unchanged
from tests.helpers.zoo import ANIMALS, Animal, Net, animal

TARGETS = torch.tensor([0, 1, 2])


def multiples_of_eight(kind: Animal) -> Tensor:
    return F.interpolate(kind.images(), (32, 40))


@pytest.mark.parametrize("fill", [0.0, 0.7])
@pytest.mark.parametrize("name", ["plain", "resnet", "vgg_bn", "densenet", "convnext", "squeezenet"])
def test_occlusion_is_captums(name: str, fill: float) -> None:
    kind = animal(name)
    images = multiples_of_eight(kind)
    expected = Occlusion(kind.model.eval()).attribute(images, (3, 8, 16), (3, 8, 4), fill, TARGETS).detach()
    got = occlusion(kind.model, images, TARGETS, patch=(8, 16), stride=(8, 4), fill=fill)
    assert_same(got, expected[:, 0].float())


@pytest.mark.parametrize("name", ["plain", pytest.param("resnet", marks=pytest.mark.matrix), "flattening"])
@pytest.mark.parametrize(("patch", "stride", "fill"), [(0.3, 0.15, None), (0.2, 0.2, 0.5), (1.0, 1.0, 0.0)])
def test_occlusion_is_the_reference(name: str, patch: float, stride: float, fill: float | None) -> None:
    kind = animal(name)
    options: dict[str, Any] = {"patch": patch, "stride": stride, "fill": fill}
    expected = references.occlusion(kind.model, kind.images(), TARGETS, **options)
    assert_same(occlusion(kind.model, kind.images(), TARGETS, **options), expected)


@pytest.mark.parametrize("rows", [1, 1000])
def test_how_many_positions_run_at_once_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = animal("plain")
    expected = occlusion(kind.model, kind.images(), TARGETS)
    masked = rise(kind.model, kind.images(), TARGETS, n_masks=20)
    monkeypatch.setattr(perturbation, "rows_per_pass", lambda device, cpu, other: rows)
    assert_same(occlusion(kind.model, kind.images(), TARGETS), expected)
    assert_same(rise(kind.model, kind.images(), TARGETS, n_masks=20), masked)


def test_an_important_patch_is_found() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 400, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    model[1].weight.data.view(2, 3, 20, 20)[1, :, 8:12, 4:8] = 1
    images = torch.rand(2, 3, 20, 20) + 1
    maps = occlusion(model, images, 1, patch=4, stride=4, fill=0.0)
    lost = images[:, :, 8:12, 4:8].sum((1, 2, 3))
    expected = torch.zeros_like(maps)
    expected[:, 8:12, 4:8] = lost[:, None, None]
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-5)


def test_every_pixel_is_covered() -> None:
    for side in range(1, 40):
        for patch in (1, 3, 0.2, 0.5, 1.0):
            for stride in (1, 0.1, 0.2):
                if isinstance(patch, int) and patch > side:
                    continue
                length = patch if isinstance(patch, int) else max(1, round(patch * side))
                step = stride if isinstance(stride, int) else max(1, round(stride * side))
                if step > length:
                    continue
                starts = patch_starts((side, side), patch, stride)[0]
                covered = {pixel for start in starts for pixel in range(start, start + length)}
                assert covered == set(range(side))
                assert starts == sorted(set(starts))


def test_the_values_at_each_position() -> None:
    kind = animal("plain")
    model, images = kind.model.eval(), kind.images()
    tops, lefts = patch_starts((14, 18), 6, 4)
    assert (tops, lefts) == ([0, 4, 8], [0, 4, 8, 12])
    clean = model(images).detach()
    values = {
        returns: occlusion(model, images, TARGETS, patch=6, stride=4, fill=0.0, returns=returns)  # type: ignore[arg-type]
        for returns in ("drop", "probability", "predicted")
    }
    for number, target in enumerate(TARGETS.tolist()):
        for row, top in enumerate(tops):
            for column, left in enumerate(lefts):
                hidden = images[number : number + 1].clone()
                hidden[..., top : top + 6, left : left + 6] = 0
                logits = model(hidden).detach()[0]
                expected = {
                    "drop": clean[number, target] - logits[target],
                    "probability": logits.softmax(0)[target],
                    "predicted": logits.argmax(),
                }
                for name, value in expected.items():
                    torch.testing.assert_close(values[name][number, row, column], value, atol=1e-5, rtol=1e-4)
    assert values["predicted"].dtype == torch.int64
    assert values["drop"].shape == (3, 3, 4)


def test_the_probability_of_one_logit() -> None:
    kind = animal("one_logit")
    one, zero = (
        occlusion(kind.model, kind.images(), target, patch=0.5, stride=0.5, returns="probability") for target in (1, 0)
    )
    torch.testing.assert_close(one + zero, torch.ones_like(one))
    predicted = occlusion(kind.model, kind.images(), 0, patch=0.5, stride=0.5, returns="predicted")
    assert torch.equal(predicted, (one > 0.5).long())


def test_what_hides_the_image() -> None:
    kind = animal("plain")
    images = kind.images()

    def maps(fill: Any, **options: Any) -> Tensor:
        return occlusion(kind.model, images, 1, patch=0.5, stride=0.5, fill=fill, **options)

    means = images.mean((2, 3), keepdim=True)
    torch.testing.assert_close(maps(None), maps(means))
    torch.testing.assert_close(maps(None), maps("mean"))
    torch.testing.assert_close(maps(0.5), maps(torch.full((3,), 0.5)))
    torch.testing.assert_close(maps(images), torch.zeros(3, 14, 18), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps(images.flip(0)), maps(images.flip(0), batch_size=2))
    assert not torch.allclose(maps("blur"), maps(None))


@pytest.mark.parametrize("make", [tuple, list, np.array, np.float32, torch.tensor], ids=lambda make: make.__name__)
def test_a_colour_is_one_number_for_each_channel(make: Any) -> None:
    kind = animal("plain")
    expected = occlusion(
        kind.model, kind.images(), 1, patch=0.5, stride=0.5, fill=torch.tensor([0.1, 0.5, 0.9]).view(1, 3, 1, 1)
    )
    got = occlusion(kind.model, kind.images(), 1, patch=0.5, stride=0.5, fill=make([0.1, 0.5, 0.9]))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 0}, r"patch takes pixels \(an int from 1 to the image's 9\) or a share of the side .*, got 0"),
        ({"patch": 10}, "patch takes pixels .*, got 10"),
        ({"patch": 1.5}, r"patch takes pixels .*, got 1\.5"),
        ({"patch": True}, "patch takes pixels .*, got True"),
        ({"patch": (3, 3, 3)}, r"patch takes pixels .*, got \(3, 3, 3\)"),
        ({"stride": 0.0}, r"stride takes pixels .*, got 0\.0"),
        ({"patch": 2, "stride": 3}, "stride takes at most the patch, .*; got 3 pixels for a patch of 2"),
        ({"fill": "grey"}, "baselines takes None, .*, got 'grey'"),
        ({"fill": (0.1, 0.5)}, r"fill takes a number, 3 of them .*, got tuple \(float, float\)"),
        ({"fill": ["mean", 0.5, 0.5]}, r"fill takes a number, 3 of them .*, got list \(str, float, float\)"),
        ({"fill": True}, "baselines takes None, .*, got bool"),
        ({"patch": "a"}, "patch takes pixels .*, got 'a'"),
        ({"returns": "boxes"}, "returns takes 'map', 'drop', 'probability' or 'predicted', got 'boxes'"),
        ({"returns": "probability", "targets": lambda output: output[:, 0]}, "a callable's score has no probability"),
    ],
)
def test_occlusions_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with unchanged(model := Net()), pytest.raises(ConfigurationError, match=message):
        occlusion(model, torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)), **options)


# ---- what a window can change


@pytest.mark.parametrize("kind", ANIMALS, ids=lambda kind: kind.name)
def test_windows_give_what_whole_images_give(kind: Animal, monkeypatch: pytest.MonkeyPatch) -> None:
    images = kind.images(2)
    options: dict[str, Any] = {"patch": 0.25, "stride": 0.15, "returns": "drop"}
    targets = torch.tensor([0, 1])
    got = occlusion(kind.model, images, targets, **options)
    monkeypatch.setattr(perturbation, "Windowed", Whole)
    torch.testing.assert_close(got, occlusion(kind.model, images, targets, **options), atol=1e-6, rtol=1e-4)


class Whole(Windowed):
    """Copies that are plain tensors from the beginning."""

    @staticmethod
    def __new__(cls, *args: Any) -> Any:
        return Windowed(*args).full()


def copies(side: int = 20, n: int = 5) -> tuple[Windowed, Tensor]:
    starts = torch.randint(side - 4, (2, n)).tolist()
    made = Windowed(torch.rand(1, 4, side, side), torch.rand(n, 4, 5, 4), *starts)
    return made, Windowed(made._windows.base, made._windows.inside, *starts).full()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(4, 6, (5, 2), stride=(3, 1), padding=(2, 1)),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2),
        nn.Conv2d(4, 6, 7, stride=2, padding=3),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(4, 8, 2, stride=4),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.SiLU(inplace=True),
        nn.Dropout(),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)),
    ],
    ids=str,
)
def test_local_layers_stay_local(module: nn.Module) -> None:
    module.eval()
    for _ in range(5):
        some, whole = copies()
        with torch.no_grad():
            got, expected = module(some), module(whole)
        assert isinstance(got, Windowed)
        assert got._windows is not None
        assert got.shape == expected.shape
        torch.testing.assert_close(got.full(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool2d(3),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
        nn.Upsample(scale_factor=2),
        nn.Flatten(),
        nn.Softmax(1),
    ],
    ids=str,
)
def test_other_layers_run_on_whole_images(module: nn.Module) -> None:
    some, whole = copies()
    with torch.no_grad():
        got = module.eval()(some)
        torch.testing.assert_close(got, module(whole), atol=1e-5, rtol=1e-4)
    assert not isinstance(got, Windowed)


def test_batch_statistics_are_those_of_whole_images() -> None:
    some, whole = copies()
    norm = nn.BatchNorm2d(4, track_running_stats=False).eval()
    torch.testing.assert_close(norm(some), norm(whole))


def test_sums_and_concatenations_of_different_windows() -> None:
    some, whole = copies()
    conv, pool = nn.Conv2d(4, 4, 5, padding=2), nn.MaxPool2d(3, 1, 1)
    with torch.no_grad():
        for combine in (
            lambda x: conv(x) + x,
            lambda x: x - pool(x),
            lambda x: conv(x) * x.sigmoid(),
            lambda x: torch.cat([x, conv(x), pool(x)], 1),
            lambda x: torch.cat([x, conv(x)], dim=1),
            lambda x: 2 * x + 1 - x / 3,
            lambda x: x * torch.arange(4.0).view(1, 4, 1, 1) + torch.ones(4, 1, 1),
            lambda x: torch.relu(input=x) + torch.dropout(x, 0.5, False),
        ):
            made = Windowed(some._windows.base, some._windows.inside, some._windows.tops, some._windows.lefts)  # type: ignore[union-attr]
            got, expected = combine(made), combine(whole)
            assert isinstance(got, Windowed)
            torch.testing.assert_close(got.full(), expected, atol=1e-5, rtol=1e-4)
        for mixed in (
            lambda x: x + torch.arange(20.0),
            lambda x: torch.cat([x, x], 2),
            lambda x: torch.cat([x, x.mean((2, 3), keepdim=True).expand_as(x)], 1),
            lambda x: x + x.flip(3),
            lambda x: x @ x,
            lambda x: x[:, 1:],
            lambda x: x.where(x > 0.5, -x),
            lambda x: torch.cat([x, x], axis=1),  # type: ignore[call-overload]
            lambda x: torch.cat([x, x], 1, out=torch.empty(0)),
            lambda x: torch.add(x, other=x),
            lambda x: torch.mul(input=x, other=2.0),
            lambda x: torch.sigmoid(x, out=torch.empty(0)),
            lambda x: torch.dropout(x, p=0.5, train=False),
            lambda x: torch.batch_norm(
                x,
                weight=torch.full((4,), 2.0),
                bias=torch.zeros(4),
                running_mean=torch.ones(4),
                running_var=torch.full((4,), 3.0),
                training=False,
                momentum=0.1,
                eps=1e-5,
                cudnn_enabled=False,
            ),
        ):
            made = Windowed(some._windows.base, some._windows.inside, some._windows.tops, some._windows.lefts)  # type: ignore[union-attr]
            torch.testing.assert_close(mixed(made), mixed(whole))


def test_what_is_changed_in_place_is_changed_for_all() -> None:
    def run(x: Tensor) -> Tensor:
        x = x * 2 - 1
        y = x.clone()
        F.relu_(x)
        x += y
        x.add_(x)
        return x * y

    some, whole = copies()
    torch.testing.assert_close(run(some).full(), run(whole))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change", [lambda y: y.add_(1), lambda y: y.add_(y.clone()), lambda y: y.copy_(y.flip(3)), lambda y: F.relu_(y - 1)]
)
def test_what_is_detached_shares_its_values(change: Any) -> None:
    def run(x: Tensor) -> Tensor:
        y = x.detach()
        change(y)
        return x * 2

    some, whole = copies()
    got = run(some)
    torch.testing.assert_close(got.full() if isinstance(got, Windowed) else got, run(whole))


class Foreign(Net):
    """Bypasses ``__torch_function__``, as compiled extensions do."""

    def features(self, images: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return super().features(images)


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_part_that_bypasses_the_functions_gets_whole_images(context: Any) -> None:
    torch.manual_seed(0)
    expected = occlusion(Net(), images := torch.rand(2, 3, 20, 20), 1)
    torch.manual_seed(0)
    with context():
        assert_same(occlusion(Foreign(), images, 1), expected)
    classes = occlusion(Foreign(), images, 1, returns="predicted")
    assert torch.equal(classes, classes[:, :1, :1].expand_as(classes))


def bright(images: Tensor) -> Tensor:
    return (images > 0.5).float()


def test_a_scripted_function_gets_whole_images() -> None:
    # TorchScript bypasses __torch_function__, and a comparison of missing values would not fail.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(bright)
    model, images = Net(), torch.rand(1, 3, 20, 20)
    expected = occlusion(model, images, 1, predict=lambda model, images: model(bright(images)))
    assert expected.any()
    assert_same(occlusion(model, images, 1, predict=lambda model, images: model(scripted(images))), expected)


def test_a_part_that_reads_memory_gets_whole_images() -> None:
    class Reading(Net):
        def features(self, images: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():  # as an extension does
                images.tolist()
            return super().features(images)

    torch.manual_seed(0)
    expected = occlusion(Net(), images := torch.rand(2, 3, 20, 20), 1)
    torch.manual_seed(0)
    assert_same(occlusion(Reading(), images, 1), expected)


@pytest.mark.parametrize("explainer", [occlusion, rise], ids=lambda explainer: explainer.name)
def test_an_error_of_the_models_own_is_raised_by_the_first_run(explainer: Any) -> None:
    runs = []

    class Failing(Net):
        def features(self, images: Tensor) -> Tensor:
            if len(images) > 2:
                runs.append(len(images))
                raise RuntimeError("too many images")
            return super().features(images)

    with unchanged(model := Failing()), pytest.raises(RuntimeError, match="too many images"):
        explainer(model, torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)), 1)
    assert len(runs) == 1


@pytest.mark.parametrize("explainer", [occlusion, rise], ids=lambda explainer: explainer.name)
def test_a_bar_shows_how_far_it_is(explainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tqdm.auto.tqdm):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            self.options = options
            super().__init__(**options | {"disable": False, "delay": 0, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    options = {"n_masks": 20} if explainer is rise else {"patch": 3, "stride": 3}
    explainer(Net(), torch.rand(2, 3, 9, 9), 1, **options)
    (bar,) = bars
    assert bar.n == bar.total == {occlusion: 2 * 9, rise: 2 * 20}[explainer]
    assert bar.options["disable"] is None  # on a terminal only
    assert 1 <= bar.options["delay"] <= 10  # seconds, so that short work shows none


def test_a_look_into_windows_is_an_error() -> None:
    some, _ = copies()
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(RuntimeError, match="reads the values of a windowed tensor"),
    ):
        some.contiguous()


# ---- RISE


@pytest.mark.parametrize("name", ["plain", "resnet"])
def test_rise_is_the_reference(name: str) -> None:
    kind = animal(name)
    options: dict[str, Any] = {"n_masks": 9, "grid": 5, "p": 0.3}
    expected = references.rise(kind.model, kind.images(), TARGETS, **options)
    assert_same(rise(kind.model, kind.images(), TARGETS, **options), expected)


def shown(side: int, grid: int) -> Tensor:
    """(shifts, side, grid): the weight of each cell in each pixel along one axis of a mask, as in the paper.

    The cells are enlarged bilinearly to (grid + 1) * ceil(side / grid), and cropped at a shift of less than a cell.
    """
    cell = math.ceil(side / grid)
    pixels = torch.arange(cell)[:, None] + torch.arange(side)
    positions = ((pixels + 0.5) * grid / ((grid + 1) * cell) - 0.5).clamp(0, grid - 1)  # counted in cells' centres
    return (1 - (positions[..., None] - torch.arange(grid)).abs()).clamp(min=0)


def test_rise_of_a_linear_model_comes_to_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    # Cells are open with probability p, each by itself, so that two pixels' E[m m'] is p^2, and p (1 - p) times what
    # they share of cells. The paper divides by n p, the sum of the masks in expectation; we divide by what each pixel
    # was really shown, which comes to the same.
    monkeypatch.setattr(perturbation, "rows_per_pass", lambda device, cpu, other: 1000)
    model, images, p = nn.Sequential(nn.Flatten(), nn.Linear(3 * 10 * 14, 2)), torch.rand(2, 3, 10, 14), 0.3
    shares = (model[1].weight[1].view(3, 10, 14) * images).sum(1).detach()
    down, across = (torch.einsum("syc,szc->yz", each, each) / len(each) for each in (shown(10, 4), shown(14, 4)))
    expected = (1 - p) * down @ shares @ across + p * shares.sum((1, 2), keepdim=True) + model[1].bias[1].detach()
    maps = rise(model, images, 1, n_masks=20_000, grid=4, p=p)
    # So many masks come to a tenth of the map's spread; masks whose corners meet the cells' miss it by half or more.
    assert ((maps - expected).abs() < 0.2 * expected.std((1, 2), keepdim=True)).all()


def test_rise_finds_what_counts() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 400, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    model[1].weight.data.view(2, 3, 20, 20)[1, :, 4:8, 12:16] = 1
    maps = rise(model, torch.ones(1, 3, 20, 20), 1, n_masks=400, grid=5)
    assert divmod(int(maps[0].argmax()), 20)[0] in range(3, 9)
    assert divmod(int(maps[0].argmax()), 20)[1] in range(11, 17)


def test_rise_with_open_masks_is_the_score() -> None:
    kind = animal("plain")
    scores = kind.model.eval()(kind.images()).detach()[torch.arange(3), TARGETS]
    maps = rise(kind.model, kind.images(), TARGETS, n_masks=2, p=1)
    torch.testing.assert_close(maps, scores[:, None, None].expand_as(maps))
    probable = rise(kind.model, kind.images(), TARGETS, n_masks=2, p=1.0, score="probability")
    chances = kind.model(kind.images()).detach().softmax(1)[torch.arange(3), TARGETS]
    torch.testing.assert_close(probable, chances[:, None, None].expand_as(maps))


def test_a_constant_score_gives_a_constant_map() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 400, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].bias, 7.0)
    maps = rise(model, torch.rand(2, 3, 20, 20), 1, n_masks=60)
    torch.testing.assert_close(maps, torch.full_like(maps, 7.0))


def test_rises_masks_are_the_images_own() -> None:
    kind = animal("plain")
    images = kind.images(5)

    def maps(**options: Any) -> Tensor:
        return rise(kind.model, images, 1, n_masks=6, **options)

    assert torch.equal(maps(), maps())
    torch.testing.assert_close(maps(), maps(batch_size=2))
    seeded = [maps(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(*seeded[:2])
    assert not torch.equal(*seeded[1:])
    again = maps(generator=torch.Generator().manual_seed(1), batch_size=2)
    torch.testing.assert_close(seeded[0], again)


def test_rise_draws_the_masks_of_an_image_together(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        torch, "rand", lambda *size, rand=torch.rand, **options: drawn.append(size) or rand(*size, **options)
    )
    rise(Net(), torch.full((2, 3, 9, 9), 0.5), 1, n_masks=40, grid=4)
    assert drawn == [(40, 4, 4)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_masks": 0}, "n_masks takes a positive integer, got 0"),
        ({"grid": 2.0}, r"grid takes a positive integer, got 2\.0"),
        ({"n_masks": True}, "n_masks takes a positive integer, got True"),
        ({"p": 0}, "p takes a share of open cells above 0, at most 1, got 0"),
        ({"p": "a"}, "p takes a share of open cells above 0, at most 1, got 'a'"),
        ({"p": float("nan")}, "p takes a share of open cells .*, got nan"),
        ({"score": "softmax"}, "score takes 'logit' or 'probability', got 'softmax'"),
        ({"score": "probability", "targets": lambda output: output[:, 0]}, "a callable's score has no probability"),
    ],
)
def test_rises_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rise(Net(), torch.rand(2, 3, 9, 9), **options)
