"""What a monitor is, and what each kind of monitor does. Nothing here knows how monitors are run."""

from __future__ import annotations

import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric, MetricCollection
from typing_extensions import Unpack

from lightning_interp.callbacks._lightning import Callback, LightningModule, Trainer
from lightning_interp.callbacks.inputs import MeasureData, Needs, StreamBatch
from lightning_interp.callbacks.schedule import Schedule
from lightning_interp.checks import is_integer
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError
from lightning_interp.model.trace import LayerSpec, Trace
from lightning_interp.sinks.records import Record

__all__ = [
    "DataMonitor",
    "DataMonitorOptions",
    "MeasureMonitor",
    "Monitor",
    "MonitorOptions",
    "ProbeMonitor",
    "ProbeMonitorOptions",
    "ScalarMonitor",
    "StepMonitor",
    "StreamMonitor",
    "WeightMonitor",
]


class MonitorOptions(TypedDict, total=False):
    """The options of every monitor; see :class:`Monitor`."""

    every_n_epochs: int
    at_epochs: Sequence[int] | None
    every_n_train_steps: int | None
    at_start: bool
    name: str | None
    on_error: Literal["warn", "raise"]


class DataMonitorOptions(MonitorOptions, total=False):
    """The options of every monitor that reads images; see :class:`DataMonitor`."""

    predict: Callable[..., Any] | None
    unpack: Callable[..., Any] | None


class ProbeMonitorOptions(DataMonitorOptions, total=False):
    """The options of every monitor with a probe; see :class:`ProbeMonitor`."""

    probe: int | Probe | Dataset[Any]


class Monitor(Callback):
    """A callback that records something of a model at chosen moments of its training. A base class.

    Args:
        every_n_epochs: Record at the end of every so many epochs.
        at_epochs: Record at the end of these 0-based epochs, instead.
        every_n_train_steps: Record after every so many optimiser steps, instead of both.
        at_start: Record the model before training, too, as step 0.
        name: Put behind the kind in every tag (``cam-name/gradcam``), so that two monitors of a class differ.
        on_error: ``"warn"``: a monitor that fails warns once, with the traceback, and is disabled from then on, while
            training and the other monitors go on. ``"raise"``: the failure ends the training.

    Raises:
        ConfigurationError: If an option is out of range.
    """

    kind: ClassVar[str]
    # Registers the monitors of a Trainer to be run; wired in the package's ``__init__``.
    attach: ClassVar[Callable[[Trainer, str], None]]

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
        super().__init__()
        self.schedule = Schedule.create(every_n_epochs, at_epochs, every_n_train_steps, at_start)
        if name is not None and not re.fullmatch(r"[\w.\-]+", str(name)):
            raise ConfigurationError(f"name takes letters, digits, '.', '_' and '-', got {name!r}")
        if on_error not in ("warn", "raise"):
            raise ConfigurationError(f"on_error takes 'warn' or 'raise', got {on_error!r}")
        self.name = name
        self.on_error = on_error

    @property
    def state_key(self) -> str:
        """The key of the monitor's state in a checkpoint; it differs between monitors of one class."""
        check_definition(self)
        return self._generate_state_key(name=self.name, schedule=repr(self.schedule))

    def __repr__(self) -> str:
        name = getattr(self, "name", None)
        return type(self).__name__ + (f"({name!r})" if name else "")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register the monitors of the Trainer; the first one's call is for all of them."""
        check_definition(self)
        Monitor.attach(trainer, stage)

    def tag(self, what: str) -> str:
        """Return ``kind/what``, with this monitor's name behind the kind."""
        return f"{self.kind}-{self.name}/{what}" if self.name else f"{self.kind}/{what}"

    def tags(self, module: LightningModule) -> list[str]:
        """Return the tags that no other monitor may write; by default all of this kind."""
        return [self.tag("*")]

    def check(self, module: LightningModule) -> None:
        """Raise a :class:`ConfigurationError` where this monitor cannot work on the module; change nothing."""

    def reset(self) -> None:
        """Drop what an interrupted run left behind; called at the start of every run."""

    def describe(self) -> str:
        """Return what this monitor's records show, how to read them, and when they mislead, in Markdown.

        By default the first paragraph of the class's docstring.
        """
        return inspect.cleandoc(type(self).__doc__ or "").split("\n\n")[0]


