"""The choice of a probe's items, and reading them without side effects."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder, OxfordIIITPet
from torchvision.transforms import v2
from torchvision.utils import save_image

from lightning_interp.data.probe import Probe
from lightning_interp.data.sampling import spread_indices
from lightning_interp.errors import ConfigurationError
from tests.helpers.data import MEAN, PHOTOGRAPHS, STD, Items, bytes_of, images, streams


@given(st.data())
def test_spread_is_even_over_the_classes(data: st.DataObject) -> None:
    classes = data.draw(st.integers(1, 6))
    items_per_class = data.draw(st.integers(1, 5))
    n = data.draw(st.integers(1, 40))
    labels = data.draw(st.permutations([label for label in range(classes) for _ in range(items_per_class)]))
    dataset = TensorDataset(torch.zeros(len(labels), 1), torch.tensor(labels))
    chosen = spread_indices(dataset, n)
    assert chosen == spread_indices(dataset, n)
    assert len(set(chosen)) == len(chosen) == min(n, len(labels))
    counts = Counter(labels[index] for index in chosen)
    if n >= classes:
        assert len(counts) == classes
        assert max(counts.values()) - min(counts.values()) <= 1
    else:
        assert max(counts.values()) == 1
    for label in counts:
        members = [index for index in range(len(labels)) if labels[index] == label]
        assert [index for index in chosen if labels[index] == label] == members[: counts[label]]


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=30), st.integers(1, 40))
def test_spread_over_uneven_classes(labels: list[int], n: int) -> None:
    chosen = spread_indices(TensorDataset(torch.zeros(len(labels), 1), torch.tensor(labels)), n)
    assert len(set(chosen)) == len(chosen) == min(n, len(labels))
    counts, whole = Counter(labels[index] for index in chosen), Counter(labels)
    # A class that gave less than another by more than one has no more to give.
    if n >= len(whole):
        assert all(counts[label] >= min(whole[label], max(counts.values()) - 1) for label in whole)


@given(st.integers(1, 200), st.integers(1, 300))
def test_spread_without_labels(length: int, n: int) -> None:
    chosen = spread_indices(range(length), n)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(n, length)
    assert chosen[0] == 0
    steps = {after - before for before, after in itertools.pairwise(chosen)}
    assert not steps or max(steps) - min(steps) <= 1


def test_spread_over_more_classes_than_images() -> None:
    dataset = TensorDataset(torch.zeros(20, 1), torch.arange(20).repeat_interleave(1).flip(0))
    assert [19 - index for index in spread_indices(dataset, 4)] == [0, 5, 10, 15]


def test_spread_looks_through_other_datasets() -> None:
    first = TensorDataset(images(4), torch.tensor([0, 0, 1, 1]))
    second = TensorDataset(images(2), torch.tensor([2, 2]))
    assert spread_indices(Subset(first, [1, 0, 3]), 2) == [0, 2]
    assert spread_indices(ConcatDataset([first, second]), 3) == [0, 2, 4]


# ---- from a data set


def test_a_probe_from_a_tensor_dataset() -> None:
    x = images(6)
    probe = Probe.from_dataset(TensorDataset(x, torch.tensor([0, 0, 0, 0, 1, 2])), n=3)
    assert torch.equal(probe.images, x[[0, 4, 5]])
    assert probe.targets is not None
    assert probe.targets.tolist() == [0, 1, 2]


def test_n_larger_than_the_data_set() -> None:
    assert len(Probe.from_dataset(TensorDataset(images(3)))) == 3


def test_images_without_labels_and_a_plain_list() -> None:
    x = images()
    for dataset in (TensorDataset(x), Items(*x), list(x)):
        probe = Probe.from_dataset(dataset)
        assert torch.equal(probe.images, x)
        assert probe.targets is None


def test_unlabelled_images() -> None:
    # STL10 writes -1 for them, which no model has a logit for.
    assert Probe.from_dataset(TensorDataset(images(), torch.tensor([-1, -1, -1, -1]))).targets is None
    assert Probe.from_batch((images(), torch.tensor([0, -1, -1, -1]))).targets is None
    kept = Probe.from_batch((images(), torch.tensor([0, 1, -1, -1])), n=2).targets
    assert kept is not None
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("indices", [[3, 0], (3, 0), torch.tensor([3, 0]), np.array([3, 0])], ids=repr)
def test_given_indices(indices: Any) -> None:
    x = images()
    probe = Probe.from_dataset(TensorDataset(x, torch.arange(4)), indices)
    assert torch.equal(probe.images, x[[3, 0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": [0, 4, -1]}, "within 0 and 3 for this TensorDataset of 4 items, got 4, -1"),
        ({"indices": []}, "at least one item"),
        ({"indices": [0.5]}, "indices must be a sequence of whole numbers"),
        ({"indices": 3}, "indices must be a sequence of whole numbers"),
        ({"n": 0}, "a positive integer, got 0"),
        ({"n": 2.0}, "a positive integer, got 2.0"),
        ({"n": True}, "a positive integer, got True"),
        ({"dataset": TensorDataset(torch.zeros(0, 3, 4, 4))}, "empty TensorDataset"),
        ({"dataset": TensorDataset(torch.zeros(0, 3, 4, 4)), "indices": [0]}, "empty TensorDataset"),
        (
            {"dataset": Items({"picture": torch.zeros(3, 4, 4)})},
            "items of Items: found no images in the batch",
        ),
        ({"dataset": Items({"picture": torch.zeros(3, 4, 4)})}, "dict {picture: float32 (1, 3, 4, 4)}"),
        ({"dataset": Items(torch.zeros(4, 4))}, "images[:, None]"),
    ],
)
def test_what_no_probe_can_be_made_of(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Probe.from_dataset(**{"dataset": TensorDataset(images()), **arguments})
    assert message in str(caught.value)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("a one-shot iterable was consumed")


class SizedStream(Stream):
    def __len__(self) -> int:
        return 3


class Endless(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        raise AssertionError("an image was loaded")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "Stream"),
        (SizedStream(), "can only be iterated"),
        (Endless(), "Endless, which lacks __len__"),
        (iter([1]), "lacks __len__ and __getitem__"),
        (DataLoader(TensorDataset(images())), "Pass its data set, a TensorDataset, or a Probe"),
    ],
)
def test_what_cannot_be_indexed(dataset: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=r"Probe\(\*batch\[:2\]\)") as caught:
        Probe.from_dataset(dataset)
    assert message in str(caught.value)


def test_items_that_cannot_be_collated() -> None:
    mixed = Items((torch.zeros(3, 4, 5), 0), (torch.zeros(3, 6, 5), 1))
    with pytest.raises(ConfigurationError) as caught:
        Probe.from_dataset(mixed)
    for message in ("float32 (3, 4, 5)", "float32 (3, 6, 5)", "Resize", "collate_fn=", "pass a Probe"):
        assert message in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"tuple \(Image, int\).*ends in tensors"):
        Probe.from_dataset(FakeData(size=2, image_size=(3, 4, 4)))
    # A collate function that makes lists of them does not help.
    with pytest.raises(ConfigurationError, match=r"\(3, 4, 5\), \(3, 6, 5\)"):
        Probe.from_dataset(mixed, collate_fn=lambda items: tuple(zip(*items, strict=True)))


def test_collate_fn_and_unpack() -> None:
    x = images()
    probe = Probe.from_dataset(
        Items(*({"camera": image, "kind": index} for index, image in enumerate(x))),
        collate_fn=lambda items: {key: [item[key] for item in items] for key in items[0]},
        unpack=lambda batch: (batch["camera"], batch["kind"]),
    )
    assert torch.equal(probe.images, x)
    assert probe.targets is not None
    assert probe.targets.tolist() == [0, 1, 2, 3]


def test_an_error_while_loading_goes_through() -> None:
    class Missing(Items):
        def __getitem__(self, index: int) -> Any:
            random.random()
            raise FileNotFoundError("gone")

    state = random.getstate()
    with pytest.raises(FileNotFoundError, match="gone"):
        Probe.from_dataset(Missing(0))
    assert random.getstate() == state


class Augmented(Dataset[Any]):
    """Draws from every global stream."""

    def __init__(self) -> None:
        self.transform = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.5), v2.RandomErasing(1.0)])

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        shade = random.random() + np.random.rand() + torch.rand(()).item()
        return self.transform(images(5)[index]) * shade, index


def shuffled_collate(items: list[Any]) -> Any:
    return torch.stack([items[index][0] for index in torch.randperm(len(items))])


@pytest.mark.parametrize(
    "options",
    [{}, {"collate_fn": shuffled_collate}, {"transfer": lambda batch: [batch[0] + torch.randn(1), batch[1]]}],
    ids=["transforms", "collating", "transfer"],
)
def test_random_transforms_are_fixed_and_the_streams_untouched(options: dict[str, Any]) -> None:
    dataset, probes = Augmented(), []
    for seed in range(2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.randn(3)
        before = streams()
        probes.append(Probe.from_dataset(dataset, **options))
        assert streams() == before
    assert torch.equal(probes[0].images, probes[1].images)


def test_fake_data_leaves_the_streams_untouched() -> None:
    dataset = FakeData(size=20, image_size=(3, 4, 4), num_classes=4, transform=v2.functional.to_image)
    before = streams()
    probe = Probe.from_dataset(dataset)
    assert streams() == before
    assert probe.images.shape == (8, 3, 4, 4)
    assert probe.targets is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_streams_and_tensors_on_a_gpu() -> None:
    torch.zeros(1, device="cuda")
    before = torch.cuda.get_rng_state()
    probes = [
        Probe.from_dataset(
            TensorDataset(images(), torch.arange(4)),
            transfer=lambda batch: [batch[0].cuda() + torch.rand(1, device="cuda"), batch[1].cuda()],
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(probes[0].images, probes[1].images)
    assert probes[0].images.device.type == "cpu"
    assert torch.equal(probes[0].to_display(), bytes_of(images()))


def test_names_and_normalization_come_from_the_data_set(tmp_path: Path) -> None:
    x = (images(6, size=(8, 8)) * 255).round() / 255
    for index, image in enumerate(x):
        folder = tmp_path / ("cat", "dog")[index % 2]
        folder.mkdir(exist_ok=True)
        save_image(image, folder / f"{index}.png")
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    folder_data = ImageFolder(str(tmp_path), transform=v2.Compose(steps))
    for dataset, n in ((folder_data, 4), (Subset(folder_data, [0, 3, 1, 4]), 4)):
        probe = Probe.from_dataset(dataset, n=n)
        assert probe.mean == tuple(MEAN)
        assert probe.std == tuple(STD)
        assert probe.targets is not None
        assert [probe.class_name(int(target)) for target in probe.targets] == ["cat", "dog"] * 2
        assert torch.equal(probe.to_display(), bytes_of(x[:4]))
    renamed = Probe.from_dataset(folder_data, class_names=["a", "b"], mean=[0.5], std=[0.5])
    assert renamed.class_name(1) == "b"
    assert renamed.mean == (0.5, 0.5, 0.5)


@pytest.mark.real_data
def test_pets() -> None:
    if not (PHOTOGRAPHS / "oxford-iiit-pet").is_dir():
        pytest.skip(f"no photographs at {PHOTOGRAPHS}")
    steps = [
        v2.ToImage(),
        v2.Resize((64, 64)),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    pets = OxfordIIITPet(
        root=str(PHOTOGRAPHS),
        split="test",
        target_types=["category", "segmentation"],
        transform=v2.Compose(steps),
        target_transform=lambda pair: (
            pair[0],
            v2.functional.resize(v2.functional.pil_to_tensor(pair[1]), [64, 64]),
        ),
    )
    before = streams()
    probe = Probe.from_dataset(pets, n=37)
    assert streams() == before
    assert probe.targets is not None
    assert probe.targets.tolist() == list(range(37))  # one of each breed
    assert probe.class_name(0) == "Abyssinian"
    assert probe.mean == tuple(MEAN)
    with Image.open(pets._images[spread_indices(pets, 37)[3]]) as file:
        photograph = v2.functional.resize(v2.functional.to_image(file.convert("RGB")), [64, 64])
    difference = probe.to_display()[3].int() - photograph.permute(1, 2, 0).int()
    assert difference.abs().max() <= 1
