from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from lightning_interp.model.layout import layout_of, to_grid
from lightning_interp.model.locate import locate
from lightning_interp.model.trace import Trace


@pytest.mark.parametrize(
    ("shape", "size", "layout"),
    [
        ((2, 8, 7, 7), (224, 224), "channels_first"),
        ((2, 7, 7, 96), (224, 224), "channels_last"),
        ((2, 7, 14, 96), (224, 448), "channels_last"),
        ((2, 7, 7, 7), (224, 224), "channels_first"),  # where both would do
        ((2, 8, 10, 96), (230, 300), "channels_last"),  # patches of 32, the last ones padded
        ((2, 55, 55, 48), (224, 224), "channels_last"),  # strides without padding
        ((2, 48, 40, 25), (80, 200), "channels_first"),  # other strides along the width, as for spectrograms
        ((2, 64, 64, 16), (64, 64), "channels_first"),
        ((2, 196, 8), (224, 224), 0),
        ((2, 197, 8), (224, 224), 1),
        ((2, 198, 8), (224, 224), 2),  # class and distillation
        ((2, 201, 8), (224, 224), 5),  # class and registers
        ((2, 257, 8), (224, 224), 1),  # patches of 14
        ((2, 393, 8), (448, 224), 1),
        ((2, 50, 8), (224, 224), 1),
        ((2, 37, 8), (32, 64), 5),  # 4 x 8 by patches of 8, not 4 x 9 by patches of 7 that leave a border
        ((2, 37, 8), (33, 65), 1),
        ((2, 9000, 8), (32, 32), None),
        ((2, 8), (32, 32), None),
        ((2, 3, 4, 5, 6), (32, 32), None),
    ],
)
def test_layouts(shape: tuple[int, ...], size: tuple[int, int], layout: Any) -> None:
    assert layout_of(torch.zeros(shape), size) == layout


def test_tokens_stand_row_by_row() -> None:
    maps = torch.rand(2, 5, 3, 6)
    tokens = maps.flatten(2).transpose(1, 2)
    for prefix in (0, 1, 4):
        given = torch.cat([torch.full((2, prefix, 5), torch.nan), tokens], 1)
        assert torch.equal(to_grid(given, (24, 48)), maps)
    wide = maps.repeat(1, 8, 1, 1)
    assert torch.equal(to_grid(wide.movedim(1, -1), (24, 48)), wide)


def test_the_grid_is_a_view() -> None:
    for shape in ((2, 17, 8), (2, 4, 4, 24), (2, 8, 4, 4)):
        tensor = torch.zeros(shape)
        to_grid(tensor, (32, 32))[:] = 1
        assert tensor.any()


def test_activations_without_positions_are_returned_unchanged() -> None:
    for shape in ((2, 8), (2, 9000, 8)):
        tensor = torch.zeros(shape)
        assert to_grid(tensor, (32, 32)) is tensor


def build(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=3, **options)


@pytest.mark.parametrize(
    ("model", "size", "name", "grid"),
    [
        (lambda: models.vit_b_32(), 224, "encoder.layers.encoder_layer_11.ln_1", (768, 7, 7)),
        (lambda: models.swin_t(), 64, "permute", (768, 2, 2)),
        (lambda: build("vit_tiny_patch16_224"), 224, "blocks.11.norm1", (192, 14, 14)),
        (lambda: build("deit_tiny_distilled_patch16_224"), 224, "blocks.11.norm1", (192, 14, 14)),
        (lambda: build("swin_tiny_patch4_window7_224"), 224, "norm", (768, 7, 7)),
    ],
    ids=["vit_b_32", "swin_t", "vit_tiny", "deit_distilled", "timm_swin"],
)
def test_tokens_of_the_last_attention_are_located(model: Any, size: int, name: str, grid: tuple[int, ...]) -> None:
    with torch.device("meta"):
        transformer, images = model(), torch.empty(2, 3, size, size)
        point = locate(transformer, None, images)
    assert point.name == name
    with torch.device("meta"), torch.no_grad():
        kept: list[torch.Tensor] = []
        assert point.module is not None
        handle = point.module.register_forward_hook(lambda module, args, output: kept.append(output))
        transformer.eval()(images)
        handle.remove()
        assert to_grid(kept[point.call_index], (size, size)).shape == (2, *grid)


def test_averaged_tokens_are_found() -> None:
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, depth=1, num_heads=2, embed_dim=8, num_classes=3, global_pool="avg"
    )
    point, images = locate(model, None, torch.rand(2, 3, 32, 32)), torch.rand(2, 3, 32, 32)
    assert point.name == "input of mean"  # of the tokens without the first
    with Trace.record(model, images, 1, layers={point: True}) as trace:
        assert trace.activations(point).shape == (2, 8, 4, 4)
        assert trace.gradients(point).any()


def test_the_class_token_does_not_depend_on_the_patch_tokens_of_the_last_block() -> None:
    # Why ``locate`` goes back to what enters the last attention.
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, depth=2, num_heads=2, embed_dim=8, num_classes=3)
    late, images = locate(model, "blocks.1"), torch.rand(2, 3, 32, 32)
    located = locate(model, None, images)
    with Trace.record(model, images, 1, layers={late: True, located: True}) as trace:
        assert not trace.gradients(late).any()
        assert trace.gradients(located).any()
