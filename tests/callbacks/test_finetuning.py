"""The callback that makes a localizer of a classifier while it is fine-tuned, in both Lightnings."""

from __future__ import annotations

import copy
import importlib
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from lightning_interp.callbacks import _lightning
from lightning_interp.callbacks.finetuning import GAPHeadFinetuning
from lightning_interp.errors import ConfigurationError
from lightning_interp.localize import GAPClassifier
from tests.helpers import finetuning_processes as processes
from tests.helpers.finetuning_processes import SHAPE, Tiny, body, callback, classifier_of, rates, tiny
from tests.helpers.processes import HELPERS, play
from tests.helpers.runs import dataset, differences, fingerprint, fit, loader, make_trainer, seed

Configure = Callable[[Any], Any]


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


class StepRecorder(_lightning.Callback):
    """Record the state after each training batch, and the learning rates of its step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.rates = (0.0, 0.0)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates = rates(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        model = pl_module.model
        self.steps.append(
            {
                "epoch": trainer.current_epoch,
                "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
                "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
                "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
                "modes": {name: submodule.training for name, submodule in model.named_modules()},
                "rates": self.rates,
            }
        )


def moved(before: dict[str, Any], after: dict[str, Any], what: str = "weights") -> set[str]:
    return {name for name, tensor in before[what].items() if not torch.equal(tensor, after[what][name])}


def params(module: Any) -> Any:
    return module.parameters()


# Replacing the classifier


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_every_stage_swaps_the_classifier_once(package: Any, stage: str) -> None:
    module = tiny(package)
    given = module.model
    finetuning = callback(num_classes=4)
    trainer = make_trainer([finetuning], package=package, max_epochs=1)
    data = loader(dataset(8))
    getattr(trainer, stage)(module, data)
    adapted = module.model
    assert isinstance(adapted, GAPClassifier)
    assert module.eval()(torch.rand(2, *SHAPE[1:])).shape == (2, 4)
    assert given.training
    assert given is not adapted
    assert all(parameter.requires_grad for parameter in adapted.parameters()), "left as it was set"
    for next_stage in ("validate", "test", "predict"):
        getattr(make_trainer([callback(num_classes=4)], package=package), next_stage)(module, data)
        assert module.model is adapted
    assert isinstance(finetuning, package.callbacks.BaseFinetuning)


def test_optimizers_and_module_setup_see_the_swapped_classifier(package: Any) -> None:
    classifier_types = []

    def configure(module: Any) -> Any:
        classifier_types.append(type(module.model))
        return SGD(module.parameters(), 0.1)

    module = tiny(package, configure)
    module.setup = lambda stage: classifier_types.append(type(module.model))
    fit([callback()], module, package=package, max_epochs=1)
    assert classifier_types == [GAPClassifier, GAPClassifier]


def test_a_dotted_attribute_and_a_second_callback(package: Any) -> None:
    module = tiny(package)
    module.nets = nn.ModuleDict({"left": nn.Sequential(body())})
    one, other = callback(num_classes=3), callback(num_classes=5, attribute="nets.left.0")
    assert one.state_key != other.state_key
    fit([one, other], module, package=package, max_epochs=1)
    assert isinstance(module.nets["left"][0], GAPClassifier)
    assert module.nets["left"][0].head.out_features == 5


def test_the_trained_head_is_kept_and_adapting_again_draws_nothing() -> None:
    module = tiny(pl)
    module.eval()
    images = torch.rand(2, *SHAPE[1:])
    expected = module(images)
    callback().setup(make_trainer(), module, "validate")
    assert torch.allclose(module(images), expected, atol=1e-5)
    state = torch.get_rng_state()
    callback().setup(make_trainer(), module, "validate")
    assert torch.equal(torch.get_rng_state(), state)


def test_adapting_draws_what_from_classifier_draws() -> None:
    first, second = tiny(pl), tiny(pl)
    seed(5)
    expected = GAPClassifier.from_classifier(first.model, 4, sample=torch.zeros(SHAPE)).state_dict()
    state = torch.get_rng_state()
    seed(5)
    callback(num_classes=4).setup(make_trainer(), second, "fit")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, second.model.state_dict()[name]) for name, tensor in expected.items())


def test_a_gap_classifier_of_the_users_stays_unless_other_classes_are_asked() -> None:
    module = tiny(pl)
    classifier = module.model = GAPClassifier.from_classifier(module.model, 4, sample=torch.zeros(SHAPE))
    for finetuning in (callback(), callback(num_classes=4)):
        finetuning.setup(make_trainer(), module, "validate")
        assert module.model is classifier
    callback(num_classes=6).setup(make_trainer(), module, "validate")
    assert module.model.head.out_features == 6


def test_the_summary_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    name = _lightning.rank_zero_info.__module__
    module = tiny(pl)
    with caplog.at_level(logging.INFO):
        logging.getLogger("pytorch_lightning").setLevel(logging.INFO)
        for _ in range(2):
            callback(num_classes=4).setup(make_trainer(), module, "validate")
    messages = [record.message for record in caplog.records if record.message.startswith("GAPHeadFinetuning:")]
    assert len(messages) == 1, name
    assert "a new head of 4 classes" in messages[0]


# Freezing and unfreezing


def test_the_backbone_rests_and_then_trains(package: Any) -> None:
    recorder = StepRecorder()
    module = tiny(package)
    fit([callback(num_classes=3, unfreeze_at_epoch=2), recorder], module, package=package, max_epochs=3)
    first = recorder.steps[0]
    last_frozen = [step for step in recorder.steps if step["epoch"] == 1][-1]
    assert moved(first, last_frozen) == {"head.weight", "head.bias"}
    assert not moved(first, last_frozen, "buffers"), "batch norm's statistics are frozen too"
    assert moved(last_frozen, recorder.steps[-1]) == set(first["weights"])
    assert moved(last_frozen, recorder.steps[-1], "buffers")
    norms = {name for name, submodule in module.model.named_modules() if isinstance(submodule, nn.BatchNorm2d)}
    assert norms
    for step in recorder.steps:
        frozen = step["epoch"] < 2
        assert {name for name, mode in step["modes"].items() if not mode} == (norms if frozen else set())
        backbone = {flag for name, flag in step["requires_grad"].items() if name.startswith("features")}
        assert backbone == {not frozen}


@pytest.mark.parametrize(("at", "frozen"), [(0, 0), (1, 1), (None, 3), (7, 3)])
def test_when_it_unfreezes(at: int | None, frozen: int) -> None:
    recorder = StepRecorder()
    module = tiny(pl)
    module.model[1].eval()
    for parameter in module.model[0].parameters():
        parameter.requires_grad_(False)
    fit([callback(num_classes=3, unfreeze_at_epoch=at), recorder], module, max_epochs=3)
    for step in recorder.steps:
        wants = [requires_grad for name, requires_grad in step["requires_grad"].items() if name.startswith("features")]
        assert any(wants) is (step["epoch"] >= frozen)
        assert sum(wants) in (0, 4), "the user's frozen convolution stays frozen"
    norms = [submodule for submodule in module.model.modules() if isinstance(submodule, nn.BatchNorm2d)]
    assert [norm.training for norm in norms] == [False], "the user had it in eval mode"
    assert sum(not parameter.requires_grad for parameter in module.parameters()) == 1
    assert not moved(recorder.steps[0], recorder.steps[-1], "buffers")


def test_a_module_that_calls_train_leaves_the_batch_norms_held() -> None:
    recorder = StepRecorder()
    module = tiny(pl)
    module.on_train_epoch_start = module.train
    fit([callback(num_classes=3, unfreeze_at_epoch=None), recorder], module, max_epochs=2)
    assert not moved(recorder.steps[0], recorder.steps[-1], "buffers")
    assert all(submodule.training for submodule in module.model.modules())


def test_an_interrupted_run_leaves_the_module_as_it_was_set() -> None:
    module = tiny(pl)

    def fail(*args: Any) -> None:
        raise ValueError("enough")

    module.on_train_batch_end = fail
    finetuning = callback(num_classes=3)
    with pytest.raises(ValueError, match="enough"):
        fit([finetuning], module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(submodule.training for submodule in module.modules())


def test_the_added_convolution_trains_with_the_head() -> None:
    recorder = StepRecorder()
    module = tiny(pl)
    fit([callback(num_classes=3, conv_channels=5, unfreeze_at_epoch=None), recorder], module, max_epochs=2)
    assert moved(recorder.steps[0], recorder.steps[-1]) == {
        *("head.weight", "head.bias", "features.1.weight", "features.1.bias"),
    }
    before = module.model
    fit([callback(num_classes=3, conv_channels=5, unfreeze_at_epoch=None)], module, max_epochs=1)
    assert module.model is before


def test_a_second_fit_goes_on_and_a_new_callback_freezes_again() -> None:
    module, recorder = tiny(pl), StepRecorder()
    fit([callback(num_classes=3, unfreeze_at_epoch=5)], module, max_epochs=1)
    fit([callback(num_classes=3, unfreeze_at_epoch=1), recorder], module, max_epochs=2)
    assert moved(recorder.steps[0], recorder.steps[2]) == {"head.weight", "head.bias"}
    assert moved(recorder.steps[2], recorder.steps[-1]) == set(recorder.steps[0]["weights"])


# Learning rates


def trainable_only(module: Any) -> Any:
    return Adam([parameter for parameter in module.parameters() if parameter.requires_grad], 0.1)


def two_groups(module: Any) -> Any:
    weights = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    return AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], 0.1)


def own_groups(module: Any) -> Any:
    return SGD(
        [{"params": module.model.features.parameters(), "lr": 7.0}, {"params": module.model.head.parameters()}], 0.1
    )


def named(module: Any) -> Any:
    return SGD(module.named_parameters(), 0.1)


def tensor_rate(module: Any) -> Any:
    return Adam(module.parameters(), torch.tensor(0.1))


def scheduled(make: Callable[[Any], Any], interval: str = "step", **options: Any) -> Configure:
    def configure(module: Any) -> Any:
        optimizer = SGD(module.parameters(), 0.1, momentum=0.9)
        plan = {"scheduler": make(optimizer), "interval": interval, **options}
        return {"optimizer": optimizer, "lr_scheduler": plan}

    return configure


def sequential(optimizer: Any) -> Any:
    warm = lr_scheduler.LinearLR(optimizer, 0.2, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 6, 0.05)], [3])


def chained(optimizer: Any) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer
    )


CONFIGURED: dict[str, Configure] = {
    "all in one group": lambda module: SGD(module.parameters(), 0.1),
    "trainable only": trainable_only,
    "two groups": two_groups,
    "the user's own groups": own_groups,
    "named": named,
    "a tensor": tensor_rate,
    "lambda": scheduled(lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))),
    "multiplicative": scheduled(lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9)),
    "step": scheduled(lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5), "epoch"),
    "cosine": scheduled(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 9, eta_min=0.03)),
    "restarts": scheduled(lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, eta_min=0.03)),
    "one cycle": scheduled(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12)),
    "cyclic": scheduled(lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.2, 2)),
    "plateau": scheduled(
        lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, patience=0, min_lr=[0.02]),
        "epoch",
        monitor="val_loss",
    ),
    "sequential": scheduled(sequential),
    "chained": scheduled(chained),
}


def plain_rates(configure: Configure) -> list[float]:
    """The rates of the head in a run with one group for everything."""
    recorder = StepRecorder()
    module = tiny(pl, configure)
    module.model = GAPClassifier.from_classifier(module.model, 3, sample=torch.zeros(SHAPE))
    fit([recorder], module, max_epochs=3)
    return [step["rates"][0] for step in recorder.steps]


@pytest.mark.filterwarnings("ignore:The .epoch. parameter in .scheduler.step")
@pytest.mark.filterwarnings("ignore:To get the last learning rate")
@pytest.mark.parametrize("unfreeze", [0, 1])
@pytest.mark.parametrize("name", CONFIGURED)
def test_the_backbone_trains_at_the_heads_rate_divided(name: str, unfreeze: int) -> None:
    configure = CONFIGURED[name]
    recorder = StepRecorder()
    module = tiny(pl, configure)
    trainer = fit(
        [callback(num_classes=3, unfreeze_at_epoch=unfreeze, head_lr_multiplier=4.0), recorder], module, max_epochs=3
    )
    for step in recorder.steps:
        head, backbone = step["rates"]
        assert backbone == pytest.approx(head / 4)
    assert [step["rates"][0] for step in recorder.steps] == pytest.approx(plain_rates(configure))
    last_frozen = recorder.steps[2 if unfreeze else 0]
    assert moved(last_frozen, recorder.steps[-1]) == set(last_frozen["weights"])
    optimized = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, module.parameters()))


def test_the_rate_is_the_one_the_weights_move_by() -> None:
    """A step of plain gradient descent, by hand."""
    module = tiny(pl, plain=True)
    data = dataset(4)
    fit(
        [callback(num_classes=3, unfreeze_at_epoch=0, head_lr_multiplier=4.0)], module, train=loader(data), max_epochs=1
    )
    again = tiny(pl, plain=True)
    callback(num_classes=3).setup(make_trainer(), again, "validate")
    again.loss(next(iter(loader(data)))).backward()
    for name, parameter in again.model.named_parameters():
        rate = 0.1 if name.startswith("head") else 0.025
        assert parameter.grad is not None
        assert torch.allclose(
            parameter - rate * parameter.grad, dict(module.model.named_parameters())[name], atol=1e-6
        ), name


def test_weight_decay_groups_keep_their_options() -> None:
    module = tiny(pl, two_groups)
    trainer = fit([callback(num_classes=3)], module, max_epochs=1)
    weight_decay = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    assert all(weight_decay[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0) for parameter in module.parameters())
    assert len(trainer.optimizers[0].param_groups) == 4


def test_a_rate_set_by_hand_before_the_step_is_followed() -> None:
    module, recorder = tiny(pl), StepRecorder()
    optimizer_step = type(module).optimizer_step

    def warm(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / (1 + epoch)
        optimizer_step(module, epoch, batch_idx, optimizer, closure)

    module.optimizer_step = warm
    fit([callback(num_classes=3, unfreeze_at_epoch=0), recorder], module, max_epochs=2)
    assert {step["rates"] for step in recorder.steps} == {(0.5, 0.05), (0.25, 0.025)}


def test_several_optimizers(package: Any) -> None:
    module, recorder = processes.Manual.of(package), StepRecorder()
    trainer = fit([callback(num_classes=3, unfreeze_at_epoch=1), recorder], module, package=package, max_epochs=2)
    assert all(step["rates"] == pytest.approx((0.1, 0.01)) for step in recorder.steps)
    assert moved(recorder.steps[2], recorder.steps[-1]) == set(recorder.steps[0]["weights"])
    assert [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers] == [
        [0.3],
        pytest.approx([0.1, 0.01]),
    ]


def test_the_learning_rate_monitor_names_the_groups_apart(package: Any, tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        return SGD([{"params": list(module.parameters()), "name": "all"}], 0.1)

    logger = importlib.import_module(f"{package.__name__}.loggers").CSVLogger(str(tmp_path))
    watch = package.callbacks.LearningRateMonitor()
    fit([watch, callback(num_classes=3)], tiny(package, configure), package=package, logger=logger, max_epochs=1)
    assert {name: values[0] for name, values in watch.lrs.items()} == pytest.approx(
        {"lr-SGD/all": 0.1, "lr-SGD/all-backbone": 0.01}
    )


# Resuming, and coming back


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("name", ["trainable only", "two groups", "cosine", "one cycle", "sequential", "plateau"])
@pytest.mark.filterwarnings("ignore:The .epoch. parameter in .scheduler.step")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*optimizer.step")
def test_resuming_is_going_on(name: str, stop: int, tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> Any:
        module = tiny(pl, CONFIGURED[name], dropout=0.0)
        return fit([callback(num_classes=3, unfreeze_at_epoch=2)], module, max_epochs=epochs, **options)

    whole = fingerprint(run(4))
    run(stop).save_checkpoint(tmp_path / "stopped.ckpt")
    seed(99)
    resumed = fingerprint(run(4, ckpt_path=str(tmp_path / "stopped.ckpt")))
    changed = [difference for difference in differences(whole, resumed) if difference != "torch stream"]
    assert not changed


@pytest.mark.parametrize("every", [1, 4, 5])
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resuming_in_the_middle_of_an_epoch(package: Any, every: int, tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        module = tiny(package, dropout=0.0)
        return fit([callback(num_classes=3, unfreeze_at_epoch=1), *options.pop("more", [])], module, **options)

    images, labels = dataset(4).tensors
    # A loader that cannot be resumed starts again: here every batch is the same.
    data = torch.utils.data.TensorDataset(images.repeat(3, 1, 1, 1), labels.repeat(3))
    options = {"package": package, "max_epochs": 3, "train": loader(data), "val": None}
    keep = package.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=every)
    whole = run(more=[keep], enable_checkpointing=True, **options)
    (path,) = tmp_path.glob(f"*step={every}.ckpt")
    resumed = run(ckpt_path=str(path), **options)
    if resumed.global_step != whole.global_step:
        pytest.skip("this Lightning repeats a batch when it goes on in the middle of an epoch")
    assert not [
        difference
        for difference in differences(fingerprint(whole), fingerprint(resumed))
        if difference != "torch stream"
    ]


def saved(package: Any, path: Path, kind: Any = None, **options: Any) -> Any:
    module = tiny(package) if kind is None else kind
    trainer = fit([callback(**options)], module, package=package, max_epochs=1)
    trainer.save_checkpoint(path)
    return module


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 5}, {}, {"num_classes": 5, "conv_channels": 4, "dropout": 0.2}, {"num_classes": 5, "layer": "2"}],
    ids=["new", "kept", "convolution", "layer"],
)
def test_an_adapted_module_comes_back(package: Any, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    module = saved(package, path, **options)
    back = GAPHeadFinetuning.load_from_checkpoint(type(module), path)
    assert type(back) is type(module)
    assert isinstance(back.model, GAPClassifier)
    assert not any(submodule.training for submodule in back.modules())
    images = torch.rand(2, *SHAPE[1:])
    logits, maps = back.model.forward_with_maps(images)
    assert torch.equal(logits, module.eval()(images))
    assert maps.shape[:2] == logits.shape
    trainer = make_trainer([callback(**options)], package=package)
    trainer.test(tiny(package), loader(dataset(8)), ckpt_path=str(path), verbose=False)
    assert torch.equal(trainer.lightning_module.eval()(images), logits)


def test_the_saved_state_is_plain(tmp_path: Path) -> None:
    module = tiny(pl)
    layer = module.model[2]
    saved(pl, tmp_path / "last.ckpt", module, num_classes=4, layer=layer)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][
        "GAPHeadFinetuning{'attribute': 'model'}"
    ]
    assert state["recipe"] == {
        "attribute": "model",
        "num_classes": 4,
        "layer": "2",
        "sample": list(SHAPE),
        "output_stride": None,
        "conv_channels": None,
        "dropout": 0.0,
    }


def test_a_module_that_comes_back_can_be_adapted_to_other_classes_and_come_back(tmp_path: Path) -> None:
    saved(pl, tmp_path / "one.ckpt", num_classes=5, conv_channels=4)
    back = GAPHeadFinetuning.load_from_checkpoint(Tiny.of(pl), tmp_path / "one.ckpt").train()
    saved(pl, tmp_path / "two.ckpt", back, num_classes=3)
    again = GAPHeadFinetuning.load_from_checkpoint(Tiny.of(pl), tmp_path / "two.ckpt")
    images = torch.rand(2, *SHAPE[1:])
    assert torch.equal(again(images), back.eval()(images))
    assert again(images).shape == (2, 3)


def test_an_untrained_class_whose_head_starts_at_zero_comes_back(tmp_path: Path) -> None:
    module = processes.ZeroHead.of(pl)
    nn.init.normal_(module.model[-1].weight)
    saved(pl, tmp_path / "last.ckpt", module)
    back = GAPHeadFinetuning.load_from_checkpoint(processes.ZeroHead.of(pl, make=False), tmp_path / "last.ckpt")
    images = torch.rand(2, *SHAPE[1:])
    assert torch.equal(back(images), module.eval()(images))


def test_what_is_not_among_the_hyperparameters_is_passed(tmp_path: Path) -> None:
    class Given(Tiny.of(pl)):  # type: ignore[misc]
        def __init__(self, net: nn.Module, rate: float = 0.3) -> None:
            super().__init__()
            self.save_hyperparameters(ignore="net")
            self.model = net

    seed()
    module = saved(pl, tmp_path / "last.ckpt", Given(body(), rate=0.5), num_classes=3)
    back = GAPHeadFinetuning.load_from_checkpoint(Given, tmp_path / "last.ckpt", net=body())
    assert back.hparams.rate == 0.5
    assert torch.equal(back(torch.ones(SHAPE)), module.eval()(torch.ones(SHAPE)))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fit([], tiny(pl), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    trainer = fit([callback(num_classes=3)], tiny(pl), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("plain", "weights"):
        with pytest.raises(ConfigurationError, match=r"Tiny\.load_from_checkpoint.*save_weights_only"):
            GAPHeadFinetuning.load_from_checkpoint(Tiny.of(pl), tmp_path / f"{name}.ckpt")


# Misuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attribute": ""}, "attribute takes"),
        ({"unfreeze_at_epoch": -1}, "unfreeze_at_epoch takes an integer of at least 0, got -1"),
        ({"unfreeze_at_epoch": 1.5}, "unfreeze_at_epoch takes an integer of at least 0, got 1.5"),
        ({"head_lr_multiplier": 0}, "head_lr_multiplier takes a positive number"),
        ({"head_lr_multiplier": float("nan")}, "head_lr_multiplier takes a positive number"),
        ({"sample": (3, 12, 12)}, "four positive integers"),
        ({"sample": "224"}, "four positive integers"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GAPHeadFinetuning(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attribute": "modle"}, "'model'.*make it in __init__"),
        ({"attribute": "model.19"}, "is missing after __init__"),
        ({"attribute": "rate"}, "is float"),
        ({"num_classes": 0}, "num_classes takes"),
        ({"output_stride": 3}, "output_stride takes"),
        ({"layer": "model.17"}, "there is no layer"),
        ({"sample": (1, 5, 12, 12)}, "does not run on images"),
    ],
)
def test_what_cannot_be_adapted_is_said_in_setup(options: dict[str, Any], message: str) -> None:
    module = tiny(pl)
    with pytest.raises(ConfigurationError, match=message):
        fit([callback(**options)], module)
    assert module.trained == 0


def test_a_classifier_made_too_late_is_refused() -> None:
    module = tiny(pl)
    module.setup = lambda stage: setattr(module, "model", body())
    with pytest.raises(ConfigurationError, match="made another 'model' in its setup"):
        fit([callback(num_classes=3)], module)
    module = tiny(pl)
    module.model = None
    with pytest.raises(ConfigurationError, match=r"where setup\(\) or configure_model\(\) makes it"):
        fit([callback(num_classes=3)], module)


def test_a_head_that_nothing_trains_is_refused() -> None:
    module = tiny(pl, lambda module: SGD(module.model.features.parameters(), 0.1))
    with pytest.raises(ConfigurationError, match="no optimiser trains the new head"):
        fit([callback(num_classes=3)], module)
    module = tiny(pl)
    module.model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ConfigurationError, match="pass num_classes for a new head"):
        fit([callback()], module)
    fit([callback(num_classes=3)], module, max_epochs=1)


def test_one_rate_for_all_is_refused() -> None:
    module = tiny(pl, lambda module: torch.optim.LBFGS(module.parameters(), 0.1))
    with pytest.raises((ConfigurationError, ValueError), match="LBFGS"):
        fit([callback(num_classes=3)], module)
    fit([callback(num_classes=3, unfreeze_at_epoch=None)], module, max_epochs=1)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp_spawn"])
def test_strategies_that_cannot_work_are_refused(package: Any, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = importlib.import_module(f"{package.__name__}.strategies")
    made = strategies.FSDPStrategy() if strategy == "fsdp" else strategies.DDPStrategy(start_method="spawn")
    trainer = make_trainer([], package=package)
    monkeypatch.setattr(type(trainer), "strategy", property(lambda self: made))
    if strategy == "ddp_spawn":
        made.cluster_environment = importlib.import_module(
            "lightning_fabric.plugins"
        ).environments.LightningEnvironment()
        made._configure_launcher()
    with pytest.raises(ConfigurationError, match=r"choose Trainer.strategy='ddp'"):
        callback(num_classes=3).setup(trainer, tiny(package), "fit")


# From a file


def test_from_a_configuration_file(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["train"])
    path = tmp_path / "config.yaml"
    path.write_text("""
