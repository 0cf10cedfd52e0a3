"""What the monitors of one Trainer share during one run: probes, looks, sinks and failures."""

from __future__ import annotations

import functools
import itertools
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_interp.callbacks._lightning import LightningModule, Trainer
from lightning_interp.callbacks.run import trainer as reading
from lightning_interp.callbacks.run.output import flush, reach, retagged, told, write
from lightning_interp.callbacks.run.ranks import Ranks, obstacle, runs_together
from lightning_interp.callbacks.run.scoring import Scoring
from lightning_interp.callbacks.run.transfer import HostCopy
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.locate import locate, structure_key
from lightning_interp.model.outputs import Predict
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.sharding import reset_fsdp_state, reshard
from lightning_interp.model.trace import Trace
from lightning_interp.sinks import BackgroundWriter, Sink
from lightning_interp.sinks.records import Record

if TYPE_CHECKING:
    from lightning_interp.callbacks.base import Monitor, ProbeMonitor
    from lightning_interp.callbacks.monitors.localization import LocalizationMonitor

__all__ = ["Session"]

# Images of a probe that are explained at once. A CPU is faster over few, whose activations stay in its caches and its
# allocator; and the memory stays below that of a training step.
_CHUNKS = {"cpu": 8}
_CHUNK = 32
_DEFAULT_COUNT = 8
_sessions: WeakKeyDictionary[Trainer, Session] = WeakKeyDictionary()


