"""What two processes do with a sharded module, and how else they are started; read by test_monitor_sharded.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import IterableDataset

from lightning_interp import (
    CAMMonitor,
    NormMonitor,
    SaliencyMonitor,
    WeightHistogramMonitor,
    default_monitors,
)
from lightning_interp.sinks.records import Histogram, Scalar
from tests.helpers.runs import (
    Augmented,
    dataset,
    differences,
    fingerprint,
    fit,
    for_flavour,
    loader,
    make_trainer,
    seed,
)
from tests.helpers.two_processes import pictures, rank, remember

Base = for_flavour(pl)


def network() -> nn.Sequential:
    """Of its bottleneck's weight and bias, the second of two processes holds nothing."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1), nn.Linear(1, 3)),
    )


class Plain(Base):  # type: ignore[misc, valid-type]
    def __init__(self) -> None:
        super().__init__()
        self.net = network()


class Sharded(Plain):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[4], mesh=mesh)
        fully_shard(self.net[9], mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class ShardedItself(Plain):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard([self.net[0], self.net[1]], mesh=mesh)
        fully_shard(self, mesh=mesh)


class Wider(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net[9], self.net[10] = nn.Linear(6, 4), nn.Linear(4, 3)


class TensorParallel(Wider):
    def configure_model(self) -> None:
        plan = {"net.9": ColwiseParallel(), "net.10": RowwiseParallel()}
        parallelize_module(self, self.device_mesh["tensor_parallel"], plan)


def sharding(data: int = 2) -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=2 // data)
    return {"package": pl, "devices": 2, "strategy": strategy}


def every_monitor(n: int, **options: Any) -> list[Any]:
    return [
        *default_monitors(probe=n, on_error="raise", **options),
        CAMMonitor(target="label", name="label", probe=n, on_error="raise", **options),
        SaliencyMonitor(
            method="smoothgrad", name="smooth", method_options={"n_samples": 4}, probe=n, on_error="raise", **options
        ),
        WeightHistogramMonitor(name="two", gradients=True, on_error="raise", **options),
        NormMonitor(name="max", ord=float("inf"), on_error="raise", **options),
        NormMonitor(name="three", ord=3, on_error="raise", **options),
    ]


def look(module: Any, **options: Any) -> dict[str, Any]:
    """All that one epoch's monitors show and count, before training."""
    sink = remember()
    fit(every_monitor(5), module, max_epochs=1, **options)
    first = [record for step, record in sink.records if step == 0]
    return {
        "pictures": {tag: image for (tag, step), image in pictures(sink).items() if step == 0},
        "scalars": {each.tag: each.value for each in first if isinstance(each, Scalar)},
        "histograms": {each.tag: each.counts for each in first if isinstance(each, Histogram)},
    }


def plain_look(kind: type[Any]) -> dict[str, Any]:
    seed()
    return look(kind(), package=pl)


def sharded_look() -> Any:
    seed()
    return look(Sharded(), **sharding())


def itself_look() -> Any:
    seed()
    return look(ShardedItself(), **sharding())


def tensor_parallel_look() -> Any:
    seed()
    return look(TensorParallel(), **sharding(1))


def full(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class ByHand(pl.Callback):
    """The slow, obvious way to norms and histograms of whole parameters, at every step."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], Any] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before = {name: full(each) for name, each in pl_module.named_parameters()}
        self.gradients = {name: full(each.grad) for name, each in pl_module.named_parameters()}
        self.step = trainer.global_step
        self.parameters = dict(pl_module.named_parameters())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        now = {name: full(each) for name, each in self.parameters.items()}
        for layer in ("net.4", "net.9"):

            def norm(tensors: dict[str, Tensor], layer: str = layer) -> float:
                return float(torch.cat([each.flatten() for name, each in tensors.items() if layer in name]).norm())

            changed = {name: now[name] - self.before[name] for name in now}
            self.found[f"norms/weight/{layer}", self.step] = norm(now)
            self.found[f"norms/gradient/{layer}", self.step] = norm(self.gradients)
            self.found[f"norms/update_ratio/{layer}", self.step] = norm(changed) / norm(self.before)
        for kind, tensors in {"weights": now, "gradients": self.gradients}.items():
            values = tensors["net.9.weight"].flatten()
            self.found[f"{kind}/net.9.weight", self.step] = torch.histc(values, 8).double()


def trained_look() -> Any:
    sink, by_hand = remember(), ByHand()
    options = {"every_n_train_steps": 1, "on_error": "raise"}
    monitors = [NormMonitor(**options), WeightHistogramMonitor(gradients=True, bins=8, **options)]
    seed()
    fit([*monitors, by_hand], Sharded(), max_epochs=2, **sharding())
    found = {}
    for step, record in sink.records:
        if isinstance(record, (Scalar, Histogram)) and (record.tag, step) in by_hand.found:
            found[record.tag, step] = record.value if isinstance(record, Scalar) else record.counts
    return {"by_hand": by_hand.found, "found": found}


class Local(dict[str, Any]):
    """A fingerprint of what this process holds."""

    @classmethod
    def of(cls, trainer: Any) -> Local:
        for each in trainer.lightning_module.modules():
            if hasattr(each, "reshard"):
                each.reshard()
        found = fingerprint(trainer)
        found.pop("hooks")  # compared apart: a model that only trains has them, too
        return cls({name: each.to_local() if isinstance(each, DTensor) else each for name, each in found.items()})


def forward_hooks(module: nn.Module) -> list[Any]:
    return [(name, len(each._forward_hooks), len(each._forward_pre_hooks)) for name, each in module.named_modules()]


def breaks_a_pass(model: Any, images: Tensor, targets: Tensor) -> Tensor:
    """Ends a forward pass half-way, on all ranks."""

    def stop(*args: Any) -> None:
        raise ValueError("half-way")

    model.net[4].register_forward_pre_hook(stop)
    model(images)
    return images.mean(1)


def invisible() -> Any:
    found = {}
    for kind in (Sharded, ShardedItself):
        prints, hooks, modules = [], [], []
        broken = CAMMonitor(method=breaks_a_pass, name="broken", probe=3)
        often = NormMonitor(name="often", every_n_train_steps=2, on_error="raise")
        alternatives: list[list[Any]] = [[], [*every_monitor(5), often], [broken, often]]
        for monitors in alternatives:
            remember()
            seed(3)
            options = {"train": loader(Augmented(20), shuffle=True), "val": loader(Augmented(8)), **sharding()}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is disabled from here on")
                trainer = fit(monitors, kind(), accumulate_grad_batches=2, num_sanity_val_steps=0, **options)
            prints.append(Local.of(trainer))
            hooks.append(forward_hooks(trainer.lightning_module))
            modules.append(trainer.lightning_module.trained)
        empty = [name for name, each in prints[0].items() if isinstance(each, Tensor) and each.numel() == 0]
        different = [differences(prints[0], each) for each in prints[1:]]
        found[kind.__name__] = (different, hooks[0] == hooks[1] == hooks[2], modules, empty)
    return found


def fails_on_one() -> Any:
    sink = remember()
    calls: list[int] = []

    def method(model: Any, images: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(images))
        if rank() == 1 and len(calls) == 2:
            raise MemoryError("no room on this one")
        return images.mean(1)

    seed()
    module = Sharded()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitors = [CAMMonitor(method=method, name="rash", probe=5), *every_monitor(5)]
        fit(monitors, module, **sharding())
    said = [str(each.message) for each in caught if "is disabled from here on" in str(each.message)]
    return {"said": said, "trained": module.trained, "calls": calls, "pictures": list(pictures(sink))}


class Undrawable(NormMonitor):
    def records(self, data: Any, step: int) -> Any:
        raise ValueError("cannot be drawn")


def fails_while_drawing() -> Any:
    """Known at first to the writing rank only, which must still take part in what all do."""
    sink = remember()
    seed()
    module = Sharded()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options: Any = {"every_n_train_steps": 1}
        monitors = [Undrawable(name="not", **options), WeightHistogramMonitor(gradients=True, **options)]
        fit(monitors, module, max_epochs=3, **sharding())
    said = [str(each.message) for each in caught if "cannot be drawn" in str(each.message)]
    histograms = {step for step, record in sink.records if isinstance(record, Histogram)}
    return {"said": len(said), "trained": module.trained, "steps": len(histograms)}


def evaluates() -> Any:
    sink = remember()
    seed()
    monitors = default_monitors(probe=4, on_error="raise")
    make_trainer(monitors, **sharding()).test(Sharded(), loader(dataset(8)), verbose=False)
    return list(pictures(sink))


class Elsewhere(IterableDataset[Any]):
    """Another stream on each process."""

    def __iter__(self) -> Any:
        images = torch.rand(12, 3, 12, 12, generator=torch.Generator().manual_seed(100 + rank()))
        yield from zip(images, torch.arange(12) % 3, strict=True)


def other_streams() -> Any:
    found = {}
    for name, kind, options in (("ddp", Plain, ddp()), ("sharded", Sharded, sharding())):
        remember()
        looked: list[Tensor] = []

        def method(model: Any, images: Tensor, targets: Tensor, looked: list[Tensor] = looked) -> Tensor:
            looked.append(images.clone())
            return images.mean(1)

        seed()
        monitor = CAMMonitor(method=method, probe=3, on_error="raise")
        fit([monitor], kind(), train=loader(Elsewhere()), val=loader(Elsewhere()), max_epochs=1, **options)
        found[name] = looked
    return found


def ddp() -> dict[str, Any]:
    return {"package": pl, "devices": 2, "strategy": "ddp"}


class Counted:
    """How often this library's own code makes the ranks talk."""

    NAMES = ("all_gather_object", "gather_object", "broadcast_object_list", "broadcast", "all_reduce", "barrier")

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> Counted:
        self.kept = {name: getattr(torch.distributed, name) for name in self.NAMES}
        for name, function in self.kept.items():
            setattr(torch.distributed, name, self.counting(function))
        self.full_tensor = DTensor.full_tensor
        DTensor.full_tensor = self.counting(self.full_tensor)
        return self

    def __exit__(self, *args: object) -> None:
        for name, function in self.kept.items():
            setattr(torch.distributed, name, function)
        DTensor.full_tensor = self.full_tensor

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            frame: Any = sys._getframe(1)
            while frame is not None:
                if "lightning_interp" in Path(frame.f_code.co_filename).parts[-4:]:
                    self.calls += 1
                    break
                frame = frame.f_back
            return function(*args, **options)

        return counted


class Watch(pl.Callback):
    """The count after each epoch, and how many images the module was asked for."""

    def __init__(self, counted: Counted) -> None:
        self.counted, self.seen = counted, []  # type: ignore[var-annotated]

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append((self.counted.calls, len(pl_module.looked_at)))


def silent() -> Any:
    found = {}
    for name, kind, options in (("ddp", Plain, ddp()), ("sharded", Sharded, sharding())):
        remember()
        with Counted() as counted:
            watch = Watch(counted)
            monitors = [
                *default_monitors(probe=3, on_error="raise", at_epochs=[2]),
                WeightHistogramMonitor(name="two", gradients=True, at_epochs=[2], on_error="raise"),
            ]
            seed()
            fit([*monitors, watch], kind(), max_epochs=4, **options)
            found[name] = [calls for calls, _ in watch.seen]
    return found


SCENES: list[Callable[[], Any]] = [
    *(sharded_look, itself_look, tensor_parallel_look, trained_look, invisible, fails_on_one, fails_while_drawing),
    *(evaluates, other_streams, silent),
]


def logger() -> TensorBoardLogger:
    return TensorBoardLogger(str(Path(sys.argv[1]) / "events"))


def spawned() -> None:
    seed()
    options = {"package": pl, "devices": 2, "strategy": "ddp_spawn", "logger": logger(), "max_epochs": 1}
    fit(default_monitors(probe=3, on_error="raise"), Plain(), **options)


def torchrun() -> None:
    """One process that was started as if there were many."""
    seed()
    options = {"package": pl, "devices": 1, "logger": logger(), "max_epochs": 1}
    fit(default_monitors(probe=3, on_error="raise"), Plain(), **options)


class Stopped(pl.Callback):
    """Stops one process, and no other."""

    def __init__(self, number: int, who: int) -> None:
        self.number, self.who = number, who

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and rank() == self.who:
            os.kill(os.getpid(), self.number)


def stopped(number: int, who: int) -> None:
    seed()
    monitors = default_monitors(probe=3, on_error="raise")
    fit([*monitors, Stopped(number, who)], Plain(), max_epochs=3, **(ddp() | {"logger": logger()}))


def terminated() -> None:
    stopped(signal.SIGTERM, 0)


def terminated_elsewhere() -> None:
    stopped(signal.SIGTERM, 1)


def interrupted() -> None:
    stopped(signal.SIGINT, 1)


OTHERS: list[Callable[[], Any]] = [spawned, torchrun, terminated, terminated_elsewhere, interrupted]


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    torch.set_num_threads(1)
    for other in OTHERS:
        if sys.argv[2:] == [other.__name__]:
            other()
            return
    for scene in SCENES:
        if not sys.argv[2:] or scene.__name__ in sys.argv[2:]:
            torch.save(scene(), Path(sys.argv[1]) / f"{scene.__name__}-{rank()}.pt")
    assert not [each for each in threading.enumerate() if each.name == "lightning_interp"], "a writer was left running"
    # Left to the interpreter's end, torch's own threads now and then abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