trainer:
  logger: false
  enable_checkpointing: false
  accelerator: cpu
  callbacks:
    - class_path: lightning_interp.callbacks.finetuning.GAPHeadFinetuning
      init_args:
        num_classes: 4
        unfreeze_at_epoch: null
        head_lr_multiplier: 20
        layer: '2'
        sample: [1, 3, 12, 12]
        dropout: 0.5
    - class_path: lightning_interp.callbacks.finetuning.GAPHeadFinetuning
      init_args: {attribute: net.model}
""")
    cli = importlib.import_module(f"{package.__name__}.cli")
    options = {"run": False, "save_config_callback": None, "seed_everything_default": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's use of jsonargparse is deprecated there
        command_line = cli.LightningCLI(Tiny.of(package), args=["--config", str(path)], **options)
    one, other = (callback for callback in command_line.trainer.callbacks if isinstance(callback, GAPHeadFinetuning))
    assert (one.num_classes, one.unfreeze_at_epoch, one.head_lr_multiplier) == (4, None, 20)
    assert (one.layer, one.sample, one.dropout) == ("2", [1, 3, 12, 12], 0.5)
    assert (other.attribute, other.unfreeze_at_epoch, other.sample) == ("net.model", 1, None)


# Learning


def test_fine_tuning_learns() -> None:
    """The new head on a frozen backbone, then both."""
    images, labels = processes.toy(48)
    data = torch.utils.data.TensorDataset(images, labels)
    options: dict[str, Any] = {"train": loader(data), "val": None, "max_epochs": 8}
    module = tiny(pl, lambda module: Adam(module.parameters(), 0.03))
    fit([callback(num_classes=3, unfreeze_at_epoch=4)], module, **options)
    assert float((module.eval()(images).argmax(1) == labels).float().mean()) >= 0.9


# Two processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(HELPERS / "finetuning_processes.py", tmp_path_factory.mktemp("ddp"), ranks=2)


def two(folder: Path, scene: str) -> tuple[Any, Any]:
    first, second = (torch.load(folder / f"{scene}-{rank}.pt") for rank in (0, 1))
    return first, second


@pytest.mark.distributed
@pytest.mark.parametrize("scene", ["unfreezes", "resumes"])
def test_two_processes_train_what_one_trains(folder: Path, scene: str, tmp_path: Path) -> None:
    first, second = two(folder, scene)
    alone = copy.deepcopy(processes.alone())
    start = classifier_of(processes.start()).state_dict()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], tensor, atol=1e-5), name
        assert float((tensor - start[name]).abs().max()) > 1e-4, f"{name} was not trained"
