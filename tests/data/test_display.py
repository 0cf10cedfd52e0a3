"""Images displayed as they are, with their normalisation undone, and as they were before the transfer hooks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from lightning_interp.data.probe import Probe
from tests.helpers.data import MEAN, STD, Items, bytes_of, images


def test_values_within_one_are_shown_as_they_are() -> None:
    x = images()
    assert torch.equal(Probe(x).to_display(), bytes_of(x))


def test_bytes_are_shown_as_they_are() -> None:
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    x[0, 0, 0, 0] = 255
    for values in (x, x.float(), x.double()):
        assert torch.equal(Probe(values).to_display(), x.permute(0, 2, 3, 1))


def test_anything_else_is_stretched_image_by_image() -> None:
    x = images(2) * torch.tensor([3.0, 400.0]).reshape(2, 1, 1, 1) - 1
    expected = torch.stack([(image - image.min()) / (image.max() - image.min()) for image in x])
    assert torch.equal(Probe(x).to_display(), bytes_of(expected))


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30, 0.5])
def test_constant_images_do_not_break_it(value: float) -> None:
    shown = Probe(torch.full((1, 3, 2, 2), value)).to_display()
    assert shown.unique().tolist() == [128 if value == 0.5 else 0]


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ([0.5], [0.25]), ([120.0, 110.0, 100.0], [1.0, 58.0, 57.0])])
def test_normalization_is_undone(mean: list[float], std: list[float]) -> None:
    x = images()
    scale = 255 if max(mean) > 1 else 1
    normal = (x * scale - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)
    difference = Probe(normal, mean=mean, std=std).to_display().int() - bytes_of(x).int()
    assert difference.abs().max() <= 1


def test_undone_values_are_clamped() -> None:
    x = torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert Probe(x, mean=MEAN, std=STD).to_display()[0, 0].tolist() == [[0] * 3, [255] * 3]


def test_other_numbers_of_channels() -> None:
    one, two, five = images(2, 1), images(2, 2), images(2, 5)
    five[:, 3:] = -1000
    assert torch.equal(Probe(one).to_display(), bytes_of(one.expand(-1, 3, -1, -1)))
    assert torch.equal(Probe(two).to_display(), bytes_of(two.mean(1, keepdim=True).expand(-1, 3, -1, -1)))
    assert torch.equal(Probe(five).to_display(), bytes_of(five[:, :3]))
    undone = Probe((five[:, :3] - 0.5).repeat(1, 2, 1, 1), mean=[0.5] * 6, std=[1.0] * 6)
    assert torch.equal(undone.to_display(), bytes_of(five[:, :3]))


@pytest.mark.parametrize("options", [{}, {"mean": MEAN, "std": STD}])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_what_is_not_finite_is_black(options: dict[str, Any], offset: float) -> None:
    x = images() + offset
    plain = Probe(x, **options).to_display()
    for value in (torch.nan, torch.inf, -torch.inf):
        holed = x.clone()
        holed[0, 1, 2, 3] = value
        probe = Probe(holed, **options)
        assert torch.equal(probe.images, holed) or value != value
        shown = probe.to_display()
        assert shown[0, 2, 3, 1] == 0
        shown[0, 2, 3, 1] = plain[0, 2, 3, 1]
        assert torch.equal(shown, plain)
    assert not Probe(torch.full((1, 3, 2, 2), torch.nan), **options).to_display().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_shown(dtype: torch.dtype) -> None:
    shown = Probe(images().to(dtype)).to_display()
    assert (shown.int() - bytes_of(images()).int()).abs().max() <= 1


def test_pictures_are_handed_out_as_copies() -> None:
    probe = Probe.from_dataset(Items(*images()), transfer=lambda x: x * 2 - 1)
    probe.to_display().zero_()
    assert torch.equal(probe.to_display(), bytes_of(images()))


# ---- before the transfer hooks


def normalise(batch: Any) -> Any:
    x, y = batch
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (MEAN, STD))
    return [(x.float() / (255 if x.dtype == torch.uint8 else 1) - mean) / std, y]


def normalise_in_place(batch: Any) -> Any:
    batch[0].sub_(0.5).div_(0.25)
    return batch


@pytest.mark.parametrize("transfer", [normalise, normalise_in_place, lambda batch: tuple(normalise(batch))])
def test_images_are_shown_as_they_were_before_normalisation_on_the_device(transfer: Any) -> None:
    x = images()
    expected, y = transfer([x.clone(), torch.arange(4)])
    probe = Probe.from_dataset(TensorDataset(x.clone(), torch.arange(4)), transfer=transfer)
    assert torch.equal(probe.images, expected)
    assert torch.equal(probe.to_display(), bytes_of(x))
    assert torch.equal(probe.subset([2, 1]).to_display(), bytes_of(x[[2, 1]]))
    assert torch.equal(pickle.loads(pickle.dumps(probe)).to_display(), bytes_of(x))
    assert y.tolist() == [0, 1, 2, 3]


def test_bytes_are_shown_as_they_were_before_normalisation_on_the_device() -> None:
    x = torch.randint(2, 256, (4, 3, 5, 5), dtype=torch.uint8)
    probe = Probe.from_dataset(TensorDataset(x, torch.arange(4)), transfer=normalise)
    assert torch.equal(probe.to_display(), x.permute(0, 2, 3, 1))


def test_grey_images_that_become_three_channels() -> None:
    x = images(channels=1)
    x[0] = 0.1  # constant before and after, but for rounding
    probe = Probe.from_dataset(TensorDataset(x), transfer=lambda batch: [batch[0].repeat(1, 3, 1, 1) * 2 - 1])
    assert probe.images.shape[1] == 3
    assert torch.equal(probe.to_display(), bytes_of(x.expand(-1, 3, -1, -1)))


def stretched(x: Tensor) -> Tensor:
    return torch.stack([(image - image.min()) / (image.max() - image.min()) for image in x])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(3) * 2 - 1,  # a map would lie on the wrong side
        lambda x: x.roll(2, 2) * 2 - 1,
        lambda x: x[..., :4] * 2 - 1,
        lambda x: torch.randn_like(x),
        lambda x: x.mean(1, keepdim=True) * 2 - 1,
    ],
    ids=["flip", "shift", "crop", "noise", "grey"],
)
def test_images_are_shown_as_the_model_sees_them_where_pixels_moved(
    change: Callable[[Tensor], Tensor],
) -> None:
    probe = Probe.from_dataset(TensorDataset(images()), transfer=lambda batch: [change(batch[0])])
    expected = bytes_of(stretched(probe.images).expand(-1, 3, -1, -1))
    assert torch.equal(probe.to_display(), expected)


def test_constant_images_on_which_something_was_drawn() -> None:
    probe = Probe.from_dataset(
        TensorDataset(torch.full((2, 3, 4, 4), 0.5)), transfer=lambda b: [b[0] + images(2, 3, (4, 4))]
    )
    assert torch.equal(probe.to_display(), bytes_of(stretched(probe.images)))


def test_a_transfer_that_changes_nothing_or_only_the_form() -> None:
    x = images()
    for transfer in (lambda batch: batch, lambda batch: {"image": batch[0], "label": batch[1]}):
        probe = Probe.from_dataset(TensorDataset(x, torch.arange(4)), transfer=transfer)
        assert torch.equal(probe.to_display(), bytes_of(x))
        assert probe.targets is not None


def test_unpack_reads_the_batch_after_transfer() -> None:
    x = images()
    probe = Probe.from_dataset(
        TensorDataset(x),
        transfer=lambda batch: {"camera": batch[0] * 2},
        unpack=lambda batch: batch["camera"],
    )
    # Before, the batch had no such key: only the result can be displayed.
    assert torch.equal(probe.images, x * 2)
    assert torch.equal(probe.to_display(), bytes_of(stretched(x * 2)))


def test_what_cannot_be_shown_before_is_shown_after() -> None:
    x = images() * 4 - 2
    probe = Probe.from_dataset(TensorDataset(x), transfer=lambda batch: [(batch[0] + 2) / 4])
    assert torch.equal(probe.to_display(), bytes_of((x + 2) / 4))


def test_given_normalisation_is_that_of_the_transfer() -> None:
    x = images()
    probe = Probe.from_dataset(TensorDataset(x, torch.arange(4)), transfer=normalise, mean=[0.0] * 3, std=[0.1] * 3)
    expected = normalise([x, None])[0] * 0.1
    assert torch.equal(probe.to_display(), bytes_of(expected))


class Normalized(Items):
    transform = v2.Normalize([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.items[index])


def test_normalisation_in_the_data_set_is_undone_before_a_transfer() -> None:
    x = images()
    probe = Probe.from_dataset(Normalized(*x), transfer=lambda batch: batch * 3 + 1)
    assert (probe.to_display().int() - bytes_of(x).int()).abs().max() <= 1
    # One channel is left, which does not match the three numbers.
    grey = Probe.from_dataset(Normalized(*x), transfer=lambda batch: batch[:, :1])
    assert grey.mean is None
