"""Localisation scores on the validation data, against the metrics on the same model's maps by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, Subset

from lightning_interp import CAMMonitor, LocalizationMonitor, Probe, explain
from lightning_interp.callbacks.run.samples import SampleIndices
from lightning_interp.errors import ConfigurationError
from lightning_interp.localize import EnergyPointingGame, MaxBoxAccuracy, PixelAveragePrecision, PointingGame
from lightning_interp.sinks import MemorySink
from lightning_interp.sinks.records import Picture
from tests.helpers.runs import (
    Localiser,
    Log,
    Net,
    Squares,
    Stream,
    fit,
    loader,
    logged,
    make_trainer,
    seed,
    steps,
    tags,
)

pytestmark = pytest.mark.usefixtures("memory")
SHUFFLED = pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
BOX_NAMES = {
    *("max_box_accuracy", "max_box_accuracy/whole_image", "max_box_accuracy/centered_box", "threshold"),
    *("pointing_game", "pointing_game/center", "energy_pointing_game", "energy_pointing_game/uniform"),
}
MASK_NAMES = {"pixel_average_precision", "pixel_average_precision/uniform"}


def gap_maps(module: Any, images: Tensor, classes: Tensor) -> Tensor:
    with torch.no_grad():
        _, maps = module.net.forward_with_maps(images)
    own = maps[torch.arange(len(images)), classes][:, None]
    return interpolate(own, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def scored(maps: Tensor, boxes: Any, classes: Tensor | None = None, masks: Tensor | None = None) -> dict[str, float]:
    """The same numbers, of all images at once."""
    box, pointing, energy = MaxBoxAccuracy(), PointingGame(), EnergyPointingGame()
    truth = boxes if masks is None else masks
    box.update(maps, boxes), pointing.update(maps, truth, classes), energy.update(maps, truth)
    metrics: dict[str, Any] = {"max_box_accuracy": box, "pointing_game": pointing, "energy_pointing_game": energy}
    if masks is not None:
        metrics["pixel_average_precision"] = PixelAveragePrecision()
        metrics["pixel_average_precision"].update(maps, masks)
    found = {"threshold": box.best_threshold()}
    for name, metric in metrics.items():
        found[name] = float(metric.compute())
        found |= {f"{name}/{baseline}": float(value) for baseline, value in metric.baselines().items()}
    return found


def by_hand(module: Any, data: Any) -> dict[str, float]:
    return scored(gap_maps(module.eval(), data.images, data.labels), data.boxes, data.labels)


def run(
    monitors: Sequence[Any], module: Any = None, *, val: Any = None, train: Any = None, **options: Any
) -> tuple[Any, Log]:
    seed()
    log = Log()
    module = Localiser() if module is None else module
    val = loader(Squares(10)) if val is None else val
    train = loader(Squares(8, seed=1)) if train is None else train
    return fit([*monitors, log], module, train=train, val=val, **options), log


def monitor(**options: Any) -> LocalizationMonitor:
    return LocalizationMonitor(**({"probe": 3, "on_error": "raise"} | options))


# ---- The numbers.


def test_scores_are_those_of_the_metrics_on_the_models_own_maps() -> None:
    module = Localiser()
    trainer, log = run([monitor()], module)
    found = logged(trainer)
    assert set(found) == BOX_NAMES
    assert found == pytest.approx(by_hand(module, Squares(10)), abs=1e-6)
    assert found["max_box_accuracy"] > 0.5
    assert len(log.epochs) == 2
    assert found["energy_pointing_game"] != found["energy_pointing_game/uniform"]


def test_the_validations_own_pass_is_the_only_one() -> None:
    seed()
    module, bare = Localiser(), Localiser()
    fit([], bare, train=loader(Squares(8, seed=1)), val=loader(Squares(10)), num_sanity_val_steps=0)
    run([monitor(at_start=False, at_epochs=[50], probe=3)], module, num_sanity_val_steps=0)
    # One image to rehearse; the first validation is scored, and costs none.
    assert module.looked_at == [1, *bare.looked_at]
    assert not any(each._forward_hooks for each in module.modules())


def test_without_such_a_head_each_batch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = Net(plain=True), Squares(10)
    trainer, _ = run([monitor()], module, val=loader(data))
    maps = explain.gradcam(module, data.images, data.labels)
    assert logged(trainer) == pytest.approx(scored(maps, data.boxes, data.labels), abs=1e-5)


@pytest.mark.parametrize("method", ["cam", "gradcam", explain.saliency, lambda model, images, targets: images.mean(1)])
def test_any_method(method: Any) -> None:
    module, data = Localiser(), Squares(10)
    trainer, _ = run([monitor(method=method, target=1)], module, val=loader(data))
    explained = explain.cam if method == "cam" else explain.gradcam if method == "gradcam" else method
    maps = explained(module.eval(), data.images, torch.ones(10, dtype=torch.int64))
    assert logged(trainer) == pytest.approx(scored(maps, data.boxes), abs=1e-5)


@pytest.mark.parametrize("target", ["predicted", 2])
def test_other_targets(target: Any) -> None:
    module, data = Localiser(), Squares(10)
    trainer, _ = run([monitor(target=target)], module, val=loader(data))
    with torch.no_grad():
        classes = module(data.images).argmax(1) if target == "predicted" else torch.full((10,), 2)
    assert logged(trainer) == pytest.approx(scored(gap_maps(module, data.images, classes), data.boxes), abs=1e-6)


def test_without_labels_the_predicted_class_counts() -> None:
    module, data = Localiser(), Squares(10)
    unpack = lambda batch: {"images": batch[0]}  # noqa: E731
    trainer, _ = run([monitor(unpack=unpack)], module, val=loader(data))
    classes = module(data.images).argmax(1)
    assert logged(trainer) == pytest.approx(scored(gap_maps(module, data.images, classes), data.boxes), abs=1e-6)


def test_version_and_normalization() -> None:
    module, data = Localiser(), Squares(10)
    trainer, _ = run([monitor(version=2, normalization="min_max")], module)
    metric = MaxBoxAccuracy(2, normalization="min_max")
    metric.update(gap_maps(module, data.images, data.labels), data.boxes)
    assert logged(trainer)["max_box_accuracy"] == pytest.approx(float(metric.compute()))
    assert logged(trainer)["threshold"] == pytest.approx(metric.best_threshold())


def test_under_autocast_maps_are_made_in_float32() -> None:
    seen: list[Any] = []

    class Watching(LocalizationMonitor):
        def maps_from_features(self, *args: Any, **options: Any) -> Any:
            maps, classes = super().maps_from_features(*args, **options)
            seen.append((args[1].dtype, maps.dtype))
            return maps, classes

    trainer, _ = run([Watching(probe=2, on_error="raise")], precision="bf16-mixed")
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert set(logged(trainer)) == BOX_NAMES


def test_in_half_precision_throughout() -> None:
    trainer, _ = run([monitor()], precision="bf16-true", val=loader(Squares(10)))
    assert set(logged(trainer)) == BOX_NAMES


# ---- Where the objects are.


def masks_of(data: Any) -> Tensor:
    masks = torch.zeros(len(data), 32, 32, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, data.boxes.tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


def test_masks_alone_give_boxes_too() -> None:
    module, data = Localiser(), Squares(10)
    data.masks, boxes = masks_of(data), data.boxes
    del data.boxes
    trainer, _ = run([monitor()], module, val=loader(data))
    found = logged(trainer)
    assert set(found) == BOX_NAMES | MASK_NAMES
    maps = gap_maps(module, data.images, data.labels)
    assert found == pytest.approx(scored(maps, boxes, data.labels, data.masks), abs=1e-6)


def test_boxes_and_masks() -> None:
    module, data = Localiser(), Squares(10)
    data.masks = masks_of(data).byte() * 255
    trainer, _ = run([monitor()], module, val=loader(data))
    expected = by_hand(module, Squares(10))
    assert {name: value for name, value in logged(trainer).items() if name not in MASK_NAMES} == pytest.approx(expected)
    assert MASK_NAMES.issubset(logged(trainer))


class Annotated(Squares):
    """Items that bring their boxes along; the attributes say something else."""

    def __init__(self, n: int = 10) -> None:
        super().__init__(n)
        self.inner, self.boxes = self.boxes, torch.tensor([[0, 0, 1, 1]] * n)

    def __getitem__(self, index: int) -> Any:
        return {"images": self.images[index], "targets": self.labels[index], "boxes": self.inner[index]}


class Reading(Localiser):
    def read(self, batch: Any) -> Any:
        return batch["images"], batch["targets"]


@SHUFFLED
def test_what_the_batch_says_comes_first() -> None:
    module = Reading()
    trainer, _ = run([monitor()], module, val=loader(Annotated(), shuffle=True), train=loader(Annotated()))
    assert logged(trainer) == pytest.approx(by_hand(module, Squares(10)), abs=1e-6)


class Bordered(Squares):
    """Items with masks around which some pixels count neither way."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.inner = masks_of(self)
        del self.boxes

    def __getitem__(self, index: int) -> Any:
        mask, ignore = self.inner[index], torch.zeros(32, 32, dtype=torch.bool)
        ignore[:, :9] = True
        return {"images": self.images[index], "targets": self.labels[index], "masks": mask, "ignore": ignore}


