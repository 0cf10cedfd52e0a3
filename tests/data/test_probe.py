from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
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
from torchvision import tv_tensors
from torchvision.datasets import FakeData, ImageFolder, OxfordIIITPet
from torchvision.transforms import v2
from torchvision.utils import save_image

from lightning_interp.data.probe import Probe
from lightning_interp.data.sampling import spread_indices
from lightning_interp.errors import ConfigurationError

DATA = Path(__file__).parents[3] / "shared" / "data"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def images(n: int = 4, channels: int = 3, size: tuple[int, int] = (6, 5)) -> Tensor:
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(n))


def bytes_of(values: Tensor) -> Tensor:
    """(N, 3, H, W) within [0, 1] -> (N, H, W, 3) uint8."""
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class Items(Dataset[Any]):
    """A data set of given items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


# ---- the probe itself


def test_a_probe_keeps_what_it_was_given() -> None:
    x = images(2)
    probe = Probe(
        x,
        [1, 0],
        boxes=torch.tensor([[0, 0, 2, 2], [1, 1, 1, 4]]),
        masks=torch.ones(2, 6, 5, dtype=torch.bool),
        class_names=["cat", "dog"],
        mean=MEAN,
        std=np.array(STD),
    )
    assert len(probe) == 2
    assert torch.equal(probe.images, x)
    assert probe.targets is not None
    assert probe.targets.dtype == torch.int64
    assert probe.targets.tolist() == [1, 0]
    assert probe.boxes is not None
    assert [box.tolist() for box in probe.boxes] == [[[0, 0, 2, 2]], [[1, 1, 1, 4]]]
    assert {box.dtype for box in probe.boxes} == {torch.float32}
    assert probe.masks is not None
    assert probe.masks.all()
    assert probe.class_names == {0: "cat", 1: "dog"}
    assert probe.mean == tuple(MEAN)
    assert probe.std == tuple(STD)
    assert repr(probe) == "Probe(2 x 3 x 6 x 5, targets, boxes, masks, class_names)"


def test_a_probe_of_images_alone() -> None:
    probe = Probe(images(1))
    assert (probe.targets, probe.boxes, probe.masks, probe.class_names, probe.mean, probe.std) == (None,) * 6
    assert repr(probe) == "Probe(1 x 3 x 6 x 5)"


def test_boxes_in_a_list() -> None:
    probe = Probe(images(3), boxes=[torch.zeros(2, 4), torch.zeros(0, 4), torch.ones(4, dtype=torch.float64)])
    assert probe.boxes is not None
    assert [tuple(box.shape) for box in probe.boxes] == [(2, 4), (0, 4), (1, 4)]


def test_integer_images_keep_their_values_and_floats_their_type() -> None:
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(Probe(x).images, x.to(torch.float32))
    assert Probe(images().to(torch.bfloat16)).images.dtype == torch.bfloat16
    assert type(Probe(tv_tensors.Image(images())).images) is Tensor


def test_a_probe_owns_its_tensors() -> None:
    x, y = images().requires_grad_(), torch.tensor([0, 1, 2, 3])
    boxes, masks = torch.zeros(4, 4), torch.zeros(4, 6, 5, dtype=torch.bool)
    probe = Probe(x * 1, y, boxes=boxes, masks=masks)
    kept = probe.images.clone()
    with torch.no_grad():
        x.zero_()
    y.zero_()
    boxes += 1
    masks[:] = True
    assert torch.equal(probe.images, kept)
    assert not probe.images.requires_grad
    assert probe.targets is not None
    assert probe.targets.tolist() == [0, 1, 2, 3]
    assert probe.boxes is not None
    assert not any(box.any() for box in probe.boxes)
    assert probe.masks is not None
    assert not probe.masks.any()


def test_a_probe_made_in_inference_mode_takes_gradients() -> None:
    with torch.inference_mode():
        whole = Probe.from_batch((images(), torch.arange(4)))
        part = whole.subset([1])
    for probe in (whole, part):
        x = probe.images.requires_grad_()
        x.square().sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Probe)])
def test_attributes_cannot_be_set(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Probe(images()), name, None)


def test_probes_are_equal_by_identity() -> None:
    x = images()
    first, second = Probe(x), Probe(x)
    assert first == first
    assert first != second
    assert len({first, second}) == 2


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_probes_are_copied_and_pickled(remake: Callable[[Probe], Probe]) -> None:
    probe = Probe(images(), [0, 1, 2, 3], boxes=torch.zeros(4, 4), class_names={0: "a"}, mean=MEAN, std=STD)
    again = remake(probe)
    assert again is not probe
    assert torch.equal(again.images, probe.images)
    assert again.class_name(0) == "a"
    assert torch.equal(again.to_display(), probe.to_display())
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.mean = None  # type: ignore[misc]


def test_class_names() -> None:
    listed, mapped, unnamed = (Probe(images(), class_names=c) for c in (("cat", "dog"), {7: "owl"}, None))
    assert [listed.class_name(index) for index in (0, 1, 2, -1)] == ["cat", "dog", "2", "-1"]
    assert [mapped.class_name(index) for index in (7, 0)] == ["owl", "0"]
    assert unnamed.class_name(3) == "3"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"images": torch.rand(3, 4, 4)}, "images[None]"),
        ({"images": torch.rand(0, 3, 4, 4)}, "at least one image"),
        ({"images": torch.rand(1, 3, 0, 4)}, "at least one pixel"),
        ({"images": [[1.0]]}, "got list (list (float))"),
        ({"targets": [0, 1]}, "each of the 4 images, int64 (4,) or a list of ints; got int64 (2,)"),
        ({"targets": 1}, "targets must be a sequence of whole numbers, got int"),
        ({"targets": [0.5] * 4}, "targets must be a sequence of whole numbers"),
        ({"targets": torch.rand(4)}, "got float32 (4,)"),
        ({"targets": torch.ones(4, dtype=torch.bool)}, "got bool (4,)"),
        ({"targets": [0, 1, -1, 2]}, "counted from 0; got -1"),
        ({"boxes": torch.zeros(3, 4)}, "a tensor (4, 4) or a list of 4 tensors (M, 4); got float32 (3, 4)"),
        ({"boxes": torch.zeros(4, 5)}, "got float32 (5,) for image 0"),
        ({"boxes": [torch.zeros(1, 4)] * 3 + [[0, 0, 1, 1]]}, "got list (int, int, int, int) for image 3"),
        ({"boxes": "all"}, "got str"),
        ({"boxes": torch.tensor([[3.0, 0.0, 2.0, 5.0]] * 4)}, "torchvision.ops.box_convert"),
        ({"boxes": torch.full((4, 4), torch.nan)}, "x1 <= x2"),
        ({"masks": torch.zeros(4, 6, 5)}, "got float32 (4, 6, 5)"),
        ({"masks": torch.zeros(4, 5, 6, dtype=torch.bool)}, "(4, 6, 5) like the images"),
        ({"masks": torch.zeros(4, 6, 5, dtype=torch.int64)}, "masks == 1"),
        ({"class_names": "cat"}, "class_names must be a list of str or a mapping from int to str, got str"),
        ({"class_names": [1, 2]}, "got list (int, int)"),
        ({"class_names": {"a": "b"}}, "got dict"),
        ({"mean": MEAN}, "mean and std are given together"),
        ({"std": STD}, "mean and std are given together"),
        ({"mean": 0.5, "std": 0.5}, "mean must be a sequence of 3 numbers, got 0.5"),
        ({"mean": [0.5, 0.5], "std": STD}, "mean must be 3 finite numbers"),
        ({"mean": [torch.nan] * 3, "std": STD}, "mean must be 3 finite numbers"),
        ({"mean": MEAN, "std": [0.0, 1.0, 1.0]}, "std must be above 0"),
        ({"mean": MEAN, "std": ["a"]}, "std must be a sequence of 3 numbers"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Probe(**{"images": images(), **arguments})
    assert said in str(caught.value)


# ---- subset


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([2, 0], [2, 0]),
        ((1,), [1]),
        ([-1, 1, 1], [3, 1, 1]),
        (range(1, 3), [1, 2]),
        (torch.tensor([3, 2]), [3, 2]),
        (np.array([0]), [0]),
        (slice(1, None, 2), [1, 3]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        ([], []),
        (slice(9, None), []),
    ],
    ids=repr,
)
def test_subset_keeps_everything_aligned(indices: Any, expected: list[int]) -> None:
    x = images()
    boxes = [torch.full((index, 4), float(index)) for index in range(4)]
    probe = Probe(x, [4, 5, 6, 7], boxes=boxes, masks=x[:, 0] > 0.5, class_names=["a"], mean=MEAN, std=STD)
    part = probe.subset(indices)
    assert len(part) == len(expected)
    assert torch.equal(part.images, x[expected])
    assert part.targets is not None
    assert part.targets.tolist() == [4 + index for index in expected]
    assert part.boxes is not None
    assert [len(box) for box in part.boxes] == expected
    assert part.masks is not None
    assert torch.equal(part.masks, x[expected, 0] > 0.5)
    assert part.class_name(0) == "a"
    assert torch.equal(part.to_display(), probe.to_display()[expected])


def test_subset_of_what_is_not_there() -> None:
    probe = Probe(images())
    for indices, said in (([4], "has no image 4"), ([-5], "has no image -5"), ([0.5], "whole numbers")):
        with pytest.raises(ConfigurationError, match=said):
            probe.subset(indices)  # type: ignore[arg-type]
    assert len(probe.subset([]).to_display()) == 0


@pytest.mark.parametrize("low", [0.0, -2.0])
def test_a_part_is_shown_as_the_whole_is(low: float) -> None:
    x = torch.cat([images(1) * 200 + low, torch.zeros(1, 3, 6, 5), torch.ones(1, 3, 6, 5)]).round()
    probe = Probe(x)
    for index in range(3):
        assert torch.equal(probe.subset([index]).to_display()[0], probe.to_display()[index])


# ---- display


def test_values_within_one_are_shown_as_they_are() -> None:
    x = images()
    assert torch.equal(Probe(x).to_display(), bytes_of(x))


def test_bytes_are_shown_as_they_are() -> None:
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    x[0, 0, 0, 0] = 255
    for given_ in (x, x.float(), x.double()):
        assert torch.equal(Probe(given_).to_display(), x.permute(0, 2, 3, 1))


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


# ---- choosing


@given(st.data())
def test_spread_is_even_over_the_classes(data: st.DataObject) -> None:
    classes = data.draw(st.integers(1, 6))
    each = data.draw(st.integers(1, 5))
    n = data.draw(st.integers(1, 40))
    labels = data.draw(st.permutations([label for label in range(classes) for _ in range(each)]))
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
        own = [index for index in range(len(labels)) if labels[index] == label]
        assert [index for index in chosen if labels[index] == label] == own[: counts[label]]


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
    ("arguments", "said"),
    [
        ({"indices": [0, 4, -1]}, "within 0 and 3 for this TensorDataset of 4 items, got 4, -1"),
        ({"indices": []}, "at least one item"),
        ({"indices": [0.5]}, "indices must be a sequence of whole numbers"),
        ({"indices": 3}, "indices must be a sequence of whole numbers"),
        ({"n": 0}, "at least 1, got 0"),
        ({"n": 2.0}, "at least 1, got 2.0"),
        ({"n": True}, "at least 1, got True"),
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
def test_what_no_probe_can_be_made_of(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Probe.from_dataset(**{"dataset": TensorDataset(images()), **arguments})
    assert said in str(caught.value)


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
    ("dataset", "said"),
    [
        (Stream(), "Stream"),
        (SizedStream(), "can only be iterated"),
        (Endless(), "Endless, which lacks __len__"),
        (iter([1]), "lacks __len__ and __getitem__"),
        (DataLoader(TensorDataset(images())), "Pass its data set, a TensorDataset, or a Probe"),
    ],
)
def test_what_cannot_be_indexed(dataset: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=r"Probe\(\*batch\[:2\]\)") as caught:
        Probe.from_dataset(dataset)
    assert said in str(caught.value)


def test_items_that_cannot_be_collated() -> None:
    mixed = Items((torch.zeros(3, 4, 5), 0), (torch.zeros(3, 6, 5), 1))
    with pytest.raises(ConfigurationError) as caught:
        Probe.from_dataset(mixed)
    for said in ("float32 (3, 4, 5)", "float32 (3, 6, 5)", "Resize", "collate_fn=", "pass a Probe"):
        assert said in str(caught.value)
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


def streams() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist(), torch.initial_seed()


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_streams_and_tensors_on_a_gpu() -> None:
    torch.zeros(1, device="cuda")
    before = torch.cuda.get_rng_state()
    found = [
        Probe.from_dataset(
            TensorDataset(images(), torch.arange(4)),
            transfer=lambda batch: [batch[0].cuda() + torch.rand(1, device="cuda"), batch[1].cuda()],
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(found[0].images, found[1].images)
    assert found[0].images.device.type == "cpu"
    assert torch.equal(found[0].to_display(), bytes_of(images()))


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
    given_ = Probe.from_dataset(folder_data, class_names=["a", "b"], mean=[0.5], std=[0.5])
    assert given_.class_name(1) == "b"
    assert given_.mean == (0.5, 0.5, 0.5)


# ---- transfer


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
    # Before, the batch had no such key: there is nothing else to show.
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
    # One channel is left, which the three numbers found do not fit.
    grey = Probe.from_dataset(Normalized(*x), transfer=lambda batch: batch[:, :1])
    assert grey.mean is None


# ---- from a batch


def test_a_probe_from_a_batch() -> None:
    x, y = images(12), torch.arange(12)
    probe = Probe.from_batch((x, y), class_names=["a"], mean=MEAN, std=STD)
    assert len(probe) == 8
    x.zero_()
    assert torch.equal(probe.images, images(12)[:8])
    assert probe.targets is not None
    assert probe.targets.tolist() == list(range(8))
    assert probe.class_name(0) == "a"
    assert probe.mean == tuple(MEAN)
    assert len(Probe.from_batch({"camera": x}, n=20, unpack=lambda batch: batch["camera"])) == 12
    with pytest.raises(ConfigurationError, match="at least 1"):
        Probe.from_batch((x, y), n=0)
    with pytest.raises(ConfigurationError, match="unpack="):
        Probe.from_batch({"camera": x})


# ---- around it


def test_neither_lightning_nor_matplotlib_is_loaded() -> None:
    heavy = ("lightning", "pytorch_lightning", "matplotlib")
    code = f"import sys, lightning_interp.data.probe; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real_data
def test_pets() -> None:
    if not (DATA / "oxford-iiit-pet").is_dir():
        pytest.skip(f"there are no photographs at {DATA}")
    steps = [
        v2.ToImage(),
        v2.Resize((64, 64)),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    pets = OxfordIIITPet(
        root=str(DATA),
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
