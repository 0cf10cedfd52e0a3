"""Records, and the sinks that write them to loggers and files."""

from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.files import FileSink
from lightning_interp.sinks.memory import MemorySink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, ScalarLayout, Table, Text
from lightning_interp.sinks.registry import register
from lightning_interp.sinks.tensorboard import TensorBoardSink

__all__ = [
    "FileSink",
    "Histogram",
    "MemorySink",
    "Picture",
    "Record",
    "Scalar",
    "ScalarLayout",
    "Sink",
    "Table",
    "TensorBoardSink",
    "Text",
    "register",
]