def test_pixels_to_be_ignored_are_left_out() -> None:
    module, data = Reading(), Bordered(10)
    trainer, _ = run([monitor()], module, val=loader(data), train=loader(data))
    maps = gap_maps(module, data.images, data.labels)
    metric, other = PixelAveragePrecision(), PixelAveragePrecision()
    ignore = torch.zeros(10, 32, 32, dtype=torch.bool)
    ignore[:, :, :9] = True
    metric.update(maps, data.inner, ignore)
    other.update(maps, data.inner)
    found = logged(trainer)["pixel_average_precision"]
    assert found == pytest.approx(float(metric.compute()), abs=1e-6)
    assert found != pytest.approx(float(other.compute()), abs=1e-3)


@SHUFFLED
def test_unpack_may_give_a_mapping() -> None:
    data, module = Squares(10), Localiser()
    triples = [(data.images[i], data.labels[i], data.boxes[i]) for i in range(10)]
    unpack = lambda batch: {"images": batch[0], "targets": batch[1], "boxes": batch[2]}  # noqa: E731
    val = DataLoader(triples, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    trainer, _ = run([monitor(unpack=unpack)], module, val=val)
    assert logged(trainer) == pytest.approx(by_hand(module, data), abs=1e-6)


@pytest.mark.parametrize("chosen", [[7, 1, 4], [0, 9]])
def test_a_subset_of_a_subset_and_joined_sets(chosen: list[int]) -> None:
    module, data = Localiser(), Squares(10)
    joined = ConcatDataset([Subset(data, [3, 5]), Subset(Subset(data, list(range(10))[::-1]), chosen)])
    trainer, _ = run([monitor()], module, val=loader(joined))
    rows = [3, 5, *(9 - index for index in chosen)]
    maps = gap_maps(module, data.images[rows], data.labels[rows])
    expected = scored(maps, data.boxes[rows], data.labels[rows])
    assert logged(trainer) == pytest.approx(expected, abs=1e-6)


@SHUFFLED
def test_where_the_order_is_not_known_the_probe_is_scored() -> None:
    module, data = Localiser(), Squares(10)
    trainer, _ = run([monitor(probe=Probe.from_dataset(data, [2, 5, 7]))], module, val=loader(data, shuffle=True))
    rows = [2, 5, 7]
    maps = gap_maps(module, data.images[rows], data.labels[rows])
    assert logged(trainer) == pytest.approx(scored(maps, data.boxes[rows], data.labels[rows]), abs=1e-6)


def test_a_stream_whose_batches_say_nothing_is_scored_by_a_probe() -> None:
    data = Squares(6)
    probe = Probe(data.images, data.labels, boxes=data.boxes)
    module = Localiser()
    trainer, _ = run([monitor(probe=probe)], module, val=loader(Stream(8)))
    assert logged(trainer) == pytest.approx(by_hand(module, data), abs=1e-6)


def test_images_without_an_object_are_left_out() -> None:
    module, data = Localiser(), Squares(10)
    given = data.boxes
    data.boxes = [None if index in (1, 4) else given[index] for index in range(10)]
    trainer, _ = run([monitor(probe=6)], module, val=loader(data))
    rows = [index for index in range(10) if index not in (1, 4)]
    maps = gap_maps(module, data.images[rows], data.labels[rows])
    assert logged(trainer) == pytest.approx(scored(maps, given[rows], data.labels[rows]), abs=1e-6)


def test_boxes_that_are_something_else_are_no_matter_to_other_monitors() -> None:
    data = Squares(10)
    data.boxes = ["left", "right"] * 5
    run([CAMMonitor(probe=3, on_error="raise")], val=loader(data))
    with pytest.raises(ConfigurationError, match="x1, y1, x2, y2"):
        run([monitor()], val=loader(data))


@pytest.mark.parametrize(("length", "ranks"), [(10, 2), (7, 3), (2, 3)])
def test_the_order_of_a_distributed_sampler(length: int, ranks: int) -> None:
    data = list(range(length))
    counted: list[int] = []
    for rank in range(ranks):
        sampler = DistributedSampler(data, ranks, rank, shuffle=False)  # type: ignore[arg-type, var-annotated]
        batches = DataLoader(data, batch_size=2, sampler=sampler)  # type: ignore[arg-type, var-annotated]
        order = SampleIndices(batches)
        for index, batch in enumerate(batches):
            items = order.batch(index, len(batch))
            assert items is not None
            assert items[0] == batch.tolist()
            counted += [item for item, new in zip(*items, strict=True) if new]
    assert sorted(counted) == data


def test_no_order_is_made_up() -> None:
    data = list(range(10))
    assert SampleIndices(DataLoader(data, batch_size=2, shuffle=True)).batch(0, 2) is None  # type: ignore[arg-type, var-annotated]
    assert SampleIndices(DataLoader(data, batch_size=None)).batch(0, 2) is None  # type: ignore[arg-type, var-annotated]
    assert SampleIndices(DataLoader(data, batch_size=4)).batch(0, 3) is None  # type: ignore[arg-type, var-annotated]
    assert SampleIndices(None).batch(0, 1) is None


# ---- When.


class Turning(Localiser):
    """Its maps are right in the second epoch, and upside down in the others."""

    def on_train_epoch_start(self) -> None:
        with torch.no_grad():
            self.net.head.weight.abs_().mul_(1 if self.current_epoch == 1 else -1)


class Changing(Localiser):
    """Its maps are others in every epoch."""

    def on_train_epoch_start(self) -> None:
        generator = torch.Generator().manual_seed(self.current_epoch)
        with torch.no_grad():
            self.net.features[0].weight.copy_(torch.rand(6, 3, 5, 5, generator=generator) - 0.3)


def test_between_due_epochs_the_last_numbers_are_logged_again() -> None:
    _, log = run([monitor(every_n_epochs=3)], Changing(0.0), max_epochs=7)
    scores = [each["energy_pointing_game"] for each in log.epochs]
    assert scores[0] == scores[1] != scores[2] == scores[3] == scores[4] != scores[5] == scores[6]
    assert all(set(each) == BOX_NAMES for each in log.epochs)


def test_by_steps() -> None:
    _, log = run([monitor(every_n_train_steps=4)], Changing(0.0), max_epochs=5)  # two steps an epoch
    scores = [each["energy_pointing_game"] for each in log.epochs]
    assert scores[0] != scores[1] == scores[2] != scores[3] == scores[4]


def test_checkpoints_and_early_stopping_go_by_the_scores() -> None:
    best = ModelCheckpoint(monitor="localization/max_box_accuracy", mode="max", filename="{epoch}", dirpath="kept")
    stop = EarlyStopping("localization/energy_pointing_game", mode="max", patience=2)
    trainer, log = run([monitor(), best, stop], Turning(0.0), max_epochs=8, enable_checkpointing=True)
    assert [each["max_box_accuracy"] > 0.5 for each in log.epochs] == [False, True, False, False]
    assert best.best_model_path.endswith("epoch=1.ckpt")
    assert float(best.best_model_score) == log.epochs[1]["max_box_accuracy"]
    assert trainer.current_epoch == 4, "stopped early"


def test_a_resumed_run_goes_on_with_the_last_numbers() -> None:
    first, log = run([monitor(every_n_epochs=3)], Changing(0.0), max_epochs=1)
    first.save_checkpoint("stopped.ckpt")
    _, later = run([monitor(every_n_epochs=3)], Changing(0.0), max_epochs=3, ckpt_path="stopped.ckpt")
    scores = [each["energy_pointing_game"] for each in log.epochs + later.epochs]
    assert len(scores) == 3
    assert scores[0] == scores[1] != scores[2]


def test_nothing_is_logged_in_the_sanity_check() -> None:
    said: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            said.append(logged(trainer))

    run([monitor(), Watch()], num_sanity_val_steps=2)
    assert said == [{}]


def test_the_first_of_several_loaders_is_scored() -> None:
    class Two(Localiser):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0])

    module = Two()
    trainer, _ = run([monitor()], module, val=[loader(Squares(10)), loader(Squares(6, seed=9))])
    assert logged(trainer) == pytest.approx(by_hand(module, Squares(10)), abs=1e-6)


