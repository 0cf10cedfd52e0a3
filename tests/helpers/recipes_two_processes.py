"""The stream and the measure recipe on two processes; each leaves its numbers in the folder that is the argument."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
sys.path.insert(0, str(EXTEND))

from measure_monitor import MirrorMonitor  # noqa: E402
from stream_monitor import FiringMonitor  # noqa: E402
from training import train  # noqa: E402


def numbers(folder: Path, **options: object) -> dict[str, float]:
    monitors = [FiringMonitor(on_error="raise"), MirrorMonitor(probe=9, on_error="raise")]
    trainer = train(monitors, default_root_dir=folder, logger=False, **options)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    # One learning rate for both: with two processes the batches differ, so nothing may learn.
    result = numbers(folder, devices=2, strategy="ddp", limit_train_batches=1, max_epochs=1)
    (folder / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(result))
