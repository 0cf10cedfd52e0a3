"""The only door to ``lightning.pytorch`` and ``pytorch_lightning``, whichever is installed."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_utilities.core.rank_zero import rank_zero_info
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.callbacks import BaseFinetuning

__all__ = ["BaseFinetuning", "Callback", "LightningModule", "Trainer", "rank_zero_info"]


def _installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return None
        raise


if not TYPE_CHECKING:
    _packages = [found for found in map(_installed, ("lightning.pytorch", "pytorch_lightning")) if found is not None]
    if not _packages:
        raise ModuleNotFoundError(
            "lightning_interp's callbacks need PyTorch Lightning; install it with: pip install pytorch-lightning"
        )
    LightningModule = _packages[-1].LightningModule
    Trainer = _packages[-1].Trainer
    rank_zero_info = importlib.import_module(f"{_packages[-1].__name__}.utilities.rank_zero").rank_zero_info

    class Callback(*(package.Callback for package in _packages)):
        """A callback in the eyes of every Lightning that is installed: each package checks for its own class."""

    class BaseFinetuning(*(package.callbacks.BaseFinetuning for package in _packages)):
        """The base of callbacks that freeze and unfreeze, in the eyes of every Lightning that is installed."""