class Session:
    """One run of one Trainer. Nothing of it hangs on the LightningModule or on a monitor.

    Every method is called at the same moment on every rank, and none communicates unless a monitor is due.
    """

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        self.trainer = trainer
        self.monitors = list(monitors)
        self.ranks = Ranks.of(trainer)
        self.sinks: list[Sink] = reading.sinks(trainer) if self.ranks.writes else []
        self.writer = BackgroundWriter()
        self._probes: dict[object, Probe | None] = {}
        self._forwards: dict[Predict | None, Predict] = {}
        self._sites: dict[object, HookPoint] = {}
        self._full_chunk = _CHUNKS.get(trainer.strategy.root_device.type, _CHUNK)
        self._chunk = self._full_chunk  # smaller where memory did not suffice
        self._lost_sinks: list[tuple[Sink, Exception]] = []  # not yet said
        self._said: list[Exception] = []
        self._resting: set[Monitor] = set()
        self._failed: dict[Monitor, Exception] = {}  # not yet settled
        self._capturing: list[Monitor] = []  # in the same order on every rank
        self._scoring = Scoring(self)
        self._steps = 0
        self._awaits_start = False
        self._under_way = False

    @classmethod
    def begin(cls, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        """Begin a run; the first monitor leads."""
        _sessions[trainer] = cls(trainer, monitors)

    @classmethod
    def led_by(cls, monitor: Monitor, trainer: Trainer) -> Session | None:
        """The running session, if this monitor leads it."""
        session = _sessions.get(trainer)
        return session if session is not None and session.monitors[0] is monitor else None

    @property
    def may_retry(self) -> bool:
        """Whether a rank may run the model again on its own: not where all ranks must take part in each pass."""
        return not self.together

    @property
    def together(self) -> bool:
        """Whether every rank looks at everything: no rank can run or read a sharded module alone."""
        return self.ranks.size > 1 and runs_together(self.trainer)

    def end(self) -> None:
        """Bring everything to the loggers and end the run."""
        _sessions.pop(self.trainer, None)
        self._scoring.stop()
        self.writer.close()
        self._say_lost_sinks()
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                warnings.warn(f"lightning_interp could not finish writing: {told(error)}", stacklevel=2)
        for monitor in list(self._failed):
            self._rest(monitor, self._failed.pop(monitor))

    # ---- What the Trainer's hooks ask for.

    def check(self, module: LightningModule) -> None:
        """Refuse what cannot work with this module."""
        tags: set[str] = set()
        for monitor in self.monitors:
            monitor.check(module)
            for tag in monitor.tags(module):
                if tag in tags:
                    raise ConfigurationError(f"two monitors would write {tag!r}; give one of them a name=...")
                tags.add(tag)

    def start(self, module: LightningModule) -> None:
        """Before the first batch: find the probes, and look at the untrained model."""
        if self._is_hindered():
            return
        self._steps = self.trainer.global_step
        self._awaits_start = True
        self._find_probes(module)
        self._start_if_ready(module)

    def pass_by(self, module: LightningModule, batch: Any) -> None:
        """Take the probes that nothing else gives from a batch that is on its way into the model."""
        for monitor in filter(uses_probe, self.monitors):
            key = _probe_key(monitor)
            if key in self._probes and self._probes[key] is None:
                build = functools.partial(
                    Probe.from_batch,
                    batch,
                    n=_count(monitor),
                    unpack=monitor.unpack,
                    annotated=self._is_annotated(key),
                )
                self._take(key, build)
        if self._awaits_start and self.trainer.training:
            self._start_if_ready(module)

    def before_optimizer_step(self, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Let monitors look at whole gradients, if they will be due after this step."""
        steps, epoch = self.trainer.global_step + 1, self.trainer.current_epoch
        last = reading.is_last_step(self.trainer, module)
        listening = [
            monitor
            for monitor in self.monitors
            if monitor.schedule.due_after_steps(self._steps, steps)
            or (last and monitor.schedule.due_after_epoch(epoch))
        ]
        if together := bool(listening) and self.together:
            # What failed on this rank alone is not settled yet: the others still count on it.
            listening = [monitor for monitor in listening if monitor not in self._resting]
            reshard(module.modules())
        else:
            listening = self._awake(listening)
        if not listening or not (self.ranks.writes or together):
            return
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters = {name: each for name, each in module.named_parameters() if id(each) in stepped}
        for monitor in listening:
            with self.catching(monitor), torch.no_grad():
                monitor.before_optimizer_step(parameters)
                self._capturing.append(monitor)

    def after_batch(self, module: LightningModule) -> None:
        """Look, where a number of optimiser steps is reached."""
        for monitor in self._capturing:
            with self.catching(monitor), torch.no_grad():
                monitor.after_optimizer_step()
        self._capturing.clear()
        previous, self._steps = self._steps, self.trainer.global_step
        due = [monitor for monitor in self.monitors if monitor.schedule.due_after_steps(previous, self._steps)]
        self._look(module, due, reading.logged_step(self.trainer))

    def after_epoch(self, module: LightningModule) -> None:
        """Look, where the epoch is due."""
        due = [each for each in self.monitors if each.schedule.due_after_epoch(self.trainer.current_epoch)]
        # In this hook Lightning's own counter is one ahead of the step at which it logs the epoch's metrics.
        self._look(module, due, max(reading.logged_step(self.trainer) - 1, 0))

    def before_evaluation(self, module: LightningModule) -> None:
        """At the start of ``trainer.validate`` and ``trainer.test``: refuse what cannot work, find the probes."""
        self.check(module)
        if not self._is_hindered():
            self._find_probes(module)

    def after_evaluation(self, module: LightningModule, stage: Literal["validate", "test"]) -> None:
        """Look once; what is seen on the test set is kept apart from what is seen in training."""
        self._under_way = True
        suffix = "-test" if stage == "test" else ""
        self._look(module, self.monitors, reading.logged_step(self.trainer), suffix=suffix)

    # ---- Scores.

    def begin_scores(self, module: LightningModule) -> None:
        """Before the first batch of a validation or a test."""
        if self._is_hindered():
            return
        self._scoring.begin()

    def before_scored_batch(self, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Before a step of a validation or a test."""
        self._scoring.before_batch(module, batch, batch_idx, dataloader_idx)

    def after_scored_batch(self, module: LightningModule) -> None:
        """After a step of a validation or a test."""
        self._scoring.after_batch(module)

    def end_scores(self, module: LightningModule, suffix: str = "") -> None:
        """After the last batch of a validation or a test: log what was found, on every rank."""
        self._scoring.end(module, suffix)

    def after_logging(self) -> None:
        """After Lightning has passed on what was logged in a validation."""
        self._scoring.forget()

    def is_resting(self, monitor: Monitor) -> bool:
        """Whether a monitor looks no more; the same on every rank."""
        return monitor in self._resting

    def has_failed(self, monitor: Monitor) -> bool:
        """Whether a monitor failed on this rank, which the others need not know yet."""
        return monitor in self._failed

    def failures(self, monitors: Sequence[Monitor]) -> dict[int, Exception]:
        """What is not settled yet, by the monitors' positions."""
        return {index: self._failed[each] for index, each in enumerate(monitors) if each in self._failed}

    def maps_of(
        self, module: LightningModule, monitor: ProbeMonitor, images: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A monitor's maps (N, H, W) for these images, and the classes (N,) that they explain, by passes of its own."""
        images = _readable(images, module).to(self.trainer.strategy.root_device)
        labels = None if labels is None else labels.to(images.device)
        parts = []
        with preserve_state(module, parameters=not monitor.is_trusted):
            if self.together:
                self.ranks.align(module.buffers(), self.trainer.strategy.root_device)
            for start in range(0, len(images), self._chunk):
                chunk = slice(start, start + self._chunk)
                site = self._site(monitor, module, images[chunk])
                layers = {} if site is None else {site: monitor.where(module)[1]}
                inputs, predict = monitor.wants_input_gradients, self._forward(monitor.predict)
                with Trace.record(
                    module, images[chunk], layers=layers, input_gradients=inputs, predict=predict, first_index=start
                ) as trace:
                    parts.append(monitor.maps(trace, site, None if labels is None else labels[chunk]))
        maps, classes = zip(*parts, strict=True)
        return torch.cat(maps), torch.cat(classes)

    # ---- Probes.

    def probe_of(self, monitor: ProbeMonitor) -> Probe | None:
        """What a monitor looks at; None where that is not known yet, or failed."""
        return self._probes.get(_probe_key(monitor))

    def _find_probes(self, module: LightningModule) -> None:
        """Find every monitor's probe; None stands for one that must come from a batch."""
        loader = reading.probe_loader(self.trainer)
        for monitor in filter(uses_probe, self.monitors):
            key, asked = _probe_key(monitor), monitor.probe
            if isinstance(asked, Probe):
                self._probes[key] = asked
            if self._probes.get(key) is not None or monitor in self._failed:
                continue
            dataset: Any = getattr(loader, "dataset", None) if isinstance(asked, int) else asked
            collated = getattr(loader, "batch_sampler", None) is not None or not isinstance(asked, int)
            self._probes[key] = None
            if reading.looks_indexable(dataset) and collated:
                build = functools.partial(
                    Probe.from_dataset,
                    dataset,
                    n=_count(monitor),
                    unpack=monitor.unpack,
                    collate_fn=getattr(loader, "collate_fn", None),
                    transfer=functools.partial(reading.transfer, self.trainer, module),
                    annotated=self._is_annotated(key),
                )
                with preserve_state(module), torch.no_grad():
                    self._take(key, build)
        self._scoring.check(module)

    def _is_annotated(self, key: object) -> bool:
        """Whether a monitor needs a probe's boxes and masks; to the others they may be anything."""
        return any(_probe_key(monitor) == key for monitor in self.monitors if scores_validation(monitor))

    def _take(self, key: object, build: Callable[[], Probe]) -> None:
        """Build a probe; where the data fail, rather than their reader, the monitors that asked for it rest."""
        try:
            self._probes[key] = self.agreed(build)
        except ConfigurationError:
            raise
        except Exception as error:
            del self._probes[key]
            for monitor in filter(uses_probe, self.monitors):
                if _probe_key(monitor) == key:
                    self._failed.setdefault(monitor, error)

    def agreed(self, build: Callable[[], Probe]) -> Probe:
        """The probe that the writing rank builds, on every rank; or its error, on every rank."""
        found: Probe | Exception | None = None
        if self.ranks.writes:
            try:
                with torch.inference_mode(False):
                    found = build()
            except Exception as error:
                found = error
        found = self.ranks.from_writer(found)
        if not isinstance(found, Probe):
            raise found or RuntimeError("the writing rank sent no probe")
        return found

    # ---- Looks.

    def _start_if_ready(self, module: LightningModule) -> None:
        if any(probe is None for probe in self._probes.values()):
            return
        self._awaits_start = False
        # A resumed run, and a second fit, have had their start.
        fresh = self._steps == 0
        starting = [monitor for monitor in self.monitors if monitor.schedule.at_start and fresh]
        self._look(module, starting, step=0)
        # The others rehearse on one image, so that what cannot work is said before the first batch is trained.
        self._look(module, [each for each in self.monitors if each not in starting], step=0, rehearsal=True)
        self._under_way = True

    def _look(
        self, module: LightningModule, due: Sequence[Monitor], step: int, *, suffix: str = "", rehearsal: bool = False
    ) -> None:
        due = [monitor for monitor in due if monitor not in self._resting]
        if not due:
            return
        self._say_lost_sinks()
        errors: dict[int, Exception] = {i: self._failed[each] for i, each in enumerate(due) if each in self._failed}
        together = self.together
        if together:
            self.agree(errors)
        seen: dict[int, Any] = {}
        groups: dict[object, dict[int, ProbeMonitor]] = {}
        for index, monitor in enumerate(due):
            if index in errors:
                continue
            if uses_probe(monitor):
                groups.setdefault((_probe_key(monitor), monitor.predict), {})[index] = monitor
            elif (self.ranks.writes or together) and not rehearsal:
                with _noting(errors, [index]), preserve_state(module), torch.no_grad():
                    seen[index] = monitor.observe(module, step)
        for group in groups.values():
            with _noting(errors, group):
                self._explain(module, group, rehearsal, errors, seen)
        if together and not self.ranks.writes:
            seen.clear()  # the writing rank has the same
        self.settle(due, errors)
        shares = self.ranks.to_writer({index: found for index, found in seen.items() if index not in errors})
        if shares is None or rehearsal:
            return
        found = [
            (monitor, [share[index] for share in shares if index in share])
            for index, monitor in enumerate(due)
            if index not in errors
        ]
        self.writer.submit(functools.partial(self._write, found, step, suffix))

    def _explain(
        self,
        module: LightningModule,
        group: dict[int, ProbeMonitor],
        rehearsal: bool,
        errors: dict[int, Exception],
        seen: dict[int, Any],
    ) -> None:
        """This rank's share of a probe, for all monitors that are due on it, a chunk at a time."""
        probe = self._probe(next(iter(group.values())))
        together = self.together
        share = slice(0, 1) if rehearsal else slice(0, len(probe)) if together else self.ranks.share(len(probe))
        part, first = probe.subset(share), share.start
        trusted = all(monitor.is_trusted for monitor in group.values())
        with preserve_state(module, parameters=not trusted):
            if together:
                # Each rank's batch norm has its own statistics; other predictions would ask for other passes.
                self.ranks.align(module.buffers(), self.trainer.strategy.root_device)
            start = 0
            while start < len(part):
                chunk = part.subset(slice(start, start + self._chunk))
                awake = {index: monitor for index, monitor in group.items() if index not in errors}
                failed: dict[int, Exception] = {}
                found: dict[int, Any] = {}
                with _noting(failed, awake):
                    self._explain_chunk(module, chunk, first + start, awake, failed, found)
                if together:
                    self.agree(failed)
                    if failed:
                        reset_fsdp_state(module.modules())
                if any(map(_is_out_of_memory, failed.values())):
                    for error in failed.values():
                        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
                    _release_memory()
                    if self.may_retry and len(chunk) > 1:
                        self._chunk = (len(chunk) + 1) // 2
                        failed.clear()
                        continue
                    self._chunk = self._full_chunk  # the others need not go by one that never fits
                errors.update(failed)
                for index, each in found.items():
                    seen.setdefault(index, []).extend(each)
                start += len(chunk)

    def _explain_chunk(
        self,
        module: LightningModule,
        chunk: Probe,
        first_index: int,
        group: dict[int, ProbeMonitor],
        errors: dict[int, Exception],
        seen: dict[int, Any],
    ) -> None:
        """One Trace, made for what all monitors of the group need together."""
        images = _readable(chunk.images, module).to(self.trainer.strategy.root_device)
        labels = None if chunk.targets is None else chunk.targets.to(images.device)
        sites: dict[int, HookPoint | None] = {}
        layers: dict[HookPoint, bool] = {}
        predict = None
        for index, monitor in group.items():
            predict = self._forward(monitor.predict)
            with _noting(errors, [index]):
                sites[index] = site = self._site(monitor, module, images)
                if site is not None:
                    layers[site] = layers.get(site, False) or monitor.where(module)[1]
        inputs = any(group[index].wants_input_gradients for index in sites)
        entered = False
        try:
            with Trace.record(
                module, images, layers=layers, input_gradients=inputs, predict=predict, first_index=first_index
            ) as trace:
                entered = True
                for index, site in sites.items():
                    with _noting(errors, [index]):
                        maps, explained = group[index].maps(trace, site, labels)
                        found = {"maps": maps, "explained": explained, "logits": trace.logits.detach().float()}
                        found |= group[index].alongside(len(maps))
                        seen.setdefault(index, []).append({name: HostCopy(each) for name, each in found.items()})
        except Exception as error:
            if entered or len(sites) == 1 or not self.may_retry or (_is_out_of_memory(error) and len(images) > 1):
                errors.update(dict.fromkeys(sites, error))
            else:
                # What one monitor asks for can break the pass for all, so each tries alone.
                for index in sites:
                    self._explain_chunk(module, chunk, first_index, {index: group[index]}, errors, seen)

    def _forward(self, predict: Predict | None) -> Predict:
        """The same callable for the whole run: what is known of a model is remembered by how it is run."""
        if predict not in self._forwards:
            self._forwards[predict] = functools.partial(reading.forward, self.trainer.precision_plugin, predict)
        return self._forwards[predict]

    def _site(self, monitor: ProbeMonitor, module: LightningModule, images: Tensor) -> HookPoint | None:
        """A monitor's layer. Searching costs a forward pass; the answer holds while the model keeps its structure."""
        if not monitor.wants_layer:
            return None
        layer, _ = monitor.where(module)
        key = (layer, monitor.predict, images.shape[1:], structure_key(module))
        if key not in self._sites:
            self._sites[key] = locate(module, layer, images, predict=self._forward(monitor.predict))
        return self._sites[key]

    def _probe(self, monitor: ProbeMonitor) -> Probe:
        probe = self._probes[_probe_key(monitor)]
        assert probe is not None, "a look before the probe was found"
        return probe

    def _write(self, found: list[tuple[Monitor, list[Any]]], step: int, suffix: str) -> None:
        """Draw and write, on the writer's thread."""
        for monitor, shares in found:
            with self.catching(monitor):
                for record in self._records(monitor, shares, step):
                    self._tell(monitor, functools.partial(write, record=retagged(record, suffix), step=step))
                self._tell(monitor, flush)

    def _tell(self, monitor: Monitor, act: Callable[[Sink], None]) -> None:
        """Reach every sink. One that keeps nothing is given up; the fault of a record is its monitor's."""
        lost, refused = reach(self.sinks, act)
        self._lost_sinks += lost
        for _, error in lost:
            if monitor.on_error == "raise":
                self._failed.setdefault(monitor, error)
            if not self.sinks:
                for each in self.monitors:  # there is nothing left to look for
                    self._failed.setdefault(each, error)
        if refused is not None:
            raise refused

    def _records(self, monitor: Monitor, shares: list[Any], step: int) -> Iterable[Record]:
        if not uses_probe(monitor):
            return monitor.report(shares[0], step)
        parts = list(itertools.chain.from_iterable(shares))
        return monitor.draw(
            {name: torch.cat([part[name].wait() for part in parts]) for name in parts[0]}, self._probe(monitor)
        )

    # ---- Failures.

    def _say_lost_sinks(self) -> None:
        """Say once that a place takes no more records."""
        lost, self._lost_sinks = self._lost_sinks, []
        for sink, error in lost:
            self._said.append(error)
            rest = "the other loggers get everything" if self.sinks else "every monitor rests"
            warnings.warn(
                f"lightning_interp writes no more through {type(sink).__name__}, which failed; {rest} from here on, "
                f"and training goes on.\n{told(error)}",
                stacklevel=2,
            )

    def _awake(self, monitors: Iterable[Monitor]) -> list[Monitor]:
        return [monitor for monitor in monitors if monitor not in self._resting and monitor not in self._failed]

    @contextmanager
    def catching(self, monitor: Monitor) -> Iterator[None]:
        """Note a failure outside a look, on this rank or thread alone; it is settled when the monitor is next due."""
        try:
            yield
        except Exception as error:
            self._failed.setdefault(monitor, error)

    def settle(self, due: Sequence[Monitor], errors: dict[int, Exception]) -> None:
        """Agree on who failed; afterwards ``errors`` names the same monitors on every rank."""
        self.agree(errors)
        for index in sorted(errors):
            self._failed.pop(due[index], None)
            self._rest(due[index], errors[index])

    def agree(self, errors: dict[int, Exception]) -> None:
        """Add to these errors those of the other ranks."""
        reports = {index: (isinstance(error, ConfigurationError), told(error)) for index, error in errors.items()}
        for rank, report in enumerate(self.ranks.everyone(reports)):
            for index, (misuse, text) in report.items():
                kind = ConfigurationError if misuse else RuntimeError
                errors.setdefault(index, kind(f"on rank {rank}: {text}"))

    def _is_hindered(self) -> bool:
        """Whether nothing can be seen of this module; said once, and without a word between the ranks."""
        reason = obstacle(self.trainer)
        if reason is None:
            return False
        if any(monitor.on_error == "raise" for monitor in self.monitors):
            raise ConfigurationError(reason)
        if self.ranks.writes and not self._resting:
            warnings.warn(f"lightning_interp sees nothing of this run: {reason}", stacklevel=2)
        self._resting.update(self.monitors)
        return True

    def _rest(self, monitor: Monitor, error: Exception) -> None:
        """Say once what happened, and look no more through this monitor; raise what must end the run."""
        if monitor in self._resting:
            return  # what was still waiting to be written failed, too
        misuse = isinstance(error, ConfigurationError) and not self._under_way
        # Where an error ends the run already, that one is heard, and the loggers still close.
        if (monitor.on_error == "raise" or misuse) and not self.trainer.interrupted:
            raise error
        self._resting.add(monitor)
        if self.ranks.writes and error not in self._said:
            warnings.warn(
                f"{monitor!r} failed and rests from here on; training goes on. Pass on_error='raise' to stop here.\n"
                f"{told(error)}",
                stacklevel=2,
            )


def uses_probe(monitor: Monitor) -> TypeGuard[ProbeMonitor]:
    """Whether a monitor looks at images."""
    return monitor.uses_probe


def scores_validation(monitor: Monitor) -> TypeGuard[LocalizationMonitor]:
    """Whether a monitor scores the validation and the test set."""
    return monitor.scores_validation


def _probe_key(monitor: ProbeMonitor) -> object:
    """What makes two monitors look at the same probe."""
    asked = monitor.probe
    return (asked if isinstance(asked, int) else id(asked), monitor.unpack)


def _count(monitor: ProbeMonitor) -> int:
    return monitor.probe if isinstance(monitor.probe, int) else _DEFAULT_COUNT


@contextmanager
def _noting(errors: dict[int, Exception], indices: Iterable[int]) -> Iterator[None]:
    """Note an error for the monitors with these numbers, and go on with the others."""
    try:
        yield
    except Exception as error:
        for index in indices:
            errors.setdefault(index, error)


def _is_out_of_memory(error: Exception) -> bool:
    # CUDA's and its libraries' words, and those of torch's allocator for the CPU.
    words = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(each in str(error).lower() for each in words)
    )


def _readable(images: Tensor, module: torch.nn.Module) -> Tensor:
    """As float32 where they have a type that no parameter has: training steps convert such images themselves."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return images if not dtypes or images.dtype in dtypes else images.to(torch.float32)


def _release_memory() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