class WeightMonitor(Monitor):
    """A monitor of the weights. It runs on rank zero (on every rank where the module is sharded)."""

    @abstractmethod
    def capture(self, module: nn.Module, step: int) -> Any:
        """Return what :meth:`records` needs, taken from the module; state is preserved and gradients are off.

        What is returned must not change when training goes on: it is drawn later, on another thread.
        """

    @abstractmethod
    def records(self, data: Any, step: int) -> Iterable[Record]:
        """Return the records of what :meth:`capture` returned; called on rank zero, on the writer's thread."""


class StepMonitor(WeightMonitor):
    """A monitor of the weights that is also called around the optimiser step after which it is due."""

    @abstractmethod
    def before_optimizer_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Read gradients, accumulated and unscaled, not yet clipped.

        Args:
            parameters: The parameters that the optimiser steps, by their names in the module.
        """

    def after_optimizer_step(self) -> None:
        """Read the change that the step made."""


class DataMonitor(Monitor):
    """A monitor that reads images. A base class.

    Args:
        predict: How to run the module, ``predict(module, images)``; None calls it.
        unpack: How to read a batch, ``unpack(batch) -> (images, targets)``; None reads the usual forms.
        **options: See :class:`Monitor`.
    """

    def __init__(
        self,
        *,
        predict: Callable[..., Any] | None = None,
        unpack: Callable[..., Any] | None = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(**options)
        self.predict = predict
        self.unpack = unpack


class ProbeMonitor(DataMonitor):
    """A monitor of what the model makes of the images of a probe.

    Args:
        probe: How many images to take from the validation set (the training set where there is none), a
            :class:`~lightning_interp.Probe`, or a data set to take 8 images from. Monitors with the same probe share
            it, and one forward pass over it.
        **options: ``predict``, ``unpack``, see :class:`DataMonitor`; and those of :class:`Monitor`.

    Raises:
        ConfigurationError: If an option is out of range.
    """

    def __init__(self, *, probe: int | Probe | Dataset[Any] = 8, **options: Unpack[DataMonitorOptions]) -> None:
        super().__init__(**options)
        self.probe = check_probe_option(probe)

    def needs(self, module: nn.Module) -> Needs:
        """Return what the forward pass must provide; by default its logits alone."""
        return Needs()

    def check_probe(self, probe: Probe) -> None:
        """Raise a :class:`ConfigurationError` where this monitor cannot use the probe."""

    @abstractmethod
    def outputs(self, trace: Trace, labels: Tensor | None) -> dict[str, Tensor]:
        """Return what :meth:`draw` needs of these images, on any device.

        Args:
            trace: The forward pass over some of the probe's images, made for all that :meth:`needs` names.
            labels: int64 (N,) the images' classes, or None.

        Returns:
            Named tensors with N rows; with other numbers of rows where ``"image"``, int64, names each row's image.
        """

    @abstractmethod
    def draw(self, outputs: Mapping[str, Tensor], probe: Probe) -> Iterable[Record]:
        """Return records of the whole probe; called on rank zero, on the writer's thread.

        Args:
            outputs: What :meth:`outputs` returned, of all images and ranks, on the CPU.
            probe: The images.
        """


class ScalarMonitor(DataMonitor):
    """A monitor whose numbers are logged by ``pl_module.log``, for ModelCheckpoint and EarlyStopping. A base class.

    The numbers are there from the first validation on (NaN while there is none), and are logged again, unchanged,
    between due epochs and after a failure. A checkpoint keeps the last ones.
    """

    def __init__(self, **options: Unpack[DataMonitorOptions]) -> None:
        super().__init__(**options)
        self.last_scalars: dict[str, float] = {}

    def scalar_names(self, probe: Probe | None) -> list[str]:
        """Return the names of the numbers, known before the first result."""
        return []

    def scalars(self, result: Any) -> Mapping[str, float]:
        """Return the numbers of a result; called on every rank."""
        return {}

    def records(self, result: Any, step: int) -> Iterable[Record]:
        """Return the records of a result; called on rank zero, on the writer's thread."""
        return ()

    def should_stop(self, result: Any) -> str | None:
        """Return why training should end after this result, or None; called on every rank."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the last numbers."""
        return {"scalars": dict(self.last_scalars)} if self.last_scalars else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the last numbers of the run that is resumed."""
        self.last_scalars = dict(state_dict.get("scalars", {}))


class StreamMonitor(ScalarMonitor):
    """A monitor of the whole validation (and test) pass, batch by batch.

    Its layers are read in the step's own forward pass. A validation in a due epoch is streamed, and the first one
    always; of several validation loaders the first.
    """

    # Whether boxes and masks are read with each batch; without any, the probe's images are streamed.
    uses_annotations: ClassVar[bool] = False

    def layers(self, module: nn.Module) -> list[LayerSpec]:
        """Return the layers whose activations :meth:`update` reads."""
        return []

    @abstractmethod
    def begin(self, module: nn.Module, device: torch.device) -> Metric | MetricCollection:
        """Return empty state, on the device; torchmetrics synchronises it over the ranks.

        A rank may see no batch: list states must be able to be synchronised when they are empty.
        """

    @abstractmethod
    def update(self, state: Any, batch: StreamBatch) -> None:
        """Add a batch to the state; gradients are off."""

    def compute(self, state: Any) -> Any:
        """Return the result of all ranks' images, on every rank, or None where nothing was added."""
        return state.compute()

    def finish(self, module: nn.Module, result: Any, read_images: Callable[[Sequence[int]], Tensor]) -> Any:
        """Return the result with what needs the module or single images again; called on every rank.

        Args:
            module: The module, whose state is preserved.
            result: What :meth:`compute` returned.
            read_images: From indices of the data set to images (N, C, H, W) on the device; raises a
                :class:`ConfigurationError` where the data set cannot be read by index.
        """
        return result


