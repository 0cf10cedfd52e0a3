"""Pictures decode to the pixels they were made of, in the usual decoders."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_interp.sinks._png import encode_png


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (37, 61), (300, 500)])
@pytest.mark.parametrize("kind", ["noise", "constant", "ramp"])
def test_pixels_come_back(size: tuple[int, int], kind: str) -> None:
    height, width = size
    if kind == "noise":
        image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    elif kind == "constant":
        image = torch.full((height, width, 3), 211, dtype=torch.uint8)
    else:
        image = (torch.arange(height * width * 3) % 256).to(torch.uint8).view(height, width, 3)
    before = image.clone()
    check(image)
    assert image.equal(before)


def test_views_of_other_tensors_can_be_encoded() -> None:
    channels_first = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    check(channels_first.permute(1, 2, 0))
    check(channels_first.permute(1, 2, 0)[::2, 5:17])


def check(image: Tensor) -> None:
    content = encode_png(image)
    with Image.open(io.BytesIO(content)) as opened:
        opened.verify()
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.array(opened), image.numpy())
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded[..., ::-1], image.numpy())
