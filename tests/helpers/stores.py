"""The stores behind the sinks: open one, write through its sink, read back what it holds."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_interp.sinks import (
    FileSink,
    Histogram,
    MemorySink,
    Picture,
    Record,
    Scalar,
    ScalarLayout,
    Sink,
    Table,
    TensorBoardSink,
    Text,
)
from lightning_interp.sinks.csv_logs import CSVSink
from lightning_interp.sinks.mlflow import MLflowSink
from lightning_interp.sinks.wandb import WandbSink

ODD_TAGS = [
    "cam/gradcam",
    "cam/../../../outside",
    "../outside",
    "/outside",
    "cam//deep/",
    "..",
    "",
    " ",
    'cam/"quoted", with comma',
    "cam/line\nbreak",
    "cam/\N{CAT FACE}",
    "cam/кошка",
    "cam/nul\0byte",
    "cam/" + "long" * 200,
    "cam/" + "long" * 200 + "er",
    "/".join(["a_part_of_a_name_that_is_not_short"] * 20),
    "cam/a b",
    "cam/a_b",
    "C:\\outside\\file",
]

Stored = list[tuple[int, Any]]  # (step, value), the value as `plain` gives it


def sample(kind: type, tag: str, number: int) -> Record:
    """A record of a class; its values differ with the number."""
    if kind is Picture:
        return Picture(tag, ((torch.arange(5 * 7 * 3) * 7 + number * 31) % 256).to(torch.uint8).view(5, 7, 3))
    if kind is Scalar:
        return Scalar(tag, number + 0.25)
    if kind is Histogram:
        edges = torch.tensor([-1.0, 0.0, 0.5, 2.0 + number], dtype=torch.float64)
        return Histogram(tag, torch.tensor([3.0, 0.0, 2.0 + number], dtype=torch.float64), edges, 1.5, 4.25)
    if kind is Text:
        return Text(tag, f"**number** {number} & <b>more</b>")
    if kind is Table:
        return Table(tag, ("name", "a|b", "share"), [("gradcam", number, 0.125), ("random", True, None)])
    return ScalarLayout(f"category{number}", {"title": [rf"norms/{number}/.*"]})


def plain(record: Record) -> Any:
    """A record's values without its tag, as they compare after any store."""
    if isinstance(record, Picture):
        return record.image.tolist()
    if isinstance(record, Scalar):
        return record.value
    if isinstance(record, Histogram):
        return record.counts.tolist(), record.edges.tolist()
    if isinstance(record, Text):
        return record.markdown
    if isinstance(record, Table):
        return [list(record.columns), *([_text(cell) for cell in row] for row in record.rows)]
    return record.category, {title: list(tags) for title, tags in record.charts.items()}


def _text(cell: object) -> str:
    return "" if cell is None else str(cell)


def pixels(png: bytes) -> Any:
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image).tolist()


