"""One pass over a probe for all monitors that are due on it: chunks outside, monitors inside."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_interp.callbacks._lightning import LightningModule
from lightning_interp.callbacks.contract import Monitor, ProbeMonitor
from lightning_interp.callbacks.inputs import Needs
from lightning_interp.callbacks.run.failures import Failures
from lightning_interp.callbacks.run.outcome import Outcome
from lightning_interp.callbacks.run.ranks import Ranks
from lightning_interp.callbacks.run.runner import ModelRunner, is_out_of_memory, release_memory
from lightning_interp.callbacks.run.transfer import HostCopy
from lightning_interp.data.probe import Probe
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.model.forward import ForwardPass
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.preserve import preserve_state
from lightning_interp.model.sharding import reset_fsdp_state
from lightning_interp.model.trace import LayerSpec, Trace

__all__ = ["ProbePass"]


class ProbePass:
    """Runs a module over the images of probes, and asks monitors for their outputs.

    Args:
        runner: How the module is run.
        ranks: The processes; each takes its share of a probe, all of it where the module is sharded.
        failures: How the ranks agree on errors in the middle of a collective pass.
    """

    def __init__(self, runner: ModelRunner, ranks: Ranks, failures: Failures) -> None:
        self._runner = runner
        self._ranks = ranks
        self._failures = failures
        self.layer_names: dict[Monitor, tuple[str, ...]] = {}  # which layers were chosen

    def run(
        self,
        module: LightningModule,
        probe: Probe,
        monitors: Sequence[ProbeMonitor],
        outcome: Outcome,
        *,
        dry_run: bool = False,
    ) -> None:
        """Add this rank's outputs, and errors, to an outcome.

        Args:
            module: The module.
            probe: The images.
            monitors: Those that are due on it; they run the module in the same way.
            outcome: Changed in place; its value for a monitor is a list of named tensors, one entry a chunk.
            dry_run: Run one image only.
        """
        collective = self._runner.is_collective
        part, first = self._share(probe, dry_run)
        with preserve_state(module, parameters=_guards_parameters(module, monitors)):
            if collective:
                # Each rank's batch norm has its own statistics; other predictions would ask for other passes.
                self._ranks.broadcast_tensors(module.buffers(), self._runner.device)
            start = 0
            while start < len(part):
                chunk = part.subset(slice(start, start + self._runner.rows))
                result = Outcome()
                active = [monitor for monitor in monitors if monitor not in outcome.errors]
                with result.collecting(active):
                    self._run_chunk(module, chunk, first + start, active, result)
                if collective:
                    self._failures.gather(result.errors)
                    if result.errors:
                        reset_fsdp_state(module.modules())
                if self._must_retry(result.errors, len(chunk)):
                    continue
                outcome.errors.update(result.errors)
                for monitor, outputs in result.values.items():
                    outcome.values.setdefault(monitor, []).extend(outputs)
                start += len(chunk)

    def outputs(
        self, module: LightningModule, monitor: ProbeMonitor, images: Tensor, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """One monitor's outputs for other images than its probe's, by passes of their own.

        Args:
            module: The module.
            monitor: The monitor.
            images: (N, C, H, W).
            labels: (N,), or None.

        Returns:
            What its ``outputs`` returns, on the device.
        """
        images = self._runner.images(images, module)
        labels = None if labels is None else labels.to(images.device)
        parts = []
        with preserve_state(module, parameters=_guards_parameters(module, [monitor])):
            if self._runner.is_collective:
                self._ranks.broadcast_tensors(module.buffers(), self._runner.device)
            for start in range(0, len(images), self._runner.rows):
                rows = slice(start, start + self._runner.rows)
                needs = _needs(monitor, module)
                points = self._runner.points(module, needs.layers, images[rows], monitor.predict)
                forward_pass = self._forward_pass(module, images[rows], start, [(needs, points)], monitor)
                with forward_pass:
                    trace = Trace(forward_pass, layers=points)
                    parts.append(monitor.outputs(trace, None if labels is None else labels[rows]))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _share(self, probe: Probe, dry_run: bool) -> tuple[Probe, int]:
        """This rank's part of a probe, and the index of its first image."""
        if dry_run:
            return probe.subset(slice(0, 1)), 0
        if self._runner.is_collective:
            return probe, 0
        share = self._ranks.share(len(probe))
        return probe.subset(share), share.start

    def _must_retry(self, errors: Mapping[Monitor, Exception], rows: int) -> bool:
        """Whether a chunk must be run again in halves, as memory did not suffice."""
        if not any(map(is_out_of_memory, errors.values())):
            return False
        for error in errors.values():
            traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
        release_memory()
        # A rank may run a module again on its own only where the others need not take part.
        if rows > 1 and not self._runner.is_collective:
            self._runner.halve_rows(rows)
            return True
        self._runner.reset_rows()  # the others need not go by one that never fits
        return False

    def _run_chunk(
        self, module: LightningModule, chunk: Probe, first: int, monitors: Sequence[ProbeMonitor], result: Outcome
    ) -> None:
        """One forward pass, made for what all monitors need together."""
        images = self._runner.images(chunk.images, module)
        labels = None if chunk.targets is None else chunk.targets.to(images.device)
        needs: dict[ProbeMonitor, tuple[Needs, dict[LayerSpec, HookPoint]]] = {}
        for monitor in monitors:
            with result.collecting([monitor]):
                wanted = _needs(monitor, module)
                points = self._runner.points(module, wanted.layers, images, monitor.predict)
                needs[monitor] = wanted, points
                self.layer_names[monitor] = tuple(point.name for point in points.values())
        if not needs:
            return
        has_run = False
        try:
            with self._forward_pass(module, images, first, list(needs.values()), next(iter(needs))) as forward_pass:
                has_run = True
                for monitor, (_, points) in needs.items():
                    with result.collecting([monitor]):
                        outputs = monitor.outputs(Trace(forward_pass, layers=points), labels)
                        result.values.setdefault(monitor, []).append(_to_host(monitor, outputs, first, len(images)))
        except Exception as error:
            may_retry = not self._runner.is_collective and not (is_out_of_memory(error) and len(images) > 1)
            if has_run or len(needs) == 1 or not may_retry:
                result.errors.update(dict.fromkeys(needs, error))
            else:
                # The needs of one monitor can break the pass for all, so each is run alone.
                for monitor in needs:
                    self._run_chunk(module, chunk, first, [monitor], result)

    def _forward_pass(
        self,
        module: LightningModule,
        images: Tensor,
        first: int,
        needs: Sequence[tuple[Needs, Mapping[LayerSpec, HookPoint]]],
        monitor: ProbeMonitor,
    ) -> ForwardPass:
        layers: dict[HookPoint, bool] = {}
        for wanted, points in needs:
            for layer, point in points.items():
                layers[point] = layers.get(point, False) or wanted.layers[layer]
        return ForwardPass(
            module,
            images,
            layers=layers,
            input_gradients=any(wanted.input_gradients for wanted, _ in needs),
            predict=self._runner.predict(monitor.predict),
            first_index=first,
        )


