"""What can break in a look or while writing, and that training goes on all the same.

Proven elsewhere: an explainer that raises (``test_monitor_invisible``), monitors that fail on one rank
(``test_monitor_two_processes``), errors that end the run (``test_monitor_loggers``).
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_interp import (
    CAMMonitor,
    FilterMonitor,
    NormMonitor,
    Probe,
    SaliencyMonitor,
    WeightHistogramMonitor,
    default_monitors,
)
from lightning_interp.callbacks.run.runner import ModelRunner
from lightning_interp.sinks import FileSink, MemorySink, TensorBoardSink
from lightning_interp.sinks.background import BackgroundWriter
from lightning_interp.sinks.records import Picture, Scalar, Text
from tests.helpers.runs import (
    TRAINER,
    Net,
    coordinator,
    dataset,
    fit,
    loader,
    loggers,
    make_trainer,
    read_events,
    steps,
    tags,
)

FULL = OSError(28, "No space left on device")


def disabled(caught: Any) -> list[str]:
    return [str(each.message) for each in caught if "is disabled from here on" in str(each.message)]


def no_threads() -> bool:
    return not any(each.name == "lightning_interp" for each in threading.enumerate())


# ---- Memory.


class Hungry:
    """Fits only so many images at once, and says how many it was given."""

    def __init__(self, fitting: int, error: Callable[[], Exception]) -> None:
        self.fitting, self.error = fitting, error
        self.given: list[int] = []

    def __call__(self, model: Any, images: Tensor, targets: Tensor) -> Tensor:
        self.given.append(len(images))
        if len(images) > self.fitting:
            raise self.error()
        return images.mean(1)


OUT_OF_MEMORY: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("CUDA error: out of memory"),
    lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError,
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_chunk_is_halved_for_all_until_it_fits(
    memory: MemorySink, error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_interp.callbacks.run.runner._CPU_ROWS", 12)
    hungry, other = Hungry(5, error), Hungry(99, error)
    monitors = [
        CAMMonitor(method=other, name="other", probe=12, on_error="raise"),
        CAMMonitor(method=hungry, name="hungry", probe=12, on_error="raise"),
    ]
    fit(monitors, val=None, max_epochs=1)
    # The second look begins with what has fitted.
    assert hungry.given == [12, 6, 3, 3, 3, 3, 3, 3, 3, 3]
    assert other.given == hungry.given, "all monitors that share the pass go by the same chunks"
    for tag in ("cam-hungry/Hungry", "cam-other/Hungry"):
        assert steps(memory, tag) == [0, 2], "each image is there once"
    assert len({record.image.shape for _, record in memory.records if isinstance(record, Picture)}) == 1


def test_what_never_fits_is_given_up_and_the_others_go_on_as_before(memory: MemorySink) -> None:
    hungry, other = Hungry(0, OUT_OF_MEMORY[0]), Hungry(99, OUT_OF_MEMORY[0])
    module = Net()
    with pytest.warns(UserWarning, match="out of memory") as caught:
        fit([CAMMonitor(method=hungry, name="hungry"), CAMMonitor(method=other, name="other")], module, max_epochs=1)
    assert hungry.given == [8, 4, 2, 1]
    assert other.given == [8, 4, 2, 1, 7, 8], "with that one gone, the rest of the chunk goes at once"
    (warning,) = disabled(caught)
    assert "CAMMonitor('hungry')" in warning
    assert "Traceback" in warning
    assert module.trained == 3
    assert tags(memory) == {"cam-other/Hungry"}
    assert steps(memory, "cam-other/Hungry") == [0, 2]


def test_memory_that_the_shared_pass_lacks(memory: MemorySink) -> None:
    class Wide(Net):
        def forward(self, images: Tensor) -> Any:
            if len(images) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(images)

    module = Wide()
    fit([CAMMonitor(on_error="raise"), SaliencyMonitor(on_error="raise")], module, max_epochs=1)
    assert steps(memory, "cam/gradcam") == steps(memory, "saliency/saliency") == [0, 2]
    assert module.trained == 3


def test_halved_chunks_show_what_the_whole_shows(memory: MemorySink, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(fitting: int) -> list[Tensor]:
        memory.records.clear()
        torch.manual_seed(0)
        hungry = CAMMonitor(method=Hungry(fitting, OUT_OF_MEMORY[1]), name="hungry", on_error="raise")
        fit([CAMMonitor(on_error="raise"), hungry], Net(plain=True), max_epochs=1)
        return [record.image for _, record in memory.records if isinstance(record, Picture)]

    whole, halved = run(99), run(3)
    assert len(whole) == len(halved) == 4
    for one, other in zip(whole, halved, strict=True):
        assert (one.int() - other.int()).abs().max() <= 1


def test_nothing_is_tried_again_inside_a_sharded_forward(memory: MemorySink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "is_collective", property(lambda self: True))
    hungry = Hungry(5, OUT_OF_MEMORY[0])
    with pytest.warns(UserWarning, match="out of memory"):
        fit([CAMMonitor(method=hungry)], max_epochs=1)
    assert hungry.given == [8]


def test_a_lack_of_memory_keeps_no_tensor_alive(memory: MemorySink) -> None:
    held: list[Any] = []

    def method(model: Any, images: Tensor, targets: Tensor) -> Tensor:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        alive.append([each() is not None for each in held])
        raise torch.OutOfMemoryError("CUDA out of memory")

    alive: list[list[bool]] = []
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="out of memory"):
            fit([CAMMonitor(method=method, probe=4)], max_epochs=1)
    finally:
        gc.enable()
    assert alive == [[True], [False, True], [False, False, True]]


def test_copying_the_parameters_may_lack_memory_too(memory: MemorySink, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_interp.callbacks.run import probe_pass

    true_guard = probe_pass.preserve_state

    def guard(module: Any, *, parameters: bool = False) -> Any:
        if parameters:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true_guard(module)

    monkeypatch.setattr(probe_pass, "preserve_state", guard)
    module = Net()
    with pytest.warns(UserWarning, match="out of memory") as caught:
        fit([NormMonitor(on_error="raise"), CAMMonitor(method=lambda m, i, t: i.mean(1))], module)
    assert len(disabled(caught)) == 1
    assert module.trained == 6
    assert steps(memory, "norms/weight") == [0, 2, 5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_lack_of_memory_on_a_gpu(memory: MemorySink) -> None:
    free, _ = torch.cuda.mem_get_info()
    share = free // 6

    def method(model: Any, images: Tensor, targets: Tensor) -> Tensor:
        kept = [torch.empty(share, dtype=torch.uint8, device=images.device) for _ in images]
        return images.mean(1) + 0 * kept[0][0]

    fit([CAMMonitor(method=method, on_error="raise")], max_epochs=1, accelerator="gpu")
    assert steps(memory, "cam/method") == [0, 2]


# ---- Numbers that are not finite.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["weights", "activations", "gradients", "images", "everything"])
def test_numbers_that_are_not_finite(memory: MemorySink, bad: float, place: str) -> None:
    class Sick(Net):
        def forward(self, images: Tensor) -> Any:
            if place in ("activations", "everything"):
                images = images * torch.where(images > 0.5, bad, 1.0)
            return super().forward(images)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if place in ("gradients", "everything"):
                for parameter in self.parameters():
                    if parameter.grad is not None:
                        parameter.grad.view(-1)[0] = bad

    module = Sick()
    if place in ("weights", "everything"):
        with torch.no_grad():
            module.net[0].weight[0] = bad
            module.net[9].weight.fill_(bad)
    data = dataset(8)
    if place in ("images", "everything"):
        data.tensors[0][0, 0] = bad
    every = [*default_monitors(on_error="raise"), WeightHistogramMonitor(gradients=True, name="g", on_error="raise")]
    every += [NormMonitor(ord=order, name=f"o{order:g}", on_error="raise") for order in (1, math.inf)]
    every += [SaliencyMonitor(method="smoothgrad", method_options={"n_samples": 2}, on_error="raise")]
    fit(every, module, val=loader(data), max_epochs=1)
    for tag in ("cam/gradcam", "saliency/saliency", "saliency/smoothgrad", "filters/net.0", "norms/weight"):
        assert steps(memory, tag) == [0, 2], tag


# ---- Places that take nothing more.


@pytest.mark.parametrize("broken", ["png", "csv", "folder"])
def test_a_full_disk_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise FULL

    if broken == "png":
        monkeypatch.setattr(Path, "write_bytes", full)
    elif broken == "csv":
        true_open = Path.open
        monkeypatch.setattr(
            Path, "open", lambda self, *args, **kw: full() if self.suffix == ".csv" else true_open(self, *args, **kw)
        )
    else:
        true_mkdir = Path.mkdir
        monkeypatch.setattr(
            Path,
            "mkdir",
            lambda self, *args, **kw: full() if "lightning_interp" in str(self) else true_mkdir(self, *args, **kw),
        )
    module = Net()
    with pytest.warns(UserWarning, match="No space left") as caught:
        fit(default_monitors(), module, max_epochs=3, default_root_dir=str(tmp_path))
    (warning,) = disabled(caught)
    assert "Traceback" in warning
    assert "FileSink" in warning
    assert module.trained == 9
    assert no_threads()
    assert not list(tmp_path.rglob("*.part")), "no half a picture"


def test_a_disk_that_fills_later_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_write = Path.write_bytes

    def write_bytes(self: Path, content: bytes) -> None:
        true_write(self, content[: len(content) // 2] if "00000005" in self.name else content)
        if "00000005" in self.name:
            raise FULL

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    module = Net()
    with pytest.warns(UserWarning, match="No space left") as caught:
        fit([FilterMonitor()], module, max_epochs=3, default_root_dir=str(tmp_path))
    assert len(disabled(caught)) == 1
    assert module.trained == 9
    pictures = sorted(tmp_path.rglob("*.png"))
    assert [each.stem for each in pictures] == ["00000000", "00000002"]
    for each in pictures:
        with Image.open(each) as found:
            found.load()


def test_a_full_disk_ends_the_run_where_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise FULL

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="writes no more"), pytest.raises(OSError, match="No space left"):
        fit([FilterMonitor(on_error="raise")], default_root_dir=str(tmp_path))
    assert no_threads()


class Broken(MemorySink):
    """Fails from a step on."""

    def __init__(self, error: Exception, step: int = 0, only: str = "") -> None:
        super().__init__()
        self.error, self.step, self.only = error, step, only
        self.asked = 0

    def write(self, record: Any, step: int) -> None:
        self.asked += 1
        if step >= self.step and getattr(record, "tag", "").startswith(self.only):
            raise self.error
        super().write(record, step)


@pytest.mark.parametrize("first", [True, False])
def test_of_two_places_the_other_gets_everything(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    broken, whole = Broken(FULL, step=2), MemorySink()
    monkeypatch.setitem(TRAINER, "logger", loggers(broken, whole) if first else loggers(whole, broken))
    with pytest.warns(UserWarning, match="the other loggers get everything") as caught:
        fit([FilterMonitor(), NormMonitor()])
    assert len([each for each in caught if "lightning_interp" in str(each.message)]) == 1
    for tag in ("filters/net.0", "norms/weight", "norms/weight/total"):
        assert steps(whole, tag) == [0, 2, 5]
    assert steps(broken, "filters/net.0") == [0]


def test_a_record_that_no_place_takes_is_its_monitors_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    picky, other = (Broken(TypeError("no such picture"), only="filters") for _ in range(2))
    monkeypatch.setitem(TRAINER, "logger", loggers(picky, other))
    with pytest.warns(UserWarning, match="FilterMonitor failed and is disabled") as caught:
        fit([FilterMonitor(), NormMonitor()])
    assert len(disabled(caught)) == 1
    assert steps(picky, "norms/weight") == steps(other, "norms/weight") == [0, 2, 5]


@pytest.mark.parametrize("where", ["write", "flush"])
def test_a_place_that_refuses_what_another_takes_is_dropped(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("no bucket today")

    picky, whole = MemorySink(), MemorySink()
    monkeypatch.setattr(picky, where, refuse)
    monkeypatch.setitem(TRAINER, "logger", loggers(picky, whole))
    module = Net()
    with pytest.warns(UserWarning, match="the other loggers get everything") as caught:
        fit([FilterMonitor(), NormMonitor()], module)
    assert len([each for each in caught if "no bucket today" in str(each.message)]) == 1
    assert steps(whole, "norms/weight") == steps(whole, "filters/net.0") == [0, 2, 5]
    assert module.trained == 6


def test_a_writer_that_somebody_closed(tmp_path: Path) -> None:
    class Closing(Net):
        def on_train_epoch_start(self) -> None:
            written = threading.Event()
            coordinator(self.trainer).output.writer.submit(written.set)
            assert written.wait(30)
            self.logger.experiment.close()

    logger = TensorBoardLogger(str(tmp_path))
    module = Closing()
    # torch's writer opens a new file, and TensorBoard reads both.
    fit(default_monitors(probe=2, on_error="raise"), module, logger=logger)
    assert module.trained == 6
    events = read_events(logger.log_dir)
    assert 5 in {event.step for event in events.Images("cam/gradcam")}
    assert no_threads()


def test_a_writer_that_refuses_once_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SummaryWriter(str(tmp_path))
    monkeypatch.setitem(TRAINER, "logger", loggers(TensorBoardSink(writer)))

    class Closing(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                coordinator(self.trainer).output.writer.submit(lambda: writer.file_writer.event_writer.close())

    module = Closing()
    with pytest.warns(UserWarning, match="Writer is closed") as caught:
        fit([FilterMonitor(), NormMonitor()], module, max_epochs=3)
    assert len(disabled(caught)) == 1
    assert module.trained == 9
    assert [event.step for event in read_events(tmp_path).Images("filters/net.0")] == [0, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_an_event_file_on_a_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    writer = SummaryWriter(str(tmp_path), flush_secs=1, max_queue=2)
    event_writer = writer.file_writer.event_writer
    event_writer.flush()
    inner = event_writer._async_writer._writer if hasattr(event_writer, "_async_writer") else None
    if inner is None:
        pytest.skip("TensorBoard keeps its file elsewhere")
    inner._writer = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    monkeypatch.setitem(TRAINER, "logger", loggers(TensorBoardSink(writer)))
    module = Net()
    started = time.monotonic()
    with pytest.warns(UserWarning, match="No space left") as caught:
        fit(default_monitors(), module, max_epochs=3)
    assert time.monotonic() - started < 30
    assert len(disabled(caught)) == 1
    assert module.trained == 9
    assert no_threads()
    inner._writer.close()


def test_several_loggers_one_of_which_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [TensorBoardLogger(str(tmp_path / "a")), TensorBoardLogger(str(tmp_path / "b")), CSVLogger(str(tmp_path))]

    file_writer = loggers[0].experiment._get_file_writer()
    true_add = file_writer.add_summary

    def add_summary(summary: Any, *args: Any, **options: Any) -> None:
        if any(value.HasField("image") for value in summary.value):
            raise FULL
        true_add(summary, *args, **options)

    monkeypatch.setattr(file_writer, "add_summary", add_summary)
    with pytest.warns(UserWarning, match="No space left"):
        fit(default_monitors(probe=2), logger=loggers)
    assert [event.step for event in read_events(loggers[1].log_dir).Images("cam/gradcam")] == [0, 2, 5]
    # Lightning's own numbers go on in the place that was given up.
    assert read_events(loggers[0].log_dir).Scalars("val_loss")


# ---- The writer's thread.


def test_the_queue_is_bounded_keeps_order_and_drops_nothing() -> None:
    writer, go, done = BackgroundWriter(waiting=2), threading.Event(), []
    writer.submit(go.wait)  # type: ignore[arg-type]
    handed: list[int] = []

    def hand_over() -> None:
        for number in range(20):
            writer.submit(lambda number=number: done.append(number))  # type: ignore[misc]
            handed.append(number)

    hand = threading.Thread(target=hand_over)
    hand.start()
    time.sleep(0.1)
    assert len(handed) == 2, "where too much waits, handing over waits, too"
    assert not done
    go.set()
    hand.join(10)
    writer.close()
    assert done == list(range(20))
    writer.close()
    writer.submit(lambda: done.append(20))
    writer.close()
    assert done[-1] == 20, "it begins again"
    assert no_threads()


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_a_job_that_raises_stops_neither_the_others_nor_the_run(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    writer, done = BackgroundWriter(waiting=1), []

    def fail() -> None:
        raise error

    for number in range(4):
        writer.submit(fail)
        writer.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    writer.close()
    assert done == [0, 1, 2, 3]
    assert [each.exc_value for each in told] == [error] * 4


def test_a_ctrl_c_while_waiting_for_the_end_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, done = BackgroundWriter(), []
    writer.submit(lambda: time.sleep(0.2))
    writer.submit(lambda: done.append(1))
    true_join = threading.Thread.join

    def join(self: Any, timeout: float | None = None) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert threading.Thread.join is true_join
    writer.close()  # as the interpreter's exit does
    assert done == [1]
    assert no_threads()


def test_the_thread_keeps_no_job_that_is_done() -> None:
    class Large:
        pass

    writer, large, event = BackgroundWriter(), Large(), threading.Event()
    kept = weakref.ref(large)

    def job(large: Large = large) -> None:
        event.set()

    writer.submit(job)
    del large, job
    assert event.wait(5)
    for _ in range(50):
        if kept() is None:
            break
        time.sleep(0.02)
    assert kept() is None
    writer.close()


def test_a_writer_that_nobody_closes_ends_with_its_last_reference() -> None:
    done: list[int] = []
    writer = BackgroundWriter()
    writer.submit(lambda: done.append(1))
    del writer
    gc.collect()
    assert done == [1]
    # The last reference may be a job's own.
    holder = BackgroundWriter()
    go = threading.Event()
    holder.submit(lambda held=holder: (go.wait(5), done.append(2)))  # type: ignore[misc]
    del holder
    go.set()
    for _ in range(100):
        gc.collect()
        if no_threads():
            break
        time.sleep(0.02)
    assert done == [1, 2]
    assert no_threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_does_not_inherit_the_thread() -> None:
    writer, go = BackgroundWriter(waiting=1), threading.Event()
    writer.submit(go.wait)  # type: ignore[arg-type]
    writer.submit(lambda: None)  # the queue is full
    child = os.fork()
    if child == 0:
        found = 1
        try:
            writer.close()
            done: list[int] = []
            for number in range(5):
                writer.submit(lambda number=number: done.append(number))  # type: ignore[misc]
            writer.close()
            found = 0 if done == list(range(5)) else 2
        finally:
            os._exit(found)
    status = None
    for _ in range(200):
        process, found = os.waitpid(child, os.WNOHANG)
        if process:
            status = os.waitstatus_to_exitcode(found)
            break
        time.sleep(0.05)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    go.set()
    writer.close()
    assert status == 0


class Slow(MemorySink):
    def write(self, record: Any, step: int) -> None:
        time.sleep(0.02)
        super().write(record, step)


class Watching(torch.utils.data.Dataset[Any]):
    """Counts the writer's threads in the process that loads."""

    def __init__(self) -> None:
        self.inner = dataset()

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        assert no_threads() or multiprocessing.parent_process() is None
        return self.inner[index]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_loaders_with_workers_beside_a_busy_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    monkeypatch.setitem(TRAINER, "logger", loggers(slow))
    module = Net()
    fit(
        default_monitors(probe=2, on_error="raise", every_n_train_steps=1),
        module,
        train=loader(Watching(), num_workers=2, multiprocessing_context="fork"),
        max_epochs=1,
    )
    assert module.trained == 3
    assert steps(slow, "cam/gradcam") == [0, 0, 1, 2]
    assert no_threads()