def test_limit_val_batches() -> None:
    module, data = Localiser(), Squares(10)
    trainer, _ = run([monitor()], module, limit_val_batches=2)
    expected = scored(gap_maps(module, data.images[:8], data.labels[:8]), data.boxes[:8], data.labels[:8])
    assert logged(trainer) == pytest.approx(expected, abs=1e-6)


def test_a_trial_run() -> None:
    trainer, _ = run([monitor()], fast_dev_run=True)
    assert set(logged(trainer)) == BOX_NAMES


@pytest.mark.parametrize("plain", [False, True])
def test_validate_and_test(plain: bool, memory: MemorySink) -> None:
    module: Any = Net(plain=True) if plain else Localiser()
    data = Squares(10)
    trainer = make_trainer([monitor(name="own")])
    trainer.validate(module, loader(data), verbose=False)
    maps = explain.gradcam(module, data.images, data.labels) if plain else gap_maps(module, data.images, data.labels)
    expected = scored(maps, data.boxes, data.labels)
    assert logged(trainer, "localization-own") == pytest.approx(expected, abs=1e-5)
    trainer.test(module, loader(data), verbose=False)
    assert logged(trainer, "localization-own-test") == pytest.approx(expected, abs=1e-5)
    assert tags(memory) == {"localization-own/boxes", "localization-own-test/boxes"}