class Store(ABC):
    """A sink with what is behind it, in a folder."""

    sink_class: ClassVar[type[Sink]]
    package: ClassVar[str | None] = None
    sink: Sink

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Set `sink`."""

    @abstractmethod
    def read(self, kind: type) -> Stored:
        """What was stored of a record class, whatever its tags."""

    def close(self) -> None:  # noqa: B027
        """Release what `open` took."""


class MemoryStore(Store):
    sink_class = MemorySink

    def open(self) -> None:
        self.sink = MemorySink()

    def read(self, kind: type) -> Stored:
        assert isinstance(self.sink, MemorySink)
        return [(step, plain(record)) for step, record in self.sink.records if isinstance(record, kind)]


class FileStore(Store):
    sink_class = FileSink

    def open(self) -> None:
        self.sink = FileSink(self.folder)

    def read(self, kind: type) -> Stored:
        if kind is Scalar:
            return [(int(row["step"]), float(row["value"])) for row in rows_of(self.folder / "scalars.csv")]
        if kind is Histogram:
            bins: dict[tuple[str, str], list[list[float]]] = {}
            for row in rows_of(self.folder / "histograms.csv"):
                values = [float(row[name]) for name in ("left", "right", "count")]
                bins.setdefault((row["step"], row["tag"]), []).append(values)
            return [(int(step), from_bins(rows)) for (step, _), rows in bins.items()]
        suffix, parse = FILES[kind]
        paths = [path for path in self.folder.rglob(f"*{suffix}") if path.parent != self.folder]
        return [(int(path.stem), parse(path.read_bytes())) for path in paths]


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def from_bins(rows: list[list[float]]) -> tuple[list[float], list[float]]:
    return [row[2] for row in rows], [rows[0][0], *(row[1] for row in rows)]


def parse_table(content: bytes) -> Any:
    return list(csv.reader(io.StringIO(content.decode(), newline="")))


def parse_histogram(content: bytes) -> Any:
    return from_bins([[float(cell) for cell in row] for row in parse_table(content)[1:]])


FILES: dict[type, tuple[str, Callable[[bytes], Any]]] = {
    Picture: (".png", pixels),
    Text: (".md", bytes.decode),
    Table: (".csv", parse_table),
    ScalarLayout: (".layout", bytes),
}


class CSVStore(Store):
    sink_class = CSVSink

    def open(self) -> None:
        self.sink = CSVSink(self.folder)

    def read(self, kind: type) -> Stored:
        if kind is not Scalar:
            return [(0, path.name) for path in self.folder.rglob("*")]
        return [(int(row["step"]), float(row["value"])) for row in rows_of(self.folder / "lightning_interp.csv")]


class TensorBoardStore(Store):
    sink_class = TensorBoardSink

    def open(self) -> None:
        self.writer = SummaryWriter(str(self.folder))
        self.sink = TensorBoardSink(self.writer)

    def close(self) -> None:
        self.writer.close()

    def read(self, kind: type) -> Stored:
        from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

        everything = {"images": 0, "scalars": 0, "histograms": 0, "tensors": 0}
        events = EventAccumulator(str(self.folder), everything).Reload()
        tags = events.Tags()
        if kind is Picture:
            return [(e.step, pixels(e.encoded_image_string)) for tag in tags["images"] for e in events.Images(tag)]
        if kind is Scalar:
            return [(e.step, e.value) for tag in tags["scalars"] for e in events.Scalars(tag)]
        if kind is Histogram:
            histograms = [e for tag in tags["histograms"] for e in events.Histograms(tag)]
            values = [(e.step, e.histogram_value) for e in histograms]
            return [(step, (list(value.bucket), [value.min, *value.bucket_limit])) for step, value in values]
        strings = [
            (e.step, tag.endswith("/text_summary"), e.tensor_proto.string_val[0])
            for tag in tags["tensors"]
            for e in events.Tensors(tag)
        ]
        if kind is ScalarLayout:
            categories = [c for _, is_text, text in strings if not is_text for c in Layout.FromString(text).category]
            return [(0, (c.title, {chart.title: list(chart.multiline.tag) for chart in c.chart})) for c in categories]
        texts = [(step, text.decode()) for step, is_text, text in strings if is_text]
        if kind is Text:
            return [(step, text) for step, text in texts if not text.startswith("|")]
        return [(step, parse_markdown(text)) for step, text in texts if text.startswith("|")]


def parse_markdown(text: str) -> Any:
    head, _, *rows = text.splitlines()
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (head, *rows)]
    return [[cell.strip().replace("\\|", "|") for cell in line] for line in lines]


class WandbStore(Store):
    sink_class = WandbSink
    package = "wandb"

    def open(self) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        self.run: Any = wandb.init(mode="offline", dir=str(self.folder), project="contract", settings=settings)
        self.sink = WandbSink(self.run)

    def close(self) -> None:
        import wandb

        if self.run is not None:
            self.run.finish()
            wandb.teardown()  # waits for the process that writes the run's file
            self.run = None

    def read(self, kind: type) -> Stored:
        self.close()
        stored = []
        for row in wandb_history(self.folder):
            step = row.pop("trainer/global_step", None)
            for key, value in row.items():
                if not key.startswith("_") and self._kind_of(value) is kind:
                    stored.append((step, self._value_of(kind, value)))
        return stored

    @staticmethod
    def _kind_of(value: Any) -> type:
        names = {"image-file": Picture, "histogram": Histogram, "html-file": Text, "table-file": Table}
        return names[value["_type"]] if isinstance(value, dict) else Scalar

    def _value_of(self, kind: type, value: Any) -> Any:
        if kind is Scalar:
            return float(value)
        if kind is Histogram:
            return list(map(float, value["values"])), list(map(float, value["bins"]))
        (path,) = self.folder.rglob(value["path"])
        content = path.read_bytes()
        if kind is Picture:
            return pixels(content)
        if kind is Text:
            return html.unescape(re.search(r"<pre[^>]*>(.*)</pre>", content.decode(), re.DOTALL)[1])  # type: ignore[index]
        table = json.loads(content)
        return [table["columns"], *([_text(cell) for cell in row] for row in table["data"])]


def wandb_history(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows in an offline run's file."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    (path,) = folder.rglob("*.wandb")
    for data in leveldb_records(path.read_bytes()[7:]):
        message = Message.FromString(data)
        if message.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in message.history.item:
                *parents, name = item.nested_key or [item.key]
                target = row
                for parent in parents:
                    target = target.setdefault(parent, {})
                target[name] = json.loads(item.value_json)
            yield row


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log whose first block lacks a file header of 7 bytes."""
    position, record = 0, b""
    while position + 7 <= len(log):
        room = 32768 - (position + 7) % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        record += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


class MLflowStore(Store):
    sink_class = MLflowSink
    package = "mlflow"

    def open(self) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        experiment = self.client.create_experiment("contract", artifact_location=str(self.folder / "artifacts"))
        self.run_id = self.client.create_run(experiment).info.run_id
        self.sink = MLflowSink(self.client, self.run_id)

    def read(self, kind: type) -> Stored:
        if kind is Scalar:
            names = self.client.get_run(self.run_id).data.metrics
            histories = [self.client.get_metric_history(self.run_id, name) for name in names]
            return [(metric.step, metric.value) for history in histories for metric in history]
        if not self.client.list_artifacts(self.run_id):
            return []
        folder = Path(self.client.download_artifacts(self.run_id, ""))
        if kind is Picture:
            paths = list(folder.glob("images/*.png"))
            return [(int(re.search(r"[+%]step[+%](\d+)", p.name)[1]), pixels(p.read_bytes())) for p in paths]  # type: ignore[index]
        parse = {Text: bytes.decode, Table: parse_table, Histogram: parse_histogram, ScalarLayout: bytes}[kind]
        paths = [path for path in folder.glob("lightning_interp/**/*.*") if path.is_file()]
        return [(int(path.stem), parse(path.read_bytes())) for path in paths]


STORES: list[type[Store]] = [MemoryStore, FileStore, CSVStore, TensorBoardStore, WandbStore, MLflowStore]
PARAMETERS = [
    pytest.param(
        store,
        id=store.sink_class.__name__,
        marks=[pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")] if store.package else [],
    )
    for store in STORES
]
