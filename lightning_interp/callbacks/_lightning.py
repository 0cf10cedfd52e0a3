"""The only import of ``lightning.pytorch`` and ``pytorch_lightning``, whichever is installed."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from lightning_utilities.core.apply_func import apply_to_collection

if TYPE_CHECKING:
    from lightning_utilities.core.rank_zero import rank_zero_info
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.callbacks import BaseFinetuning

__all__ = ["BaseFinetuning", "Callback", "LightningModule", "Trainer", "apply_to_collection", "rank_zero_info"]


def _installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return None
        raise


if not TYPE_CHECKING:
    _packages = [package for name in ("lightning.pytorch", "pytorch_lightning") if (package := _installed(name))]
    if not _packages:
        raise ModuleNotFoundError(
            "lightning_interp's callbacks need PyTorch Lightning; install it with: pip install pytorch-lightning"
        )
    LightningModule = _packages[-1].LightningModule
    Trainer = _packages[-1].Trainer
    rank_zero_info = importlib.import_module(f"{_packages[-1].__name__}.utilities.rank_zero").rank_zero_info

    class Callback(*(package.Callback for package in _packages)):
        """A callback of every Lightning that is installed: each package checks for its own class."""

    class BaseFinetuning(*(package.callbacks.BaseFinetuning for package in _packages)):
        """The base of callbacks that freeze and unfreeze, of every Lightning that is installed."""
