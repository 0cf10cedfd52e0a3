"""How a run's module is run: its precision and device, its hook points, how many images at once."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.callbacks._lightning import Trainer
from lightning_interp.callbacks.run.ranks import Ranks, is_collective
from lightning_interp.model.chunks import rows_per_pass
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.locate import locate, structure_key
from lightning_interp.model.outputs import Predict, run_model
from lightning_interp.model.trace import LayerSpec

__all__ = ["ModelRunner", "is_out_of_memory", "release_memory"]

# Images of a probe that are explained at once. A CPU is faster over few, whose activations stay in its caches and its
# allocator; and the memory stays below that of a training step.
_CPU_ROWS, _OTHER_ROWS = 8, 32


class ModelRunner:
    """Runs a module as its Trainer runs it.

    Args:
        trainer: The run's Trainer.
        ranks: The processes.
    """

    def __init__(self, trainer: Trainer, ranks: Ranks) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._predicts: dict[Predict | None, Predict] = {}
        self._points: dict[object, HookPoint] = {}
        self._full_rows = rows_per_pass(self.device, cpu=_CPU_ROWS, other=_OTHER_ROWS)
        self.rows = self._full_rows  # in one pass; fewer where memory did not suffice

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return self._trainer.strategy.root_device

    @property
    def is_collective(self) -> bool:
        """Whether every rank runs every pass: no rank can run or read a sharded module alone."""
        return self._ranks.size > 1 and is_collective(self._trainer)

    def images(self, images: Tensor, module: nn.Module) -> Tensor:
        """Images on the device; as float32 where no parameter has their dtype: training steps convert such images."""
        dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        if dtypes and images.dtype not in dtypes:
            images = images.to(torch.float32)
        return images.to(self.device)

    def predict(self, predict: Predict | None) -> Predict:
        """How to run the module; the same callable for the whole run, by which hook points are remembered."""
        if predict not in self._predicts:
            self._predicts[predict] = functools.partial(_predict, self._trainer.precision_plugin, predict)
        return self._predicts[predict]

    def points(
        self, module: nn.Module, layers: Iterable[LayerSpec], images: Tensor, predict: Predict | None
    ) -> dict[LayerSpec, HookPoint]:
        """The hook points of layers. A search costs a forward pass; its result holds while the module's structure does.

        Raises:
            ConfigurationError: If there is no such layer.
        """
        points = {}
        for layer in layers:
            key = (layer, predict, images.shape[1:], structure_key(module))
            if key not in self._points:
                self._points[key] = locate(module, layer, images, predict=self.predict(predict))
            points[layer] = self._points[key]
        return points

    def halve_rows(self, rows: int) -> None:
        """Run half as many images at once from now on."""
        self.rows = (rows + 1) // 2

    def reset_rows(self) -> None:
        """Run as many images at once as in the beginning."""
        self.rows = self._full_rows


def _predict(precision: Any, predict: Predict | None, model: nn.Module, images: Any) -> Any:
    with precision.forward_context():
        return run_model(model, precision.convert_input(images), predict)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice, on a GPU or for torch's allocator on the CPU."""
    words = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def release_memory() -> None:
    """Return cached memory to the GPU."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
