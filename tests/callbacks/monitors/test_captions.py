"""What stands under a tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_interp import Probe
from lightning_interp.callbacks.monitors._captions import captions, probabilities


def probe(n: int, targets: list[int] | None = None, names: list[str] | None = None) -> Probe:
    return Probe(torch.zeros(n, 3, 4, 4), targets, class_names=names)


def lines(logits: Tensor, explained: list[int], probe: Probe) -> list[tuple[str, ...]]:
    return [each.lines for each in captions({"logits": logits, "explained": torch.tensor(explained)}, probe)]


def test_the_predicted_class_and_how_sure() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    found = captions({"logits": logits, "explained": torch.tensor([0, 1])}, probe(2, [0, 1], ["cat", "dog"]))
    assert [each.lines for each in found] == [("cat 88 %",), ("cat 50 %", "true: dog", "map of: dog")]
    assert [each.correct for each in found] == [True, False]


def test_one_logit_is_the_evidence_for_class_one() -> None:
    assert torch.allclose(probabilities(torch.tensor([[0.0], [3.0]])).sum(1), torch.ones(2))
    logits = torch.tensor([[-3.0], [3.0]])
    assert lines(logits, [0, 1], probe(2, names=["no", "yes"])) == [("no 95 %",), ("yes 95 %",)]


def test_probabilities_are_not_softened_again() -> None:
    given = torch.tensor([[0.9, 0.1], [0.25, 0.75]])
    assert torch.equal(probabilities(given), given)
    assert lines(given, [0, 1], probe(2, names=["cat", "dog"])) == [("cat 90 %",), ("dog 75 %",)]
    # Logits that happen to be positive are still logits.
    assert torch.allclose(probabilities(torch.tensor([[0.9, 0.2]])), torch.tensor([[0.9, 0.2]]).softmax(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("classes", [1, 3])
def test_what_is_not_finite_is_said(bad: float, classes: int) -> None:
    logits = torch.zeros(2, classes)
    logits[0] = bad
    (first, *_), second = lines(logits, [0, 0], probe(2, names=["a", "b", "c"]))
    if classes > 1 or bad != float("inf"):
        assert "not finite" in first
    assert "%" in second[0]


def test_without_labels_nothing_is_judged() -> None:
    (caption,) = captions({"logits": torch.tensor([[1.0, -1.0]]), "explained": torch.tensor([0])}, probe(1))
    assert caption.correct is None
    assert len(caption.lines) == 1
    assert "0 88 %" in caption.lines[0]


def test_an_output_that_is_no_classifiers_gets_empty_captions() -> None:
    found = captions({"logits": torch.zeros(2, 3, 4, 4), "explained": torch.zeros(2)}, probe(2))
    assert [each.correct for each in found] == [None, None]