class MeasureMonitor(ScalarMonitor):
    """A monitor that runs passes of its own, over units, images or batches, each rank its share.

    Args:
        probe: As for :class:`ProbeMonitor`.
        **options: ``predict``, ``unpack``, see :class:`DataMonitor`; and those of :class:`Monitor`.
    """

    def __init__(self, *, probe: int | Probe | Dataset[Any] = 8, **options: Unpack[DataMonitorOptions]) -> None:
        super().__init__(**options)
        self.probe = check_probe_option(probe)

    def items(self, module: nn.Module, data: MeasureData) -> Sequence[Any]:
        """Return what is shared out over the ranks; by default the numbers of the probe's images."""
        return range(len(data.probe))

    @abstractmethod
    def measure(self, module: nn.Module, data: MeasureData, share: Sequence[Any]) -> Any:
        """Return the result of a share of the items; the module's state, parameters included, is preserved."""

    @abstractmethod
    def merge(self, partials: Sequence[Any]) -> Any:
        """Return the result of all items, of the ranks' results in order, on the CPU; called on every rank."""


def check_definition(monitor: Monitor) -> None:
    """Raise a :class:`ConfigurationError` where a monitor's class lacks what every monitor of its kind has."""
    kind = type(monitor)
    if not hasattr(monitor, "schedule"):
        raise ConfigurationError(f"{kind.__name__}.__init__ does not call super().__init__(**options)")
    if not isinstance(getattr(monitor, "kind", None), str):
        raise ConfigurationError(f"{kind.__name__} lacks kind; give the class kind = '...', the first part of its tags")
    missing = [name for name in dir(kind) if getattr(getattr(kind, name, None), "__isabstractmethod__", False)]
    if missing:
        raise ConfigurationError(f"{kind.__name__} lacks {', '.join(missing)}; see the docstrings of its base class")


def check_probe_option(probe: Any) -> Any:
    """Return what ``probe=`` takes; otherwise raise a :class:`ConfigurationError`."""
    if isinstance(probe, Probe) or (is_integer(probe) and probe >= 1):
        return probe
    if hasattr(probe, "__getitem__") and hasattr(probe, "__len__") and not isinstance(probe, str):
        return probe
    given = repr(probe) if isinstance(probe, (int, float, str)) or probe is None else f"a {type(probe).__name__}"
    raise ConfigurationError(f"probe takes a positive number of images, a Probe or a data set, got {given}")
