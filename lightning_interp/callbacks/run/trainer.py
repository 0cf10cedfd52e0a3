"""What is read off a Trainer beyond its public face."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import IterableDataset

from lightning_interp.callbacks._lightning import LightningModule, Trainer

__all__ = [
    "forget_logged",
    "is_indexable",
    "is_last_step",
    "logged_step",
    "probe_loader",
    "run_folder",
    "streamed_loader",
    "transfer_batch",
]


def logged_step(trainer: Trainer) -> int:
    """The step at which Lightning logs metrics now; in ``on_train_epoch_end`` it is one ahead."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_last_step(trainer: Trainer, module: LightningModule) -> bool:
    """Whether the next optimiser step may be the epoch's last; manual optimisation may step at any time."""
    return (
        not module.automatic_optimization
        or trainer.should_stop
        or trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        or 0 < trainer.max_steps <= trainer.global_step + 1
    )


def probe_loader(trainer: Trainer) -> Any:
    """The loader that probes come from by default: the stage's first; training's where there is none, or no image."""
    stages = [trainer.test_dataloaders] if trainer.testing else [trainer.val_dataloaders, trainer.train_dataloader]
    for loader in map(_first_loader, stages):
        if loader is not None and not _is_empty(loader):  # not bool(loader): an iterable data set has no length
            return loader
    return None


def streamed_loader(trainer: Trainer) -> Any:
    """The loader whose batches are streamed: the first of the test or the validation, or None."""
    loader = _first_loader(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)
    return None if loader is None or _is_empty(loader) else loader


def _first_loader(loaders: Any) -> Any:
    while isinstance(loaders, (list, tuple, dict)):
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders), None)
    return loaders


def _is_empty(loader: Any) -> bool:
    dataset: Any = getattr(loader, "dataset", None)
    return hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset) and len(dataset) == 0


def is_indexable(dataset: object) -> bool:
    """Whether single items can be read without consuming anything."""
    has_items = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return has_items and not isinstance(dataset, IterableDataset)


def forget_logged(trainer: Trainer, names: Iterable[str]) -> None:
    """Take numbers out of the evaluation loop's collection, once Lightning has passed them on.

    A compiled step is compiled again where there is more in that collection than before.
    """
    if (results := trainer._results) is not None:
        for name in names:
            results.pop(f"on_validation_epoch_end.{name}", None)


def transfer_batch(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
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


# What a Trainer validates and tests after training belongs to the same run.
_folders: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> tuple[Path, bool]:
    """The folder of a run's files, and whether it is new."""
    is_new = trainer not in _folders
    if is_new:
        _folders[trainer] = _new_folder(trainer)
    return _folders[trainer], is_new


def _new_folder(trainer: Trainer) -> Path:
    for logger in trainer.loggers:
        folder: Any = getattr(logger, "log_dir", None) or logger.save_dir
        if isinstance(folder, str):
            return Path(folder) / "lightning_interp"
    root = Path(trainer.default_root_dir) / "lightning_interp"
    versions = [int(path.name[8:]) for path in root.glob("version_*") if path.name[8:].isdigit()]
    return root / f"version_{max(versions, default=-1) + 1}"
