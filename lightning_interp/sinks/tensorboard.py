"""Records into TensorBoard event files."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import Self

from lightning_interp.sinks._loggers import live_experiment
from lightning_interp.sinks._png import encode_png
from lightning_interp.sinks.base import Sink
from lightning_interp.sinks.records import Histogram, Picture, Record, Scalar, ScalarLayout, Table, Text

__all__ = ["TensorBoardSink"]


class TensorBoardSink(Sink):
    """Write to the ``SummaryWriter`` of a TensorBoard logger, which stays open.

    Tables are shown in the Text tab; scalar layouts in the Custom Scalars tab.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter`` or one with the same methods.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from lightning_interp.sinks import Scalar
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = SummaryWriter(folder)
        ...     sink = TensorBoardSink(writer)
        ...     sink.write(Scalar("norms/weight/total", 1.0), step=3)
        ...     sink.flush()
        ...     writer.close()
    """

    accepts: ClassVar[frozenset[type]] = frozenset({Histogram, Picture, Scalar, ScalarLayout, Table, Text})

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._layout: dict[str, dict[str, list[Any]]] = {}
        self._layout_written = False
        # tensorboardX has the same methods, but messages of its own.
        modules = {base.__module__ for base in type(writer).__mro__}
        self._takes_summaries = "torch.utils.tensorboard.writer" in modules and hasattr(writer, "_get_file_writer")
        if self._takes_summaries:
            # A writer that was closed by an earlier run opens its next file at the first record; two threads would open
            # two, of which TensorBoard reads one.
            writer._get_file_writer()

    @classmethod
    def for_logger(cls, logger: object) -> Self | None:
        """Return a sink for a logger whose ``experiment`` has the methods of a ``SummaryWriter``."""
        experiment = live_experiment(logger)
        methods = ("add_image", "add_scalar", "add_histogram_raw", "add_text", "add_custom_scalars")
        return cls(experiment) if all(callable(getattr(experiment, name, None)) for name in methods) else None

    def write(self, record: Record, step: int) -> None:
        """Put a record into the writer's queue; layouts wait for :meth:`flush`."""
        writer = self._writer
        if isinstance(record, Picture):
            self._write_picture(record, step)
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
        elif isinstance(record, Table):
            writer.add_text(record.tag, record.to_markdown(), step)
        elif isinstance(record, ScalarLayout):
            charts = self._layout.setdefault(record.category, {})
            charts.update({title: ["Multiline", list(tags)] for title, tags in record.charts.items()})

    def flush(self) -> None:
        """Write everything to the event file."""
        if self._layout and not self._layout_written:
            # TensorBoard reads only a run's first layout, so the charts of all monitors share one.
            self._writer.add_custom_scalars(self._layout)
            self._layout_written = True
        self._writer.flush()

    def _write_picture(self, record: Picture, step: int) -> None:
        if not self._takes_summaries:
            self._writer.add_image(record.tag, record.image.numpy(), step, dataformats="HWC")
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        # add_image would convert to float and back, resize to the same size and compress at PIL's slow default.
        height, width, channels = record.image.shape
        image = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=encode_png(record.image)
        )
        summary = Summary(value=[Summary.Value(tag=record.tag, image=image)])
        self._writer._get_file_writer().add_summary(summary, step)
