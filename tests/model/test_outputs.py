from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_interp.model.outputs import output_logits
from lightning_interp.model.trace import Trace
from tests.helpers.zoo import Net

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (torch.zeros(2, 5), (2, 5)),
        (torch.zeros(2), (2, 1)),
        ({"a": torch.zeros(2, 1), "logits": torch.zeros(2, 5)}, (2, 5)),
        ({"out": torch.zeros(2, 5), "aux": torch.zeros(2, 4)}, (2, 5)),
        ({"anything": torch.zeros(2, 5), "loss": None}, (2, 5)),
        ((torch.zeros(2, 5), torch.zeros(2, 4)), (2, 5)),
        ([None, torch.zeros(2, 5)], (2, 5)),
        (namedtuple("Output", ["aux", "logits"])(torch.zeros(2, 4), torch.zeros(2, 5)), (2, 5)),
    ],
)
def test_logits_are_found_in_outputs(output: Any, shape: tuple[int, ...]) -> None:
    assert output_logits(output).shape == shape


def test_a_not_implemented_error_of_the_users_is_raised_unchanged() -> None:
    class Unfinished(Net):
        def forward(self, images: Tensor) -> Tensor:
            raise NotImplementedError("soon")

    with pytest.raises(NotImplementedError, match="soon"), Trace.record(Unfinished(), IMAGES):
        pass
