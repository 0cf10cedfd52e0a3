"""Every explainer against the same method of captum, pytorch-grad-cam and torchcam, and against one forward pass.

    pip install -e ".[benchmarks]" && python benchmarks/explainers.py

Measured in turn in one process for each model and number of images; the table holds medians. Methods with perturbed
passes are measured with one image only, those of a layer on ResNet-18 only: the other libraries take minutes elsewhere
(``--all`` measures everything).
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lightning_interp import explain
from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import Explainer

MODELS = ("resnet18", "resnet50", "vit_b_16")
LIBRARIES = ("captum", "grad-cam", "torchcam")
# Where another library's default differs: the same number of passes for all.
OPTIONS: dict[str, dict[str, Any]] = {"rise": {"n_masks": 500}, "occlusion": {"patch": 45, "stride": 22, "fill": 0.0}}

Work = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    print(f"{machine()}\n")
    print("Milliseconds, and MiB added at the peak; in brackets how many times ours that is.\n")
    print(f"| model | images | method | ours | / forward | {' | '.join(LIBRARIES)} |")
    print(f"|---|---|---|---|---|{'---|' * len(LIBRARIES)}", flush=True)
    for model in args.models:
        for images in args.batches:
            # A process for each, as hooks and caches that a library leaves would slow down others.
            command = [sys.executable, __file__, "--one", "--models", model, "--batches", str(images)]
            command += ["--repeats", str(args.repeats), "--patience", str(args.patience)]
            command += ["--all"] * args.all + ["--methods", *args.methods]
            subprocess.run(command, check=True)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="torchvision models")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="numbers of images")
    names = list(explain.explainers())
    parser.add_argument(
        "--methods", nargs="+", default=names, choices=names, metavar="METHOD", help="names in lightning_interp.explain"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the medians are shown")
    parser.add_argument("--patience", type=float, default=2.0, help="what takes more seconds is measured once")
    parser.add_argument("--all", action="store_true", help="measure slow methods everywhere")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    peers = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{device}, {platform.machine()}; Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, {peers}"
    )


def measure(args: argparse.Namespace) -> None:
    """Print the rows of one model and number of images."""
    warnings.filterwarnings("ignore")
    (name,), (count,) = args.models, args.batches
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = getattr(torchvision.models, name)(num_classes=1000).eval().to(device)
    if hasattr(model, "heads"):
        nn.init.normal_(model.heads.head.weight, std=0.02)  # untrained it is zero, and so is every gradient
    images = torch.randn(count, 3, 224, 224, device=device)
    targets = torch.zeros(count, dtype=torch.long, device=device)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    peers = Peers(model, images, targets)
    explainers = explain.explainers()
    for method in args.methods:
        explainer = explainers[method]
        if not args.all and is_slow(explainer, name, count):
            continue
        options = OPTIONS.get(method, {})
        works: dict[str, Work] = {"forward": forward, "ours": partial(explainer, model, images, targets, **options)}
        works |= {f"{library} {note}".strip(): work for library, note, work in peers.of(method)}
        try:
            row = compare(works, args)
        except ConfigurationError:
            continue  # the method is not defined for this model
        print(f"| {name} | {count} | {method} | {row}", flush=True)


def is_slow(explainer: Explainer, model: str, count: int) -> bool:
    """Whether the other libraries' versions of a method take minutes."""
    return explainer.perturbed and (count > 1 or (explainer.layer is not None and model != "resnet18"))


