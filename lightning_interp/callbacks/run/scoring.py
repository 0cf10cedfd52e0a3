"""Scores on the validation data: maps heard or made batch by batch, measured, summed over the ranks and logged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.run import trainer as reading
from lightning_interp.callbacks.run.output import with_suffix
from lightning_interp.data.annotations import Annotations, dataset_annotations, unpack_annotated
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from lightning_interp.model.hooks import tap
from lightning_interp.model.locate import unwrap_compiled
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.sharding import reset_fsdp_state

if TYPE_CHECKING:
    from lightning_interp.callbacks.monitors.localization import LocalizationMonitor
    from lightning_interp.callbacks.run.session import Session

__all__ = ["Order", "Scoring"]


class Order:
    """Which items of its data set a loader's batches hold, where that is known.

    Args:
        loader: A loader that goes through its data set in order, or as torch's DistributedSampler does.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> Order(DataLoader([5, 6, 7, 8, 9], batch_size=2)).items(2, 1)
        ([4], [True])
    """

    def __init__(self, loader: Any) -> None:
        dataset: Any = getattr(loader, "dataset", None)
        self.dataset = dataset
        batches = getattr(loader, "batch_sampler", None)
        sampler: Any = getattr(batches, "sampler", None)
        self._size = getattr(batches, "batch_size", 0)
        self._indices: list[int] | None = None
        self._new: list[bool] = []
        if type(batches) is not BatchSampler or not reading.looks_indexable(dataset):
            return
        count = len(dataset)
        if type(sampler) is SequentialSampler:
            self._indices = list(range(len(sampler)))
            self._new = [True] * len(sampler)
        elif type(sampler) is DistributedSampler:
            self._indices = list(sampler)
            # What stands behind the last item fills the shards up with items that other ranks have already.
            places = range(sampler.rank, sampler.total_size, sampler.num_replicas)
            self._new = [place < count for place in places]

    def items(self, batch_idx: int, count: int) -> tuple[list[int], list[bool]] | None:
        """The items of a batch of so many, and which of them no other rank has; None where that is not known."""
        if self._indices is None:
            return None
        part = slice(batch_idx * self._size, (batch_idx + 1) * self._size)
        return (self._indices[part], self._new[part]) if len(self._indices[part]) == count else None


class Scoring:
    """All that the monitors of a session score while a validation or a test runs: the same moments on every rank."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scorers: dict[LocalizationMonitor, _Scorer] = {}
        self._scored_at: dict[LocalizationMonitor, int] = {}
        self._start = 0
        self._logged: list[str] = []

    @property
    def _monitors(self) -> list[LocalizationMonitor]:
        return [each for each in self._session.monitors if each.scores_validation]  # type: ignore[misc]

    def check(self, module: LightningModule) -> None:
        """Refuse what has no boxes or masks to be scored against, or wrong ones, before anything is trained."""
        self._start = self._session.trainer.global_step
        for monitor in self._monitors:
            if not self._session.has_failed(monitor) and not self._is_annotated(monitor, module):
                raise _nothing_found(monitor)

    def begin(self) -> None:
        """Before the first batch."""
        self.stop()
        self._scorers = {}
        loader = reading.scored_loader(self._session.trainer)
        for monitor in self._monitors:
            if not self._session.is_resting(monitor) and self._is_due(monitor):
                self._scorers[monitor] = _Scorer(monitor, self._session, loader)
                self._scored_at[monitor] = self._session.trainer.global_step

    def before_batch(self, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Before a step; of several loaders the first is scored."""
        for monitor, scorer in self._scorers.items() if dataloader_idx == 0 else ():
            self._run(monitor, module, functools.partial(scorer.before, module, batch, batch_idx))

    def after_batch(self, module: LightningModule) -> None:
        """After a step."""
        self.stop()
        for monitor, scorer in self._scorers.items():
            self._run(monitor, module, functools.partial(scorer.after, module))

    def end(self, module: LightningModule, suffix: str) -> None:
        """After the last batch: every rank logs the same numbers under the same names."""
        self.stop()
        scorers, self._scorers = self._scorers, {}
        found = self._agreed(
            module, {each: scorer for each, scorer in scorers.items() if not self._session.is_resting(each)}
        )
        trainer = self._session.trainer
        for monitor in self._monitors:
            now, before = found.get(monitor, {}), {} if suffix else dict(monitor.scores)
            monitor.remember(now, lasting=trainer.state.fn == "fit")
            if not trainer.barebones:
                unknown = before if before or now else monitor.names(self._session.probe_of(monitor))
                self._logged += _log(module, monitor, dict.fromkeys(unknown, torch.nan) | (now or before), suffix)

    def forget(self) -> None:
        """After Lightning has passed on what was logged."""
        reading.forget_logged(self._session.trainer, self._logged)
        self._logged.clear()

    def stop(self) -> None:
        """Listen no more."""
        for scorer in self._scorers.values():
            scorer.stop()

    def _is_due(self, monitor: LocalizationMonitor) -> bool:
        """Whether this validation is scored: the first one always, so that the names are there from then on."""
        trainer = self._session.trainer
        before, now = self._scored_at.get(monitor, self._start), trainer.global_step
        return (
            trainer.state.fn != "fit"
            or not monitor.scores
            or monitor.schedule.due_after_epoch(trainer.current_epoch)
            or monitor.schedule.due_after_steps(before, now)
        )

    def _run(self, monitor: LocalizationMonitor, module: LightningModule, act: Callable[[], None]) -> None:
        """Act; what fails is settled at the end, or at once where no rank can go on without the others."""
        session = self._session
        if session.has_failed(monitor) or session.is_resting(monitor):
            return
        with session.catching(monitor):
            act()
        if session.together:
            errors = session.failures([monitor])
            session.settle([monitor], errors)
            if errors:
                reset_fsdp_state(module.modules())

    def _agreed(
        self, module: LightningModule, scorers: Mapping[LocalizationMonitor, _Scorer]
    ) -> dict[LocalizationMonitor, dict[str, float]]:
        """What those monitors found that failed on no rank; all ranks take the same steps together."""
        if not scorers:
            return {}
        session, due = self._session, list(scorers)
        errors = session.failures(due)
        session.agree(errors)
        found = _computed(scorers, errors)
        left = [index for index, monitor in enumerate(due) if index not in errors and not found[monitor]]
        if left:  # nothing was said of the objects in the batches, so the probe's are scored
            for index in left:
                try:
                    scorers[due[index]].score_probe(module)
                except Exception as error:
                    errors[index] = error
            session.agree(errors)
            left = [index for index in left if index not in errors]
            later: dict[int, Exception] = {}
            found |= _computed({due[index]: scorers[due[index]] for index in left}, later)
            errors |= {left[place]: error for place, error in later.items()}
            errors |= {i: _nothing_found(due[i]) for i in left if i not in errors and not found[due[i]]}
        session.settle(due, errors)
        return {monitor: found[monitor] for index, monitor in enumerate(due) if index not in errors}

    def _is_annotated(self, monitor: LocalizationMonitor, module: LightningModule) -> bool:
        """Whether there is anything to score against; what only passing by can tell is believed in."""
        probe, loader = self._session.probe_of(monitor), reading.scored_loader(self._session.trainer)
        dataset: Any = getattr(loader, "dataset", None)
        if probe is None:
            return True
        if probe.boxes is not None or probe.masks is not None:
            monitor.begin_scores(torch.device("cpu")).try_out(probe)
            return True
        if loader is None or isinstance(monitor.probe, int):
            return False
        if not reading.looks_indexable(dataset) or getattr(loader, "batch_sampler", None) is None:
            return True
        build = functools.partial(
            Probe.from_dataset,
            dataset,
            [0],
            unpack=monitor.unpack,
            collate_fn=getattr(loader, "collate_fn", None),
            transfer=functools.partial(reading.transfer, self._session.trainer, module),
            annotated=True,
        )
        with preserve_state(module), torch.no_grad():
            sample = self._session.agreed(build)
        return sample.boxes is not None or sample.masks is not None


class _Scorer:
    """One monitor's scores over one pass through the data."""

    def __init__(self, monitor: LocalizationMonitor, session: Session, loader: Any) -> None:
        self._monitor = monitor
        self._session = session
        self._loader = loader
        self._order: Order | None = None
        with torch.inference_mode(False):  # trainer.validate runs in it, and none of its tensors can be added to
            self._scores = monitor.begin_scores(session.trainer.strategy.root_device)
        self._ears = ExitStack()
        self._heard: Tensor | None = None
        self._waiting: tuple[Tensor, Tensor | None, Annotations, list[bool]] | None = None

    def before(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to the step that comes, or look at its images beforehand: a step may change them in place."""
        images, labels, said = unpack_annotated(batch, self._monitor.unpack)
        self._order = self._order or Order(self._loader)
        items = self._order.items(batch_idx, len(images))
        if said is None and items is not None:
            said = dataset_annotations(self._order.dataset, items[0], images.shape)
        if said is None:
            return
        self._waiting = (images, labels, said, [True] * len(images) if items is None else items[1])
        gap = self._monitor.gap(module)
        if gap is None or self._session.together or _is_compiled(module):
            self._look(module)
        else:
            self._ears.enter_context(tap({"features": gap.features}, self._listen))

    def stop(self) -> None:
        """Listen no more."""
        self._ears.close()

    def after(self, module: LightningModule) -> None:
        """Score what was heard; where the step did not run the classifier, look."""
        heard, self._heard = self._heard, None
        if self._waiting is None:
            return
        gap = self._monitor.gap(module)
        if heard is None or gap is None:
            self._look(module)
            return
        images, labels, said, new = self._waiting
        self._waiting = None
        labels = None if labels is None else labels.to(heard.device)
        with torch.inference_mode(False), torch.no_grad():
            maps, classes = self._monitor.heard_maps(gap, heard, labels, (images.shape[2], images.shape[3]))
            self._scores.update(maps, said, new, self._monitor.counted_classes(classes, labels))

    def score_probe(self, module: LightningModule) -> None:
        """Score this rank's share of the probe."""
        probe = self._session.probe_of(self._monitor)
        if probe is None or (probe.boxes is None and probe.masks is None):
            return
        ranks = self._session.ranks
        share = slice(0, len(probe)) if self._session.together else ranks.share(len(probe))
        part = probe.subset(share)
        if len(part) == 0:
            return
        counts = not self._session.together or ranks.writes
        said = Annotations(part.boxes, part.masks)
        self._waiting = (part.images, part.targets, said, [counts] * len(part))
        self._look(module)

    def found(self) -> dict[str, float]:
        """The scores over all ranks, each of which must ask; none where nothing was scored."""
        with torch.inference_mode(False), torch.no_grad():
            return self._scores.found()

    def _listen(self, name: str, module: nn.Module, output: Any) -> None:
        """Copy what the first pass over the batch gives: what follows may change it in place."""
        waiting = self._waiting
        if (
            self._heard is None
            and waiting is not None
            and isinstance(output, Tensor)
            and len(output) == len(waiting[0])
        ):
            self._heard = output.detach().clone()

    def _look(self, module: LightningModule) -> None:
        assert self._waiting is not None
        images, labels, said, new = self._waiting
        self._waiting = None
        maps, classes = self._session.maps_of(module, self._monitor, images, labels)
        with torch.inference_mode(False), torch.no_grad():
            labels = None if labels is None else labels.to(classes.device)
            self._scores.update(maps, said, new, self._monitor.counted_classes(classes, labels))


def _computed(
    scorers: Mapping[LocalizationMonitor, _Scorer], errors: dict[int, Exception]
) -> dict[LocalizationMonitor, dict[str, float]]:
    """The scores of those without an error; a new error is noted."""
    found: dict[LocalizationMonitor, dict[str, float]] = {}
    for index, (monitor, scorer) in enumerate(scorers.items()):
        if index not in errors:
            try:
                found[monitor] = scorer.found()
            except Exception as error:
                errors[index] = error
    return found


def _log(module: LightningModule, monitor: LocalizationMonitor, values: Mapping[str, float], suffix: str) -> list[str]:
    """Log numbers, and give back their names."""
    named = {with_suffix(monitor.tag(what), suffix): value for what, value in values.items()}
    for name, value in named.items():
        number = torch.tensor(value, dtype=torch.float32)
        # Every rank has the same number, of which the maximum is exact where a mean need not be.
        module.log(name, number, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max", batch_size=1)
    return list(named)


def _is_compiled(module: nn.Module) -> bool:
    """Whether code was compiled here, which would not hear a new hook, or be compiled again because of it."""
    return getattr(module, "_compiler_ctx", None) is not None or any(
        unwrap_compiled(each) is not each or getattr(each, "_compiled_call_impl", None) is not None
        for each in module.modules()
    )


def _nothing_found(monitor: LocalizationMonitor) -> ConfigurationError:
    return ConfigurationError(
        f"{monitor!r} found no boxes or masks to score maps against. Give them in one of these ways: "
        'unpack=lambda batch: {"images": ..., "targets": ..., "boxes": ...} (or "masks"); batches that are such '
        "mappings; attributes boxes or masks of the validation set, with an entry for each item; or "
        "probe=Probe(images, targets, boxes=...). Boxes are (x1, y1, x2, y2) in pixels of the images as the model gets "
        "them"
    )
