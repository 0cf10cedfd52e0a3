"""Records into TensorBoard event files."""

from __future__ import annotations

from typing import Any

from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, ScalarLayout, Text

__all__ = ["TensorBoardSink"]


class TensorBoardSink(Sink):
    """Writes to the ``SummaryWriter`` of a TensorBoard logger; the writer stays the logger's.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter`` or one like it.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from lightning_interp.sinks.records import Scalar
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = SummaryWriter(folder)
        ...     sink = TensorBoardSink(writer)
        ...     sink.write(Scalar("norms/weight/total", 1.0), step=3)
        ...     sink.flush()
        ...     writer.close()
    """

    accepts = frozenset({Picture, Scalar, Histogram, Text, ScalarLayout})

    @classmethod
    def for_logger(cls, logger):
        e = getattr(logger, "experiment", None)
        return cls(e) if cls.takes(e) else None

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._layout: dict[str, dict[str, list[Any]]] = {}
        self._layout_written = False

    @staticmethod
    def takes(experiment: object) -> bool:
        """Whether a logger's ``experiment`` is such a writer."""
        return all(callable(getattr(experiment, name, None)) for name in ("add_image", "add_histogram_raw", "add_text"))

    def write(self, record: Record, step: int) -> None:
        """Hand a record to the writer's queue."""
        writer = self._writer
        if isinstance(record, Picture):
            writer.add_image(record.tag, record.image.numpy(), step, dataformats="HWC")
        elif isinstance(record, Scalar):
            writer.add_scalar(record.tag, record.value, step)
        elif isinstance(record, Histogram):
            edges = record.edges.tolist()
            writer.add_histogram_raw(
                record.tag,
                min=edges[0],
                max=edges[-1],
                num=record.count,
                sum=record.total,
                sum_squares=record.total_of_squares,
                bucket_limits=edges[1:],
                bucket_counts=record.counts.tolist(),
                global_step=step,
            )
        elif isinstance(record, Text):
            writer.add_text(record.tag, record.markdown, step)
        elif isinstance(record, ScalarLayout):
            charts = self._layout.setdefault(record.category, {})
            charts.update({title: ["Multiline", list(tags)] for title, tags in record.charts.items()})

    def flush(self) -> None:
        """Write everything to the event file."""
        if self._layout and not self._layout_written:
            # TensorBoard reads a run's first layout only, so all monitors' charts go into one.
            self._writer.add_custom_scalars(self._layout)
            self._layout_written = True
        self._writer.flush()

    def close(self) -> None:
        """Flush; the logger closes its writer itself."""
        self.flush()