@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_train_epoch_end"])
def test_an_exception_drains_the_queue_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    slow = Slow()
    monkeypatch.setitem(TRAINER, "logger", loggers(slow))
    module = Net()

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, where, fail)
    with pytest.raises(ZeroDivisionError):
        fit([FilterMonitor(), NormMonitor()], module, num_sanity_val_steps=0)
    assert steps(slow, "filters/net.0")[0] == 0
    assert steps(slow, "norms/weight")[0] == 0
    assert no_threads()


def test_no_thread_outlives_a_trainer_in_any_stage(memory: MemorySink) -> None:
    trainer = make_trainer([FilterMonitor()], max_epochs=1)
    module = Net()
    trainer.fit(module, loader(dataset()), loader(dataset(8)))
    assert no_threads()
    trainer.validate(module, loader(dataset(8)), verbose=False)
    trainer.test(module, loader(dataset(8)), verbose=False)
    assert no_threads()


# ---- Processes that end.

AT_EXIT = """
import sys, threading, time
from lightning_interp.sinks.background import BackgroundWriter
writer = BackgroundWriter(waiting=8)
def job(number):
    time.sleep(0.05)
    with open(sys.argv[1], "a") as file:
        file.write(f"{number}\\n")
for number in range(6):
    writer.submit(lambda number=number: job(number))
if sys.argv[2] == "raise":
    raise ValueError("at the end")
writer.me = writer  # in a cycle that nobody collects
"""

