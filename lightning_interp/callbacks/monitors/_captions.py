"""The captions of tiles: predicted and true class, and the probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_interp.data.probe import Probe
from lightning_interp.render import Caption

__all__ = ["captions", "probabilities"]


def probabilities(logits: Tensor) -> Tensor:
    """Return class probabilities of a model's output.

    Args:
        logits: (N, K) logits; one logit is the evidence for class 1; probabilities are recognised and kept.

    Returns:
        (N, max(K, 2)), each row summing to 1.

    Example:
        >>> import torch
        >>> probabilities(torch.tensor([[0.0]]))
        tensor([[0.5000, 0.5000]])
    """
    if logits.shape[1] == 1:
        positive = logits.sigmoid()
        return torch.cat([1 - positive, positive], dim=1)
    # Not against torch.ones: in half precision Lightning changes the default dtype, under the writer's thread, too.
    is_normalized = bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() <= 1e-4).all())
    return logits if is_normalized else logits.softmax(1)


def captions(outputs: Mapping[str, Tensor], probe: Probe, below: Sequence[str] | None = None) -> list[Caption]:
    """Return a caption for each image of a probe.

    Args:
        outputs: ``logits`` (N, K) and ``explained`` (N,), the classes that the maps explain, on the CPU.
        probe: The images, with their targets and class names where known.
        below: One more line for each image, at the end; None: none.

    Returns:
        N captions: predicted class and probability; the true class where it differs; the class that the map explains
        where it is not the predicted one.
    """
    tiles = _of_classes(outputs, probe)
    if below is None:
        return tiles
    return [replace(tile, lines=(*tile.lines, line)) for tile, line in zip(tiles, below, strict=True)]


def _of_classes(outputs: Mapping[str, Tensor], probe: Probe) -> list[Caption]:
    logits, explained = outputs["logits"], outputs["explained"]
    if logits.ndim != 2:
        return [Caption(("",), None) for _ in range(len(probe))]
    rows = probabilities(logits)
    named = probe.class_names is not None

    def name(index: int) -> str:
        return probe.class_name(index) if named else f"class {index}"

    tiles = []
    for index, row in enumerate(rows):
        predicted = int(row.argmax())
        confidence = f"{100 * float(row[predicted]):.0f} %" if bool(row.isfinite().all()) else "not finite"
        lines = [f"{name(predicted)} {confidence}"]
        correct = None
        if probe.targets is not None:
            label = int(probe.targets[index])
            correct = predicted == label
            lines.append("" if correct else f"true: {name(label)}")
        if int(explained[index]) != predicted:
            lines.append(f"map of: {name(int(explained[index]))}")
        tiles.append(Caption(tuple(line for line in lines if line), correct))
    return tiles
