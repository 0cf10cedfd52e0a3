"""The stream and the measure recipe over one validation; each process leaves its numbers in the folder it is given."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
sys.path.insert(0, str(EXTEND))

from measure_monitor import MirrorMonitor  # noqa: E402
from stream_monitor import FiringMonitor  # noqa: E402
from training import Classifier, squares  # noqa: E402


def numbers(folder: Path, **options: Any) -> dict[str, float]:
    """What both monitors log of an untrained classifier and 15 images, which two processes cannot share evenly."""
    pl.seed_everything(0, verbose=False)
    monitors = [FiringMonitor(on_error="raise"), MirrorMonitor(probe=9, on_error="raise")]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[*monitors], default_root_dir=folder, **(quiet | options))
    trainer.validate(Classifier(), DataLoader(squares(15), batch_size=4), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    result = numbers(folder, devices=2, strategy="ddp")
    (folder / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