RUN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pytorch_lightning.loggers import TensorBoardLogger
from tests.helpers.runs import Net, fit
from lightning_interp import CAMMonitor, FilterMonitor, NormMonitor
from lightning_interp.sinks import TensorBoardSink

write = TensorBoardSink.write
def slow(self, record, step):
    time.sleep(0.01)  # so that something waits when the signal comes
    write(self, record, step)
TensorBoardSink.write = slow

class Endless(Net):
    def training_step(self, batch, batch_idx):
        if self.current_epoch >= 2:
            time.sleep(0.05)
        return super().training_step(batch, batch_idx)
    def on_train_epoch_start(self):
        print("begins", self.current_epoch, flush=True)

def run(name):
    for stream in (1, 2):
        os.dup2(os.open(f"{name}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
    print("is", os.getpid(), flush=True)
    monitors = [CAMMonitor(probe=2, on_error="raise"), FilterMonitor(on_error="raise"), NormMonitor(on_error="raise")]
    logger = TensorBoardLogger(os.getcwd(), name=name, version="")
    fit(monitors, Endless(), logger=logger, max_epochs=300)

children = {}
for name in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        run(name)
        sys.exit()
    children[name] = child
for name, child in children.items():
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

SIGNALS = ["SIGKILL", "SIGINT", "SIGTERM"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Where three runs logged that three signals ended, and their exit codes."""
    folder = tmp_path_factory.mktemp("signals")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(Path(__file__).parent), *SIGNALS]
    children: dict[str, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as launcher:
        try:
            waiting, deadline = list(SIGNALS), time.monotonic() + 120
            while waiting and launcher.poll() is None and time.monotonic() < deadline:
                for name in list(waiting):
                    said = (folder / f"{name}.1").read_text() if (folder / f"{name}.1").exists() else ""
                    if "is " in said and name not in children:
                        children[name] = int(said.split()[1])
                    # What a kill must leave is what was written.
                    if "begins 3" in said and (name != "SIGKILL" or 5 in looks_in(folder / name, "norms/weight")):
                        os.kill(children[name], getattr(signal, name))
                        waiting.remove(name)
                time.sleep(0.1)
            assert not waiting, "the runs did not get on"
            codes = dict(line.split() for line in launcher.communicate(timeout=60)[0].splitlines())
        finally:
            if launcher.poll() is None:
                for child in children.values():
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                launcher.kill()
    return folder, {name: int(code) for name, code in codes.items()}


def looks_in(folder: Path, tag: str) -> list[int]:
    events = read_events(folder) if folder.exists() else None
    return [] if events is None or tag not in events.Tags()["images"] else [each.step for each in events.Images(tag)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_leaves_readable_logs(ended: Any, name: str) -> None:
    folder, codes = ended
    said, errors = (folder / f"{name}.1").read_text().splitlines(), (folder / f"{name}.2").read_text()
    finished = max(int(line.split()[1]) for line in said if line.startswith("begins"))
    looks = [0, *(3 * epoch + 2 for epoch in range(finished))]
    for tag in ("cam/gradcam", "filters/net.0", "norms/weight"):
        found = looks_in(folder / name, tag)
        if name == "SIGKILL":
            # Nothing can be drained any more: what was still being written may lack, and nothing before it.
            assert found == looks[: len(found)]
            assert len(found) >= 3
        else:
            assert found[: len(looks)] == looks, errors
    assert "Exception ignored" not in errors
    assert "Fatal" not in errors
    if name != "SIGTERM":  # Lightning's own business
        assert codes[name] == (-9 if name == "SIGKILL" else 1)


@pytest.mark.parametrize("how", ["quietly", "raise"])
def test_the_interpreters_exit_does_what_is_left(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(tmp_path / "done"), how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert (tmp_path / "done").read_text().split() == [str(number) for number in range(6)], done.stderr
    assert done.returncode == (1 if how == "raise" else 0)
    assert "Exception ignored" not in done.stderr


# ---- Files that are killed halfway, and data that fail.


def test_text_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "run")
    sink.write(Scalar("norms/\udc80", 1.0), 0)
    sink.write(Text("note/\udc80", "lone \udc80 surrogate"), 0)
    sink.write(Scalar("norms/after", 2.0), 0)
    sink.write(Picture("cam/" + "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 200, torch.zeros(2, 2, 3, dtype=torch.uint8)), 0)
    sink.close()
    assert "norms/after,2.0" in (tmp_path / "run" / "scalars.csv").read_text()
    assert len(list(tmp_path.rglob("*.png"))) == 1


class Unreadable(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise OSError("the photograph is broken")


def test_a_probe_that_cannot_be_loaded(memory: MemorySink) -> None:
    module = Net()
    broken = CAMMonitor(probe=Unreadable())
    with pytest.warns(UserWarning, match="photograph is broken") as caught:
        fit([broken, FilterMonitor(on_error="raise"), SaliencyMonitor(probe=2, on_error="raise")], module)
    assert len(disabled(caught)) == 1
    assert module.trained == 6
    assert steps(memory, "filters/net.0") == steps(memory, "saliency/saliency") == [0, 2, 5]
    assert not steps(memory, "cam/gradcam")
    with pytest.raises(OSError, match="photograph is broken"):
        fit([CAMMonitor(probe=Unreadable(), on_error="raise")])


def test_all_monitors_of_a_class_rest_on_their_own(memory: MemorySink) -> None:
    def fail(model: Any, images: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError("not today")

    probe = Probe(torch.rand(2, 3, 12, 12))
    monitors = [CAMMonitor(method=fail, name=str(i), probe=probe, every_n_epochs=1 + i) for i in range(2)]
    with pytest.warns(UserWarning, match="not today") as caught:
        fit([*monitors, CAMMonitor(probe=probe, on_error="raise")])
    assert len(disabled(caught)) == 2
    assert steps(memory, "cam/gradcam") == [0, 2, 5]
