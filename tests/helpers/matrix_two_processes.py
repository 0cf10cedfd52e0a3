"""Two processes train under DDP, with monitors and without; run as a script, and read by test_matrix.py."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import warnings
from pathlib import Path

import torch

from tests.helpers.matrix import ON_GPUS, TWO_PROCESSES, WATCHED, Leg, differences, loud, quiet, train

PLAYED = TWO_PROCESSES | ON_GPUS


@functools.cache
def alone(setting: str) -> list[Leg]:
    return train(PLAYED[setting], None, "alone.ckpt")


def main() -> None:
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet()
        warnings.filterwarnings("ignore", message=".*is disabled from here on")
        warnings.filterwarnings("ignore", message=".*sync_dist")
        for setting, watched in cases:
            before = alone(setting)
            after = train(PLAYED[setting], loud(WATCHED[watched]), "watched.ckpt")
            found[f"{setting}/{watched}/{os.environ.get('LOCAL_RANK', '0')}"] = {
                "differences": differences(before, after),
                "looks": sorted({step for leg in after for step, _ in leg.records}),
            }
    (folder / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(found))
    assert not [each for each in threading.enumerate() if each.name == "lightning_interp"], "a writer was left running"
    # Left to the interpreter's end, torch's own threads now and then abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
