"""LightningCLI builds monitors from a configuration file, in both Lightnings."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_interp.callbacks import CAMMonitor, LocalizationMonitor, NormMonitor, SaliencyMonitor
from tests.helpers.runs import for_flavour

pytest.importorskip("jsonargparse")
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

HEADER = """
trainer:
  logger: false
  enable_checkpointing: false
  accelerator: cpu
  callbacks:
"""
FULL = """
    - class_path: lightning_interp.CAMMonitor
      init_args:
        method: cam
        target: 2
        alpha: 0.25
        layer: net.5
        at_epochs: [0, 4]
        at_start: false
        probe: 3
        name: exact
        on_error: raise
    - class_path: lightning_interp.SaliencyMonitor
      init_args:
        method: smoothgrad
        method_options:
          n_samples: 4
        every_n_train_steps: 10
    - class_path: lightning_interp.NormMonitor
    - class_path: lightning_interp.LocalizationMonitor
      init_args:
        threshold: 0.05
        version: 2
        normalization: min_max
        every_n_epochs: 3
"""


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["train"])
    return pytest.importorskip(request.param)


def build(package: Any, folder: Path, callbacks: str) -> list[Any]:
    cli = importlib.import_module(f"{package.__name__}.cli")
    path = folder / "config.yaml"
    path.write_text(HEADER + callbacks)
    found = cli.LightningCLI(
        for_flavour(package),
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        args=["--config", str(path)],
    )
    return [each for each in found.trainer.callbacks if type(each).__module__.startswith("lightning_interp")]


def test_monitors_from_a_file(package: Any, tmp_path: Path) -> None:
    cam, saliency, norms, localization = build(package, tmp_path, FULL)
    assert isinstance(cam, CAMMonitor)
    assert isinstance(saliency, SaliencyMonitor)
    assert isinstance(norms, NormMonitor)
    assert (cam.map_method.name, cam.map_method.target, cam.map_method.layer) == ("cam", 2, "net.5")
    assert (cam.alpha, cam.probe) == (0.25, 3)
    assert (cam.name, cam.on_error) == ("exact", "raise")
    assert (cam.schedule.at_epochs, cam.schedule.at_start) == ((0, 4), False)
    assert (saliency.map_method.options, saliency.schedule.every_n_train_steps) == ({"n_samples": 4}, 10)
    assert isinstance(localization, LocalizationMonitor)
    assert (localization.threshold, localization.version, localization.normalization) == (0.05, 2, "min_max")
    assert (localization.schedule.every_n_epochs, localization.map_method.target) == (3, "label")
    plain = NormMonitor()
    assert (norms.schedule, norms.order, norms.on_error) == (plain.schedule, plain.order, plain.on_error)


def test_what_a_file_gets_wrong_is_said(package: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "    - class_path: lightning_interp.CAMMonitor\n      init_args:\n        every_n_epoch: 2\n"
    with pytest.raises(SystemExit):
        build(package, tmp_path, wrong)
    assert "every_n_epoch" in capsys.readouterr().err


def test_a_value_out_of_range_is_our_error(package: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "    - class_path: lightning_interp.CAMMonitor\n      init_args:\n        alpha: 7\n"
    with pytest.raises((SystemExit, ValueError)) as caught:
        build(package, tmp_path, wrong)
    assert "alpha takes a number from 0 to 1" in str(caught.value) + capsys.readouterr().err
