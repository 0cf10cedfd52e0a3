"""A sink: every scalar as a line of JSON, for a logger of one's own.

python examples/extend/sink.py
"""

import json
from pathlib import Path

from pytorch_lightning.loggers.logger import DummyLogger
from training import train

from lightning_interp import NormMonitor
from lightning_interp.sinks import Record, Scalar, Sink, register


class JSONLinesLogger(DummyLogger):
    folder = Path("lightning_logs/json_lines")


@register
class JSONLinesSink(Sink):
    """Append ``{"step": ..., "tag": ..., "value": ...}`` to a file; other records go to PNG and CSV files."""

    accepts = frozenset({Scalar})

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    @classmethod
    def for_logger(cls, logger: object) -> "JSONLinesSink | None":
        return cls(logger.folder / "scalars.jsonl") if isinstance(logger, JSONLinesLogger) else None

    def write(self, record: Record, step: int) -> None:
        self.file.write(json.dumps({"step": step, "tag": record.tag, "value": record.value}) + "\n")

    def flush(self) -> None:
        self.file.flush()


if __name__ == "__main__":
    train([NormMonitor()], logger=JSONLinesLogger())
    print((JSONLinesLogger.folder / "scalars.jsonl").read_text(encoding="utf-8").splitlines()[-1])
