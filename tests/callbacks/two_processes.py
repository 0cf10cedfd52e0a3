"""What two processes do under DDP; run as a script, and read by test_monitor_two_processes.py."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import TensorBoardLogger
from runs import Augmented, Items, Net, Stream, dataset, differences, fingerprint, fit, loader, make_trainer, seed
from torch import Tensor

from lightning_interp import CAMMonitor, NormMonitor, default_monitors
from lightning_interp.callbacks import reading
from lightning_interp.records import Picture
from lightning_interp.sinks import MemorySink

DDP = {"devices": 2, "strategy": "ddp"}
SINKS = reading.sinks


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def remember() -> MemorySink:
    """Everything that this process writes."""
    sink = MemorySink()
    reading.sinks = lambda trainer: [sink]
    return sink


def pictures(sink: MemorySink) -> dict[tuple[str, int], Tensor]:
    return {(record.tag, step): record.image for step, record in sink.records if isinstance(record, Picture)}


def looks(n: int, **options: Any) -> dict[tuple[str, int], Tensor]:
    """The pictures of one epoch that looks at ``n`` images."""
    sink = remember()
    fit(default_monitors(probe=n, on_error="raise"), max_epochs=1, **options)
    return pictures(sink)


def eight() -> Any:
    return looks(8, **DDP)


def uneven() -> Any:
    return looks(3, **DDP)


def single() -> Any:
    return looks(1, **DDP)


def invisible() -> list[str]:
    found = []
    for monitors in ([], default_monitors(probe=5, on_error="raise")):
        remember()
        seed(3)
        options = {"train": loader(Augmented(20), shuffle=True), "val": loader(Augmented(8)), **DDP}
        found.append(fingerprint(fit(monitors, Net(), accumulate_grad_batches=2, **options)))
    return differences(*found)


def fails_on_one() -> Any:
    sink = remember()
    calls: list[int] = []

    def method(model: Any, images: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(images))
        if rank() == 1 and len(calls) == 2:
            raise ValueError("no room on this one")
        return images.mean(1)

    module = Net()
    monitors = [CAMMonitor(method=method, name="rash", probe=6), *default_monitors(probe=6, on_error="raise")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(monitors, module, **DDP)
    said = [str(each.message) for each in caught if "rests from here on" in str(each.message)]
    return {"said": said, "trained": module.trained, "calls": calls, "pictures": list(pictures(sink))}


def fails_while_drawing() -> Any:
    sink = remember()
    write = sink.write

    def full(record: Any, step: int) -> None:
        if getattr(record, "tag", "").startswith("cam-full") and step > 0:
            raise ValueError("cannot be drawn")
        write(record, step)

    sink.write = full  # type: ignore[method-assign]
    module = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitors = [CAMMonitor(name="full", probe=2), NormMonitor(on_error="raise")]
        fit(monitors, module, max_epochs=3, **DDP)
    said = [str(each.message) for each in caught if "rests from here on" in str(each.message)]
    return {"said": said, "trained": module.trained, "pictures": list(pictures(sink))}


def streams() -> Any:
    sink = remember()
    module = Net()
    monitors = default_monitors(probe=3, on_error="raise")
    fit(monitors, module, train=loader(Stream(12)), val=loader(Stream(8)), max_epochs=1, **DDP)
    return {"trained": module.trained, "pictures": list(pictures(sink))}


def one_writer() -> Any:
    reading.sinks = SINKS
    folder = Path(sys.argv[1]) / "events"
    fit(default_monitors(probe=2, on_error="raise"), max_epochs=1, logger=TensorBoardLogger(str(folder)), **DDP)
    return None


def validates() -> Any:
    sink = remember()
    make_trainer(default_monitors(probe=4, on_error="raise"), **DDP).test(Net(), loader(dataset(8)), verbose=False)
    return list(pictures(sink))


def misuse() -> Any:
    remember()
    module = Net()
    module.read = lambda batch: (batch["left"], batch["right"])  # type: ignore[method-assign]
    data = loader(Items(lambda image, label: {"left": image, "right": label}))
    try:
        fit([CAMMonitor()], module, train=data, val=data, **DDP)
    except Exception as error:
        return f"{type(error).__name__}: {error}", module.trained
    return None


def raises_on_one() -> Any:
    remember()

    def method(model: Any, images: Tensor, targets: Tensor) -> Tensor:
        if rank() == 1:
            raise ValueError("no room on this one")
        return images.mean(1)

    try:
        fit([CAMMonitor(method=method, probe=4, on_error="raise")], **DDP)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


SCENES: list[Callable[[], Any]] = [
    *(eight, uneven, single, invisible, fails_on_one, fails_while_drawing, streams, one_writer, validates),
    *(misuse, raises_on_one),
]


def main() -> None:
    torch.set_num_threads(1)
    for scene in SCENES:
        torch.save(scene(), Path(sys.argv[1]) / f"{scene.__name__}-{rank()}.pt")
    assert not [each for each in threading.enumerate() if each.name == "lightning_interp"], "a writer was left running"
    # Left to the interpreter's end, torch's own threads now and then abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