def test_two_with_different_names() -> None:
    trainer, _ = run([monitor(), monitor(name="fine", target="predicted")])
    assert set(logged(trainer)) == set(logged(trainer, "localization-fine")) == BOX_NAMES
    with pytest.raises(ConfigurationError, match=r"two monitors would write 'localization/\*'; give one .* name"):
        run([monitor(), monitor(every_n_epochs=2)])


def test_where_the_step_does_not_run_the_localiser_it_is_run() -> None:
    class Elsewhere(Localiser):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", batch[0].mean(), batch_size=4)

    module = Elsewhere()
    trainer, _ = run([monitor()], module)
    assert logged(trainer) == pytest.approx(by_hand(module, Squares(10)), abs=1e-6)


def test_a_module_that_is_run_more_than_once_in_a_step() -> None:
    class Twice(Localiser):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0][:1])
            self(batch[0])
            self(batch[0].flip(3))

    module = Twice()
    trainer, _ = run([monitor()], module)
    assert logged(trainer) == pytest.approx(by_hand(module, Squares(10)), abs=1e-6)


# ---- Failures.


def test_hooks_go_where_the_step_raises() -> None:
    class Failing(Localiser):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])
            assert self.net.features._forward_hooks, "nothing was listened to"
            raise ValueError("no validation today")

    module = Failing()
    with pytest.raises(ValueError, match="no validation today"):
        run([monitor()], module, num_sanity_val_steps=0)
    assert not any(each._forward_hooks for each in module.modules())


