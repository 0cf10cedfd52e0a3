"""What is read off a Trainer beyond its public face, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.data import IterableDataset

from lightning_interp.callbacks._lightning import LightningModule, Trainer, rank_zero_info
from lightning_interp.model.outputs import Predict, run_model
from lightning_interp.sinks import FileSink, Sink, TensorBoardSink

__all__ = [
    "forward",
    "is_last_step",
    "logged_step",
    "looks_indexable",
    "probe_loader",
    "scored_loader",
    "sinks",
    "transfer",
]


def logged_step(trainer: Trainer) -> int:
    """The x at which Lightning logs metrics now; in ``on_train_epoch_end`` it is one ahead."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_last_step(trainer: Trainer, module: LightningModule) -> bool:
    """Whether the optimiser step that comes may be the epoch's last; manual optimisation may step at any time."""
    return (
        not module.automatic_optimization
        or trainer.should_stop
        or trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        or 0 < trainer.max_steps <= trainer.global_step + 1
    )


def probe_loader(trainer: Trainer) -> Any:
    """The loader that probes come from by default: the stage's first; training's where there is none, or no image."""
    stages = [trainer.test_dataloaders] if trainer.testing else [trainer.val_dataloaders, trainer.train_dataloader]
    for found in map(_first, stages):
        if found is not None and not _is_empty(found):  # a loader's own truth is its length, and a stream has none
            return found
    return None


def scored_loader(trainer: Trainer) -> Any:
    """The loader whose images are scored: the first for the test or the validation, or None."""
    found = _first(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)
    return None if found is None or _is_empty(found) else found


def _first(loaders: Any) -> Any:
    while isinstance(loaders, (list, tuple, dict)):
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders), None)
    return loaders


def _is_empty(loader: Any) -> bool:
    dataset: Any = getattr(loader, "dataset", None)
    return hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset) and len(dataset) == 0


def forget_logged(trainer: Trainer, names: Iterable[str]) -> None:
    """Take numbers out of the evaluation loop's collection, once Lightning has passed them on.

    A compiled step is compiled again where there is more in that collection than before.
    """
    if (results := trainer._results) is not None:
        for name in names:
            results.pop(f"on_validation_epoch_end.{name}", None)


def looks_indexable(dataset: object) -> bool:
    """Whether single items can be read without consuming anything."""
    indexable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return indexable and not isinstance(dataset, IterableDataset)


def transfer(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A batch as the module takes it in validation: converted, moved to the device, through the module's hooks."""
    stage = trainer.state.stage
    if trainer.training:
        trainer.validating = True  # hooks that augment do so in training
    try:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.state.stage = stage


def forward(precision: Any, predict: Predict | None, model: nn.Module, images: Any) -> Any:
    """Run a module in the precision that its Trainer runs it in."""
    with precision.forward_context():
        return run_model(model, precision.convert_input(images), predict)


def sinks(trainer: Trainer) -> list[Sink]:
    """Where a Trainer's records go: TensorBoard where a logger is one, else files in the run's folder."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []  # as Lightning's own loggers: a trial run leaves nothing behind
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    found: list[Sink] = [TensorBoardSink(each) for each in experiments if TensorBoardSink.takes(each)]
    if found:
        return found
    if trainer not in _folders:
        _folders[trainer] = _run_folder(trainer)
        rank_zero_info(f"lightning_interp: no logger here takes pictures; PNG and CSV files go to {_folders[trainer]}")
    return [FileSink(_folders[trainer])]


# What a Trainer validates and tests after training belongs to the same run.
_folders: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def _run_folder(trainer: Trainer) -> Path:
    for logger in trainer.loggers:
        place: Callable[[], Any] | str | None = getattr(logger, "log_dir", None) or logger.save_dir
        if isinstance(place, str):
            return Path(place) / "lightning_interp"
    folder = Path(trainer.default_root_dir) / "lightning_interp"
    versions = [int(each.name[8:]) for each in folder.glob("version_*") if each.name[8:].isdigit()]
    return folder / f"version_{max(versions, default=-1) + 1}"
