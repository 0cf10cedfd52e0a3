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
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_interp import CAMMonitor, LocalizationMonitor, NormMonitor, default_monitors
from lightning_interp.localize.ground_truth import boxes_to_masks
from lightning_interp.sinks import MemorySink
from lightning_interp.sinks.records import Picture
from tests.helpers import runs
from tests.helpers.runs import (
    Augmented,
    Items,
    Localiser,
    Log,
    Net,
    Squares,
    Stream,
    dataset,
    differences,
    fingerprint,
    fit,
    loader,
    loggers,
    make_trainer,
    seed,
)

DDP = {"devices": 2, "strategy": "ddp"}


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def remember() -> MemorySink:
    """Everything that this process writes."""
    sink = MemorySink()
    runs.TRAINER["logger"] = loggers(sink)
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
    said = [str(each.message) for each in caught if "is disabled from here on" in str(each.message)]
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
    said = [str(each.message) for each in caught if "is disabled from here on" in str(each.message)]
    return {"said": said, "trained": module.trained, "pictures": list(pictures(sink))}


def streams() -> Any:
    sink = remember()
    module = Net()
    monitors = default_monitors(probe=3, on_error="raise")
    fit(monitors, module, train=loader(Stream(12)), val=loader(Stream(8)), max_epochs=1, **DDP)
    return {"trained": module.trained, "pictures": list(pictures(sink))}


def one_writer() -> Any:
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


def scores(n: int = 7, *, plain: bool = False, fails: bool = False, masked: bool = False, **options: Any) -> Any:
    """What is logged at the end of each validation of ``n`` images, and what this rank says."""
    remember()
    seed(3)
    data = Squares(n)
    if masked:
        data.masks = boxes_to_masks(list(data.boxes[:, None]), 32, 32)
        del data.boxes
    monitor = LocalizationMonitor(probe=3, on_error="warn" if fails else "raise", every_n_epochs=2)
    if fails and rank() == 1:
        monitor.update = no_score  # type: ignore[method-assign]
    log = Log()
    module = Net(plain=True, optimizer="sgd") if plain else Localiser(0.0)
    if plain:
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([monitor, log], module, train=loader(Squares(8)), val=DataLoader(data, batch_size=2), **options)
    # The module's own val_loss is logged as users do who do not care.
    said = [str(each.message) for each in caught]
    return {
        "logged": log.epochs,
        "said": [each for each in said if "is disabled from here on" in each],
        "sync": [each for each in said if "sync_dist" in each and "localization" in each],
    }


def no_score(state: Any, batch: Any) -> None:
    raise ValueError("no score on this one")


def scores_uneven() -> Any:
    return scores(7, **DDP)


def scores_one_image() -> Any:
    return scores(1, **DDP)


def scores_by_gradcam() -> Any:
    return scores(7, plain=True, **DDP)


def scores_masks() -> Any:
    return scores(5, masked=True, **DDP)


def scores_fail_on_one() -> Any:
    return scores(7, fails=True, **DDP)


def scores_of_the_test_set() -> Any:
    remember()
    trainer = make_trainer([LocalizationMonitor(probe=3, on_error="raise")], **DDP)
    trainer.test(Localiser(0.0), DataLoader(Squares(7), batch_size=2), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "localization" in name}


SCENES: list[Callable[[], Any]] = [
    *(eight, uneven, single, invisible, fails_on_one, fails_while_drawing, streams, one_writer, validates),
    *(misuse, raises_on_one, scores_uneven, scores_one_image, scores_by_gradcam, scores_masks, scores_fail_on_one),
    scores_of_the_test_set,
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