class Rash(LocalizationMonitor):
    """Fails at the fourth batch that it scores, or at the first."""

    left = 4

    def update(self, state: Any, batch: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise ValueError("no score today")
        super().update(state, batch)


@pytest.mark.parametrize("left", [1, 4])
def test_a_failure_costs_one_warning_and_the_names_stay(left: int, memory: MemorySink) -> None:
    rash = Rash(probe=2)
    rash.left = left
    module = Changing(0.0)
    best = ModelCheckpoint(monitor="localization/max_box_accuracy", mode="max", dirpath="kept")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, log = run(
            [rash, CAMMonitor(probe=2, on_error="raise"), best], module, max_epochs=4, enable_checkpointing=True
        )
    (said,) = [str(each.message) for each in caught if "is disabled from here on" in str(each.message)]
    assert "no score today" in said
    assert module.trained == 8
    scores = [each["energy_pointing_game"] for each in log.epochs]
    assert len(scores) == 4
    if left == 1:
        assert all(map(math.isnan, scores))
    else:
        assert scores[1:] == scores[:1] * 3
        assert not math.isnan(scores[0])
    assert all(set(each) == BOX_NAMES for each in log.epochs)
    assert steps(memory, "cam/gradcam") == [0, 1, 3, 5, 7]


def test_a_failure_can_end_the_run() -> None:
    with pytest.raises(ValueError, match="no score today"):
        run([Rash(probe=2, on_error="raise")])


# ---- Misuse.


def test_without_boxes_nothing_is_trained() -> None:
    module, data = Localiser(), Squares(10)
    del data.boxes
    with pytest.raises(ConfigurationError, match=r"found no boxes or masks.*unpack=.*attributes.*probe="):
        run([monitor()], module, val=loader(data))
    assert module.trained == 0


def test_boxes_outside_the_images_are_refused_before_training() -> None:
    module, data = Localiser(), Squares(10)
    data.boxes = data.boxes * 7
    with pytest.raises(ConfigurationError, match="outside its image"):
        run([LocalizationMonitor()], module, val=loader(data))
    assert module.trained == 0


def test_a_probe_without_boxes_is_shown_where_the_validation_set_has_some(memory: MemorySink) -> None:
    probe = Probe(Squares(3).images)
    run([monitor(probe=probe)])
    assert steps(memory, "localization/boxes") == [0, 1, 3]
    data = Squares(10)
    del data.boxes
    with pytest.raises(ConfigurationError, match="found no boxes or masks"):
        run([monitor(probe=probe)], val=loader(data))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 1.5}, "threshold takes"),
        ({"threshold": 1}, "below 1"),
        ({"version": 3}, "version takes 1 or 2"),
        ({"normalization": "softmax"}, "relu_max"),
        ({"target": "true"}, "target takes"),
        ({"alpha": 2}, "alpha takes"),
        ({"cmap": "none"}, "none"),
        ({"method": "gradcamm"}, "knows no method"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LocalizationMonitor(**options)


# ---- The picture.


def count(picture: Tensor, color: tuple[int, int, int]) -> int:
    return int((picture == torch.tensor(color, dtype=torch.uint8)).all(-1).sum())


def test_true_and_predicted_boxes_are_drawn(memory: MemorySink) -> None:
    run([monitor(probe=4)])
    pictures = [record.image for _, record in memory.records if isinstance(record, Picture)]
    assert steps(memory, "localization/boxes") == [0, 1, 3]
    for picture in pictures:
        assert count(picture, (0, 230, 80)) > 100
        assert count(picture, (255, 140, 0)) > 100


def test_a_fixed_threshold_draws_other_boxes(memory: MemorySink) -> None:
    for threshold in (0.1, 0.95):
        run([monitor(probe=2, threshold=threshold, at_epochs=[9])])
    one, other = (record.image for _, record in memory.records if isinstance(record, Picture))
    assert not torch.equal(one, other)


def test_maps_with_nothing_to_show(memory: MemorySink) -> None:
    trainer, _ = run([monitor(method=lambda model, images, targets: torch.zeros_like(images[:, 0]))])
    assert logged(trainer)["max_box_accuracy"] == 0
    assert steps(memory, "localization/boxes") == [0, 1, 3]
