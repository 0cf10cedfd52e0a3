"""What files, TensorBoard and memory hold in particular; the contract of all sinks is in test_contract.py."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lightning_interp.sinks import FileSink, MemorySink, TensorBoardSink
from lightning_interp.sinks.records import Histogram, Picture, Scalar, ScalarLayout, Table, Text
from lightning_interp.weights import histograms
from tests.helpers.runs import read_events
from tests.helpers.stores import ODD_TAGS, sample


def picture(tag: str, value: int = 7) -> Picture:
    return Picture(tag, torch.arange(4 * 6 * 3, dtype=torch.uint8).view(4, 6, 3) + value)


def histogram(tag: str = "weights/fc") -> Histogram:
    edges = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    return Histogram(tag, torch.tensor([3.0, 0.0, 2.0], dtype=torch.float64), edges, 1.5, 4.25)


@pytest.mark.parametrize("tag", ODD_TAGS)
def test_files_stay_within_the_folder_whatever_a_tag_says(tmp_path: Path, tag: str) -> None:
    folder = tmp_path / "run" / "lightning_interp"
    sink = FileSink(folder)
    for record in (picture(tag), Text(tag, "*text*"), Scalar(tag, 0.5), histogram(tag)):
        sink.write(record, step=12)
    sink.close()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in written) == [".csv", ".csv", ".md", ".png"]
    for path in written:
        assert folder.resolve() in path.resolve().parents
    (png,) = [path for path in written if path.suffix == ".png"]
    assert png.name == "00000012.png"
    with Image.open(png) as opened:
        pixels = torch.from_numpy(np.array(opened))
    assert torch.equal(pixels, picture(tag).image)
    with (folder / "scalars.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == ["12", tag, "0.5"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tag=st.text(max_size=30))
def test_any_tag_can_be_written(tmp_path: Path, tag: str) -> None:
    folder = tmp_path / "run"
    FileSink(folder).write(picture(tag), step=0)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_tables_grow_and_keep_one_head(tmp_path: Path) -> None:
    for step in (1, 2):
        sink = FileSink(tmp_path)
        sink.write(Scalar("norms/weight/total", step / 3), step)
        sink.flush()
        sink.write(Scalar("norms/weight/fc", float("nan")), step)
        sink.write(histogram(), step)
        sink.close()
    with (tmp_path / "scalars.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["tag"]) for row in rows] == [
        (step, f"norms/weight/{name}") for step in "12" for name in ("total", "fc")
    ]
    assert float(rows[0]["value"]) == 1 / 3
    assert rows[1]["value"] == "nan"
    with (tmp_path / "histograms.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(float(r["left"]), float(r["right"]), float(r["count"])) for r in rows[:3]] == [
        (-1, 0, 3),
        (0, 0.5, 0),
        (0.5, 2, 2),
    ]
    assert len(rows) == 6


def test_nothing_is_made_where_nothing_is_written(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "run")
    sink.write(ScalarLayout("norms", {"weight": ["norms/weight/.*"]}), 0)
    sink.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_gives_back_what_it_was_given(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(writer)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ((_, bins, _),) = histograms({"fc": values}, bins=16).to_cpu()
    assert bins is not None
    counted = Histogram("weights/fc", *bins)
    assert counted is not None
    for record in (picture("cam/gradcam"), Scalar("norms/x", 0.5), counted, Text("note/x", "**so**")):
        sink.write(record, step=3)
    sink.write(ScalarLayout("a", {"one": ["x/.*"]}), 3)
    sink.write(ScalarLayout("b", {"two": ["y/.*"]}), 3)
    sink.close()
    # Everything is there before the logger closes its writer.
    events = read_events(tmp_path)
    writer.close()
    (image,) = events.Images("cam/gradcam")
    assert (image.step, image.width, image.height) == (3, 6, 4)
    assert events.Scalars("norms/x")[0].value == 0.5
    (event,) = events.Histograms("weights/fc")
    value = event.histogram_value
    assert (event.step, value.num) == (3, 1000)
    assert value.min == pytest.approx(float(values.min()))
    assert value.max == pytest.approx(float(values.max()))
    assert value.sum == pytest.approx(float(values.double().sum()))
    assert value.sum_squares == pytest.approx(float(values.double().square().sum()))
    assert value.bucket == counted.counts.tolist()
    assert value.bucket_limit == pytest.approx(counted.edges[1:].tolist())
    assert b"**so**" in events.Tensors("note/x/text_summary")[0].tensor_proto.string_val[0]
    (layout,) = events.Tensors("custom_scalars__config__")
    assert all(part in layout.tensor_proto.string_val[0] for part in (b"one", b"two", b"x/.*"))


def test_pictures_are_encoded_once_and_any_writer_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:  # like tensorboardX's
        def __init__(self) -> None:
            self.images: list[tuple[str, torch.Size, int, str]] = []

        def add_image(self, tag: str, image: np.ndarray, step: int, dataformats: str) -> None:
            self.images.append((tag, torch.from_numpy(image).shape, step, dataformats))

        def _get_file_writer(self) -> None:
            raise AssertionError("its messages are others")

    other = Writer()
    TensorBoardSink(other).write(picture("cam/gradcam"), 3)
    assert other.images == [("cam/gradcam", (4, 6, 3), 3, "HWC")]
    monkeypatch.setattr(SummaryWriter, "add_image", None)
    with SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer).write(picture("cam/gradcam"), 3)
    (event,) = read_events(tmp_path).Images("cam/gradcam")
    assert abs(event.wall_time - time.time()) < 60


def test_a_table_and_a_picture_of_one_tag_are_two_files(tmp_path: Path) -> None:
    sink = FileSink(tmp_path)
    for kind in (Picture, Table, Text):
        sink.write(sample(kind, "trust/drift", 1), 4)
    assert {path.name for path in (tmp_path / "trust" / "drift").iterdir()} == {
        f"00000004.{suffix}" for suffix in ("png", "csv", "md")
    }


@pytest.mark.parametrize("kind", [Picture, Table, Text])
def test_a_full_disk_leaves_no_incomplete_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        FileSink(tmp_path).write(sample(kind, "trust/drift", 1), 4)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_memory_keeps_what_was_written_in_order() -> None:
    sink = MemorySink()
    records = [picture("a/b"), Scalar("c/d", 1.0)]
    for step, record in enumerate(records):
        sink.write(record, step)
    sink.flush()
    sink.close()
    assert [step for step, _ in sink.records] == [0, 1]
    assert [record for _, record in sink.records] == records


def test_a_closed_writer_is_opened_before_threads_use_it(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    writer.close()
    sink = TensorBoardSink(writer)
    assert writer.file_writer is not None
    sink.write(picture("cam/gradcam"), step=1)
    sink.flush()
    writer.close()
    assert [event.step for event in read_events(tmp_path).Images("cam/gradcam")] == [1]
