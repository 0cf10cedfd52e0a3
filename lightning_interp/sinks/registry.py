"""Which sink serves which logger."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar, overload

from lightning_interp.errors import ConfigurationError
from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.csv_logs import CSVSink
from lightning_interp.sinks.mlflow import MLflowSink
from lightning_interp.sinks.tensorboard import TensorBoardSink
from lightning_interp.sinks.wandb import WandbSink

__all__ = ["register", "sinks_for"]

SinkClass = TypeVar("SinkClass", bound=type[Sink])

_classes: list[type[Sink]] = [TensorBoardSink, WandbSink, MLflowSink, CSVSink]


@overload
def register(sink_class: SinkClass, *, first: bool = True) -> SinkClass: ...
@overload
def register(*, first: bool = True) -> Callable[[SinkClass], SinkClass]: ...
def register(
    sink_class: SinkClass | None = None, *, first: bool = True
) -> SinkClass | Callable[[SinkClass], SinkClass]:
    """Add a sink class to those that are tried for every logger; usable as a decorator.

    Args:
        sink_class: A concrete subclass of :class:`Sink`. A class that is registered already changes its position.
        first: Whether it is tried before all others, so that it replaces a sink of this package; else after them.

    Returns:
        The class, or without ``sink_class`` a decorator.

    Raises:
        ConfigurationError: If this is no sink class, or it has abstract methods or no ``accepts``.

    Example:
        >>> from lightning_interp.sinks import MemorySink, register
        >>> @register(first=False)
        ... class NeptuneSink(MemorySink):
        ...     @classmethod
        ...     def for_logger(cls, logger):
        ...         return cls() if type(logger).__name__ == "NeptuneLogger" else None
    """
    if sink_class is None:
        return lambda decorated: register(decorated, first=first)
    if not (isinstance(sink_class, type) and issubclass(sink_class, Sink)):
        raise ConfigurationError(f"register takes a subclass of lightning_interp.sinks.Sink, got {sink_class!r}")
    if inspect.isabstract(sink_class):
        missing = ", ".join(sorted(sink_class.__abstractmethods__))
        raise ConfigurationError(f"{sink_class.__name__} cannot be registered as a sink: it lacks {missing}")
    accepts = getattr(sink_class, "accepts", None)
    if not isinstance(accepts, frozenset) or not accepts or not all(isinstance(kind, type) for kind in accepts):
        raise ConfigurationError(
            f"{sink_class.__name__}.accepts takes a frozenset of record classes, such as "
            f"frozenset({{Picture, Scalar}}), got {accepts!r}"
        )
    if sink_class in _classes:
        _classes.remove(sink_class)
    _classes.insert(0 if first else len(_classes), sink_class)
    return sink_class


def sinks_for(loggers: Iterable[object]) -> list[Sink]:
    """Return the sinks of a Trainer's loggers: for each the first registered class that recognises it, if any.

    Loggers that are disabled on this rank have none.

    Example:
        >>> import tempfile
        >>> from types import SimpleNamespace
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     [type(sink).__name__ for sink in sinks_for([SimpleNamespace(experiment=writer), object()])]
        ['TensorBoardSink']
    """
    sinks = []
    for logger in loggers:
        sink = next((sink for sink_class in _classes if (sink := _try(sink_class, logger)) is not None), None)
        if sink is None:
            continue
        if not isinstance(sink, Sink):
            raise ConfigurationError(
                f"for_logger of a registered sink must return a Sink or None, got {sink!r} for {type(logger).__name__}"
            )
        sinks.append(sink)
    return sinks


def _try(sink_class: type[Sink], logger: object) -> Sink | None:
    try:
        return sink_class.for_logger(logger)
    except Exception as error:
        warnings.warn(
            f"{sink_class.__name__}.for_logger failed for {type(logger).__name__}, which gets no records from it: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None
