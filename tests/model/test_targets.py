from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.targets import as_targets, resolve_classes, target_scores

LOGITS = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.0, 0.0]])
ONE_LOGIT = torch.tensor([[1.5], [-0.5], [0.0]])


# ---- the forms of targets


@pytest.mark.parametrize("targets", [None, 2, True, torch.tensor([0, 1]), len])
def test_targets_that_are_returned_unchanged(targets: Any) -> None:
    assert as_targets(targets) is targets


@pytest.mark.parametrize("targets", [[2, 0], (2, 0), np.array([2, 0]), np.array([2, 0], dtype=np.int32)])
def test_sequences_become_tensors(targets: Any) -> None:
    classes = as_targets(targets)
    assert isinstance(classes, Tensor)
    assert classes.tolist() == [2, 0]


def test_a_numpy_integer_becomes_a_tensor_without_dimensions() -> None:
    classes = as_targets(np.int64(2))
    assert isinstance(classes, Tensor)
    assert resolve_classes(classes, LOGITS).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("targets", "came"), [("cat", "str"), ([[0], [1, 2]], "list"), ({}, "dict"), (object(), "obj")]
)
def test_other_targets_are_refused(targets: Any, came: str) -> None:
    with pytest.raises(ConfigurationError, match=f"targets takes None, a class, .*, got {came}"):
        as_targets(targets)


# ---- classes


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, [1, 0]),
        (2, [2, 2]),
        (torch.tensor(0), [0, 0]),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor([2, 1], dtype=torch.uint8), [2, 1]),
        (torch.tensor([2, 1], dtype=torch.int32), [2, 1]),
    ],
)
def test_classes_of_images(targets: Any, expected: list[int]) -> None:
    classes = resolve_classes(targets, LOGITS)
    assert classes.dtype == torch.int64
    assert classes.device == LOGITS.device
    assert classes.tolist() == expected


def test_one_logit_decides_between_two_classes() -> None:
    assert resolve_classes(None, ONE_LOGIT).tolist() == [1, 0, 0]
    assert resolve_classes(1, ONE_LOGIT).tolist() == [1, 1, 1]
    with pytest.raises(ConfigurationError, match="target 2 is out of range; the model has the classes 0 to 1"):
        resolve_classes(2, ONE_LOGIT)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (3, "target 3 is out of range; the model has the classes 0 to 2"),
        (-1, "target -1 is out of range"),
        (torch.tensor([0, 7]), "target 7 is out of range"),
        (torch.tensor([0]), r"targets has shape \(1,\), expected one class for each of the 2 images"),
        (torch.tensor([[0], [1]]), r"targets has shape \(2, 1\)"),
        (1.5, r"targets are class numbers \(int64\), got torch.float32"),
        (torch.tensor([0.0, 1.0]), "got torch.float32"),
        (torch.tensor([1j, 0j]), "got torch.complex64"),
        (True, "got torch.bool"),
        (torch.tensor([True, False]), "got torch.bool"),
    ],
)
def test_classes_that_do_not_fit(targets: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve_classes(targets, LOGITS)


@pytest.mark.parametrize("shape", [(4,), (4, 0), (0, 3), (4, 3, 8, 8)])
def test_outputs_without_class_scores(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no class scores \(N, K\); pass targets as a callable"):
        resolve_classes(None, torch.zeros(shape))


def test_classes_made_in_inference_mode_can_be_used_in_a_graph() -> None:
    with torch.inference_mode():
        targets = torch.tensor([2, 1])
    classes = resolve_classes(targets, LOGITS)
    assert not classes.is_inference()
    logits = LOGITS.clone().requires_grad_()
    target_scores(logits, classes, 2).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0, 1], [0, 1, 0]]


def test_the_given_classes_are_not_changed() -> None:
    targets = torch.tensor([2, 1])
    resolve_classes(targets, LOGITS)
    assert targets.tolist() == [2, 1]


# ---- scores


@pytest.mark.parametrize("output", [LOGITS, {"logits": LOGITS}, SimpleNamespace(logits=LOGITS), (LOGITS, None)])
def test_the_score_of_a_class_is_its_logit(output: Any) -> None:
    assert target_scores(output, torch.tensor([2, 0]), 2).tolist() == [1, 3]


@pytest.mark.parametrize("logits", [ONE_LOGIT, ONE_LOGIT[:, 0]], ids=["(N, 1)", "(N,)"])
def test_one_logit_is_evidence_for_class_one(logits: Tensor) -> None:
    assert target_scores(logits, torch.tensor([1, 1, 1]), 3).tolist() == [1.5, -0.5, 0]
    assert target_scores(logits, torch.tensor([0, 0, 0]), 3).tolist() == [-1.5, 0.5, 0]


def test_a_callable_scores_the_whole_output() -> None:
    output = {"embedding": LOGITS, "other": "text"}
    assert target_scores(output, lambda output: output["embedding"][:, 1], 2).tolist() == [2, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_in_float32(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    assert target_scores(logits, torch.tensor([2, 0]), 2).dtype == torch.float32
    assert target_scores(logits, lambda output: output[:, 0], 2).dtype == torch.float32


@pytest.mark.parametrize(
    ("score", "came"),
    [
        (lambda output: output, r"float32 \(2, 3\)"),
        (lambda output: output[:1, 0], r"float32 \(1,\)"),
        (lambda output: output.sum(), r"float32 \(\)"),
        (lambda output: [1.0, 2.0], "list"),
        (lambda output: None, "NoneType"),
    ],
)
def test_scores_of_a_callable_that_do_not_fit(score: Any, came: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"callable given as targets gave {came}.*, expected scores \(2,\)"):
        target_scores(LOGITS, score, 2)


def test_a_callables_graph_is_kept() -> None:
    logits = LOGITS.clone().requires_grad_()
    target_scores(logits, lambda output: output.square().sum(1), 2).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, 2 * LOGITS)