def _needs(monitor: ProbeMonitor, module: LightningModule) -> Needs:
    """What a monitor needs, checked."""
    needs = monitor.needs(module)
    if not isinstance(needs, Needs) or not isinstance(needs.layers, Mapping):
        raise ConfigurationError(
            f"{monitor!r}: needs() must return Needs(layers={{layer: whether its gradient is needed}}), got "
            f"{describe(needs)}"
        )
    return needs


def _guards_parameters(module: LightningModule, monitors: Sequence[ProbeMonitor]) -> bool:
    try:
        return any(monitor.needs(module).guard_parameters for monitor in monitors)
    except Exception:
        return True  # it is raised again, and collected, where the needs are read


def _to_host(monitor: ProbeMonitor, outputs: Mapping[str, Tensor], first: int, count: int) -> dict[str, HostCopy]:
    """Outputs on their way to the CPU, with rows that name images of the whole probe."""
    if not isinstance(outputs, Mapping) or not all(isinstance(each, Tensor) and each.ndim for each in outputs.values()):
        raise ConfigurationError(
            f"{monitor!r}: outputs() must return named tensors with a row for each image, got {describe(outputs)}"
        )
    named = dict(outputs)
    if "image" in named:
        count = len(named["image"])
        named["image"] = named["image"] + first
    for name, values in named.items():
        if len(values) != count:
            raise ConfigurationError(
                f"{monitor!r}: outputs() returned {len(values)} rows of {name!r}, expected {count}, one for each "
                "image; name the image of each row by an int64 tensor 'image' where they are others"
            )
    return {name: HostCopy(values) for name, values in named.items()}
