"""Where records go."""

from lightning_interp.sinks.background import BackgroundWriter
from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.files import FileSink
from lightning_interp.sinks.memory import MemorySink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, ScalarLayout, Text
from lightning_interp.sinks.registry import register, sinks_for
from lightning_interp.sinks.tensorboard import TensorBoardSink

__all__ = ["BackgroundWriter", "FileSink", "MemorySink", "Sink", "TensorBoardSink", "register", "sinks_for"]