def compare(works: dict[str, Work], args: argparse.Namespace) -> str:
    """Time works in turn; those that fail are left out, and those that are slow are timed once."""
    times: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for name, work in works.items():
        try:
            times[name], peaks[name] = observed(work)
            if times[name][0] < args.patience:
                times[name], peaks[name] = observed(work)  # the first call was the warm-up
        except Exception as error:
            if name in ("forward", "ours"):
                raise
            print(f"{name}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
    quick = [name for name in peaks if times[name][0] < args.patience]
    # Short times vary most, and are cheap to repeat.
    longest = max(times[name][0] for name in quick) if quick else args.patience
    for _ in range(max(args.repeats, min(20, int(args.patience / longest))) - 1):
        for name in quick:
            times[name].append(timed(works[name]))
    median = {name: 1000 * statistics.median(times[name]) for name in peaks}
    ours, memory = median["ours"], peaks["ours"]
    cells = []
    for library in LIBRARIES:
        entries = [
            f"{name.removeprefix(library)} {median[name]:.0f} ({median[name] / ours:.2f}), "
            f"{peaks[name]:.0f} ({peaks[name] / max(memory, 1):.1f})"
            for name in peaks
            if name.startswith(library)
        ]
        cells.append("; ".join(entry.strip() for entry in entries) or "-")
    return f"{ours:.0f}, {memory:.0f} | {ours / median['forward']:.2f} | {' | '.join(cells)} |"


class Peers:
    """The same methods of other libraries, each with a copy of the model, as some leave hooks and gradients."""

    def __init__(self, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        self.models = {library: copy.deepcopy(model) for library in LIBRARIES}
        self.images, self.targets = images, targets
        self.convolutional = hasattr(model, "layer4")

    def of(self, method: str) -> list[tuple[str, str, Work]]:
        """Return (library, setting, work) for each library that has the method."""
        works = [("captum", note, work) for note, work in self._captum(method)]
        gradcams = {
            "gradcam": "GradCAM",
            "gradcam_plus_plus": "GradCAMPlusPlus",
            "hirescam": "HiResCAM",
            "xgradcam": "XGradCAM",
            "layercam": "LayerCAM",
            "eigencam": "EigenCAM",
            "scorecam": "ScoreCAM",
            "ablationcam": "AblationCAM",
        }
        if method in gradcams:
            works.append(("grad-cam", "", partial(self._gradcam, gradcams[method])))
        torchcams = {
            "cam": "CAM",
            "gradcam": "GradCAM",
            "gradcam_plus_plus": "GradCAMpp",
            "xgradcam": "XGradCAM",
            "layercam": "LayerCAM",
            "scorecam": "ScoreCAM",
        }
        if method in torchcams and self.convolutional:
            works.append(("torchcam", "", partial(self._torchcam, torchcams[method])))
        return works

    def _captum(self, method: str) -> list[tuple[str, Work]]:
        from captum import attr

        model: Any = self.models["captum"]

        def attribute(build: Callable[[], Any], **options: Any) -> Work:
            images = self.images.clone().requires_grad_()
            return lambda: build().attribute(images, target=self.targets, **options)

        window = {"sliding_window_shapes": (3, 45, 45), "strides": (3, 22, 22), "baselines": 0}
        noise = {"nt_samples": 50, "stdevs": 0.15 * float(self.images.max() - self.images.min())}
        tunnel = partial(attr.NoiseTunnel, attr.Saliency(model))
        batched = {**noise, "nt_samples_batch_size": 8}
        layer = model.layer4 if self.convolutional else None
        works: dict[str, list[tuple[str, Work]]] = {
            "saliency": [("", attribute(lambda: attr.Saliency(model)))],
            "input_x_gradient": [("", attribute(lambda: attr.InputXGradient(model)))],
            "integrated_gradients": [
                ("", attribute(lambda: attr.IntegratedGradients(model), n_steps=50)),
                ("8 at once", attribute(lambda: attr.IntegratedGradients(model), n_steps=50, internal_batch_size=8)),
            ],
            "smoothgrad": [
                ("", attribute(tunnel, nt_type="smoothgrad", **noise)),
                ("8 at once", attribute(tunnel, nt_type="smoothgrad", **batched)),
            ],
            "vargrad": [
                ("", attribute(tunnel, nt_type="vargrad", **noise)),
                ("8 at once", attribute(tunnel, nt_type="vargrad", **batched)),
            ],
            "guided_backprop": [("", attribute(lambda: attr.GuidedBackprop(model)))],
            "deconvnet": [("", attribute(lambda: attr.Deconvolution(model)))],
            "occlusion": [
                ("", attribute(lambda: attr.Occlusion(model), **window)),
                ("16 at once", attribute(lambda: attr.Occlusion(model), perturbations_per_eval=16, **window)),
            ],
        }
        if self.convolutional:
            works["gradcam"] = [("", attribute(lambda: attr.LayerGradCam(model, layer)))]
            works["guided_gradcam"] = [("", attribute(lambda: attr.GuidedGradCam(model, layer)))]
        return works.get(method, [])

    def _gradcam(self, method: str) -> None:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        model: Any = self.models["grad-cam"]
        options: dict[str, Any] = {"target_layers": [model.layer4] if self.convolutional else []}
        if not self.convolutional:
            options = {"target_layers": [model.encoder.layers[-1].ln_1], "reshape_transform": as_grid}
        build = getattr(pytorch_grad_cam, method)
        targets = [ClassifierOutputTarget(target) for target in self.targets.tolist()]
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), build(model, **options) as peer:  # noqa: PTH123
            peer(self.images, targets)

    def _torchcam(self, method: str) -> None:
        from torchcam import methods

        model: Any = self.models["torchcam"]
        options = {"fc_layer": "fc"} if method == "CAM" else {}
        with getattr(methods, method)(model, target_layer="layer4", **options) as peer:
            peer(self.targets.tolist(), model(self.images.clone().requires_grad_()))


def as_grid(tokens: Tensor) -> Tensor:
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def timed(work: Work) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def observed(work: Work) -> tuple[list[float], float]:
    """Return the seconds and the MiB of one call."""
    taken: list[float] = []
    added = peak_memory_added(lambda: taken.append(timed(work)))
    return taken, added


def peak_memory_added(work: Work) -> float:
    """Return the peak of additional memory in MiB; on a CPU that of the resident set."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # otherwise memory that was freed before is not counted
    before_on_cpu = status("VmRSS")
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    work()
    return max(status("VmHWM") - before_on_cpu, 0.0)


def status(field: str) -> float:
    if not Path("/proc/self/status").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 2**10


if __name__ == "__main__":
    arguments = parse_args(None)
    if arguments.one:
        measure(arguments)
    else:
        main()
