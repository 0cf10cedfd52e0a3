"""What all monitors are: every Trainer hook stands here once."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_interp.callbacks._lightning import Callback, LightningModule, Trainer
from lightning_interp.callbacks.run.session import Session
from lightning_interp.callbacks.schedule import Schedule
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import Explainer
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.locate import find_layer
from lightning_interp.model.targets import Targets
from lightning_interp.model.trace import Trace
from lightning_interp.sinks.records import Record

__all__ = ["Monitor", "MonitorOptions", "ProbeMonitor", "ProbeMonitorOptions", "check_share"]

Method = str | Explainer | Callable[..., Tensor]


class MonitorOptions(TypedDict, total=False):
    """What every monitor takes; see :class:`Monitor`."""

    every_n_epochs: int
    at_epochs: Sequence[int] | None
    every_n_train_steps: int | None
    at_start: bool
    name: str | None
    on_error: Literal["warn", "raise"]


class ProbeMonitorOptions(MonitorOptions, total=False):
    """What every monitor that looks at images takes; see :class:`ProbeMonitor`."""

    probe: int | Probe | Dataset[Any]
    predict: Callable[..., Any] | None
    unpack: Callable[..., Any] | None


class Monitor(Callback):
    """Looks at a model at chosen moments of its training and writes down what it sees.

    A subclass says what is seen (:meth:`observe`) and how it is told (:meth:`report`).

    Args:
        every_n_epochs: Look at the end of every so many epochs.
        at_epochs: Look at the end of these 0-based epochs, instead.
        every_n_train_steps: Look after every so many optimiser steps, instead of both.
        at_start: Look at the model before training, too; its records carry step 0.
        name: Put behind the kind in every tag (``cam-name/gradcam``), so that two monitors of a class differ.
        on_error: ``"warn"``: a look that fails warns once, with the traceback, and the monitor rests from then on,
            while training and the other monitors go on. ``"raise"``: the failure ends the training.

    Raises:
        ConfigurationError: If an option is out of range.
    """

    kind: ClassVar[str]
    uses_probe: ClassVar[bool] = False
    scores_validation: ClassVar[bool] = False

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        at_epochs: Sequence[int] | None = None,
        every_n_train_steps: int | None = None,
        at_start: bool = True,
        name: str | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        self.schedule = Schedule.create(every_n_epochs, at_epochs, every_n_train_steps, at_start)
        if name is not None and not re.fullmatch(r"[\w.\-]+", str(name)):
            raise ConfigurationError(f"name takes letters, digits, '.', '_' and '-', got {name!r}")
        if on_error not in ("warn", "raise"):
            raise ConfigurationError(f"on_error takes 'warn' or 'raise', got {on_error!r}")
        self.name = name
        self.on_error = on_error

    @property
    def state_key(self) -> str:
        """Tells monitors of one class apart in a checkpoint."""
        return self._generate_state_key(name=self.name, schedule=repr(self.schedule))

    def __repr__(self) -> str:
        return type(self).__name__ + (f"({self.name!r})" if self.name else "")

    @abstractmethod
    def observe(self, module: nn.Module, step: int) -> Any:
        """Look at the weights; called on the rank that writes, with gradients off.

        What it returns must not change when training goes on: it is drawn later, on another thread.
        """

    @abstractmethod
    def report(self, seen: Any, step: int) -> Iterable[Record]:
        """What :meth:`observe` returned, as records; called on the rank that writes, on the writer's thread."""

    def check(self, module: LightningModule) -> None:
        """Raise a :class:`ConfigurationError` where this monitor cannot work on the module."""

    def tags(self, module: LightningModule) -> list[str]:
        """What this monitor writes and no other may write, too: all of its kind, where a subclass knows no better."""
        return [self.tag("*")]

    def before_optimizer_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Look at whole, unscaled gradients in a step after which this monitor is due."""

    def after_optimizer_step(self) -> None:
        """Look at the change that the step made."""

    def tag(self, what: str) -> str:
        """``kind/what``, with this monitor's name behind the kind."""
        return f"{self.kind}-{self.name}/{what}" if self.name else f"{self.kind}/{what}"

    # ---- Trainer hooks. The first monitor of a Trainer acts for all of them.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run."""
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]  # type: ignore[attr-defined]
        if stage in ("fit", "validate", "test") and monitors[0] is self:
            Session.begin(trainer, monitors)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work before anything else is done."""
        if session := Session.led_by(self, trainer):
            session.check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the untrained model."""
        if session := Session.led_by(self, trainer):
            session.start(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the probe from the first batch where nothing else gives one."""
        if session := Session.led_by(self, trainer):
            session.pass_by(pl_module, batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at gradients where they are whole: accumulated and unscaled, not yet clipped."""
        if session := Session.led_by(self, trainer):
            session.before_optimizer_step(pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if a number of optimiser steps is reached."""
        if session := Session.led_by(self, trainer):
            session.after_batch(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, if the epoch is due."""
        if session := Session.led_by(self, trainer):
            session.after_epoch(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before ``trainer.validate`` does anything."""
        if trainer.state.fn == "validate" and (session := Session.led_by(self, trainer)):
            session.before_evaluation(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before ``trainer.test`` does anything."""
        if session := Session.led_by(self, trainer):
            session.before_evaluation(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the scores."""
        if not trainer.sanity_checking and (session := Session.led_by(self, trainer)):
            session.begin_scores(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the scores."""
        if session := Session.led_by(self, trainer):
            session.begin_scores(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the probe from the first batch where nothing else gives one, and listen to those that are scored."""
        if session := Session.led_by(self, trainer):
            session.pass_by(pl_module, batch)
            session.before_scored_batch(pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the probe from the first batch where nothing else gives one, and listen to those that are scored."""
        if session := Session.led_by(self, trainer):
            session.pass_by(pl_module, batch)
            session.before_scored_batch(pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score what was heard."""
        if session := Session.led_by(self, trainer):
            session.after_scored_batch(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score what was heard."""
        if session := Session.led_by(self, trainer):
            session.after_scored_batch(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores."""
        if not trainer.sanity_checking and (session := Session.led_by(self, trainer)):
            session.end_scores(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores, apart from those of training."""
        if session := Session.led_by(self, trainer):
            session.end_scores(pl_module, "-test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once after ``trainer.validate``."""
        if session := Session.led_by(self, trainer):
            session.after_logging()
            if trainer.state.fn == "validate":
                session.after_evaluation(pl_module, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once after ``trainer.test``."""
        if session := Session.led_by(self, trainer):
            session.after_evaluation(pl_module, "test")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring everything that was seen to the logger."""
        if session := Session.led_by(self, trainer):
            session.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End a run."""
        if session := Session.led_by(self, trainer):
            session.end()


class ProbeMonitor(Monitor):
    """Draws the maps of a method for the images of a probe.

    Args:
        method: An explainer's name, an explainer, or a callable ``(model, images, targets) -> maps`` (N, H, W).
        layer: Where the method needs one: a dotted name, a module, or None for the last spatial layer.
        target: Which class is explained: ``"predicted"``, ``"label"``, or a class number.
        method_options: What the method itself takes, as ``{"n_samples": 20}``.
        probe: How many images to take from the validation set (the training set where there is none), a
            :class:`~lightning_interp.Probe`, or a data set to take 8 images from. Monitors with the same probe
            share it and each look at it.
        predict: How to run the module, ``predict(module, images)``; None calls it.
        unpack: How to read a batch, ``unpack(batch) -> (images, targets)``; None reads the usual forms.
        **options: See :class:`Monitor`.

    Raises:
        ConfigurationError: If an option is out of range; a method that does not exist names those that do.
    """

    uses_probe = True
    methods: ClassVar[Mapping[str, Explainer]]

    def __init__(
        self,
        *,
        method: Method,
        layer: str | nn.Module | None,
        target: str | int,
        method_options: Mapping[str, Any] | None,
        probe: int | Probe | Dataset[Any] = 8,
        predict: Callable[..., Any] | None = None,
        unpack: Callable[..., Any] | None = None,
        every_n_epochs: int = 1,
        at_epochs: Sequence[int] | None = None,
        every_n_train_steps: int | None = None,
        at_start: bool = True,
        name: str | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__(
            every_n_epochs=every_n_epochs,
            at_epochs=at_epochs,
            every_n_train_steps=every_n_train_steps,
            at_start=at_start,
            name=name,
            on_error=on_error,
        )
        self.method = self._resolved(method)
        self.method_options = dict(method_options or {})
        if isinstance(self.method, Explainer):
            self.method.check(layer, self.method_options)
        elif layer is not None:
            raise ConfigurationError(
                f"{type(self).__name__}: a callable finds its layer itself; bind {layer!r} to it, or name a method"
            )
        if layer is not None and not isinstance(layer, (str, nn.Module)):
            raise ConfigurationError(f"a layer is a module or its dotted name, got {layer!r}")
        is_class = isinstance(target, int) and not isinstance(target, bool) and target >= 0
        if not is_class and target not in ("predicted", "label"):
            raise ConfigurationError(f"target takes 'predicted', 'label' or a class number, got {target!r}")
        if isinstance(probe, bool) or (isinstance(probe, int) and probe < 1):
            raise ConfigurationError(f"probe takes a positive number of images, a Probe or a data set, got {probe!r}")
        if not isinstance(probe, (int, Probe)) and not (hasattr(probe, "__getitem__") and hasattr(probe, "__len__")):
            raise ConfigurationError(
                f"probe takes a positive number of images, a Probe or a data set, got a {type(probe).__name__}"
            )
        self.layer = layer
        self.target = target
        self.probe = probe
        self.predict = predict
        self.unpack = unpack

    @property
    def method_name(self) -> str:
        """The method as it stands in tags and captions."""
        method = self.method
        found = method.name if isinstance(method, Explainer) else getattr(method, "__name__", type(method).__name__)
        return re.sub(r"[^\w.\-]", "", found) or "custom"

    @property
    def is_trusted(self) -> bool:
        """Whether the method is ours, and known to leave the parameters alone."""
        return isinstance(self.method, Explainer)

    @property
    def wants_layer(self) -> bool:
        """Whether the method needs a layer."""
        return isinstance(self.method, Explainer) and self.method.layer is not None

    def where(self, module: nn.Module) -> tuple[str | nn.Module | None, bool]:
        """The layer that the method looks at, and whether it needs the gradient towards it."""
        return self.layer, isinstance(self.method, Explainer) and self.method.layer == "gradients"

    @property
    def wants_input_gradients(self) -> bool:
        """Whether the method needs the gradient towards the images, of a plain pass."""
        return isinstance(self.method, Explainer) and self.method.inputs and self.method.context is None

    def check(self, module: LightningModule) -> None:
        """Raise where the layer does not exist."""
        if self.layer is not None:
            find_layer(module, self.layer)

    def tags(self, module: LightningModule) -> list[str]:
        """One picture."""
        return [self.tag(self.method_name)]

    def targets(self, labels: Tensor | None) -> Targets:
        """What is explained of images with these labels."""
        if self.target == "label" and labels is None:
            raise ConfigurationError(
                f"{self!r} explains each image's label, but the probe has none; use target='predicted', or give the "
                "probe its targets"
            )
        return labels if self.target == "label" else None if self.target == "predicted" else int(self.target)

    def maps(self, trace: Trace, site: HookPoint | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """This method's maps (N, H, W) for a part of the probe, and the classes (N,) that they explain."""
        aimed = trace.with_targets(self.targets(labels))
        targets = aimed.targets
        if isinstance(self.method, Explainer):
            maps = self.method.attribute(aimed, site, **self.method_options)
        else:
            maps = self.method(trace.model, trace.images, targets, **self.method_options)
        size = (len(trace.images), *trace.images.shape[-2:])
        if not isinstance(maps, Tensor) or tuple(maps.shape) != size:
            came = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ConfigurationError(f"{self.method_name} gave {came}, expected maps {size}, one for each image")
        return maps.detach().float(), targets  # type: ignore[return-value]

    def alongside(self, count: int) -> dict[str, Tensor]:
        """What else :meth:`draw` is to know of this look, at so many images: tensors with a row for each."""
        return {}

    def observe(self, module: nn.Module, step: int) -> None:
        """Nothing: these look at the probe, through :meth:`maps`."""

    def report(self, seen: Any, step: int) -> Iterable[Record]:
        """Nothing: what these see is drawn beside the probe, by :meth:`draw`."""
        return ()

    @abstractmethod
    def draw(self, seen: Mapping[str, Tensor], probe: Probe) -> Iterable[Record]:
        """The probe's maps as records; called on the rank that writes, on the writer's thread.

        ``seen`` holds, on the CPU, ``maps`` (N, H, W) float32, ``explained`` (N,) int64 classes and ``logits`` (N, K).
        """

    @classmethod
    def _resolved(cls, method: Method) -> Explainer | Callable[..., Tensor]:
        if isinstance(method, str):
            if method not in cls.methods:
                raise ConfigurationError(
                    f"{cls.__name__} knows no method {method!r}; it takes {', '.join(map(repr, cls.methods))}, "
                    "an explainer of lightning_interp.explain, or a callable (model, images, targets) -> maps"
                )
            return cls.methods[method]
        if not callable(method):
            raise ConfigurationError(f"method takes a name or a callable, got {method!r}")
        return method


def check_share(name: str, value: object) -> None:
    """Refuse what is no number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigurationError(f"{name} takes a number from 0 to 1, got {value!r}")
