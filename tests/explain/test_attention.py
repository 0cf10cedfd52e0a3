from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_interp.errors import ConfigurationError
from lightning_interp.explain import attention_rollout
from lightning_interp.explain.attention import _AttentionRecorder, _fused_probabilities
from tests.helpers import references
from tests.helpers.states import unchanged, unsettle
from tests.helpers.zoo import CLASSES, Animal, Net, animal

TRANSFORMERS = pytest.mark.parametrize("kind", [animal("vit"), animal("timm_vit")], ids=lambda kind: kind.name)


class Attending(nn.Module):
    """Layers whose attention is given: (L, heads, T, T) logits, shared by all images."""

    def __init__(self, logits: Tensor, attend: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(-1)) -> None:
        super().__init__()
        self.logits, self.attend = nn.Parameter(logits), attend
        self.stem, self.head = nn.Conv2d(3, 8, 8, stride=8), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)
        for logits in self.logits:
            probabilities = self.attend(logits.expand(len(images), *logits.shape))
            tokens = tokens + (probabilities @ tokens[:, None]).mean(1)
        return self.head(tokens[:, 0])


def rolled(probabilities: Tensor) -> Tensor:
    """(L, T, T) to (T, T)."""
    rollout = torch.eye(probabilities.shape[-1])
    for layer in probabilities:
        mixed = layer + torch.eye(len(layer))
        rollout = mixed / mixed.sum(1, keepdim=True) @ rollout
    return rollout


# ---- closed forms


@TRANSFORMERS
def test_rows_sum_to_one(kind: Animal) -> None:
    maps = attention_rollout(kind.model, kind.images(), upsample=False)
    assert maps.shape == (3, 4, 4)
    assert (maps > 0).all()
    assert (maps.sum((1, 2)) < 1).all()  # the remainder is the class token's
    assert torch.equal(maps, attention_rollout(kind.model, kind.images(), 2, upsample=False))


@pytest.mark.parametrize("layers", [1, 3])
def test_attention_to_all_alike_gives_a_uniform_map(layers: int) -> None:
    model = Attending(torch.zeros(layers, 2, 17, 17))
    maps = attention_rollout(model, torch.rand(2, 3, 32, 32), upsample=False)
    torch.testing.assert_close(maps, torch.full((2, 4, 4), (1 - 0.5**layers) / 17))


def test_attention_to_oneself_alone_gives_nothing() -> None:
    model = Attending(200 * torch.eye(17).expand(3, 2, 17, 17).contiguous())
    assert not attention_rollout(model, torch.rand(2, 3, 32, 32)).any()


def test_a_position_that_all_attend_to_is_found() -> None:
    logits = torch.zeros(2, 1, 17, 17)
    logits[..., 1 + 4 * 2 + 3] = 9
    maps = attention_rollout(Attending(logits), torch.rand(1, 3, 32, 32), upsample=False)[0]
    assert maps.argmax() == 4 * 2 + 3
    assert maps[2, 3] > 0.7
    large = attention_rollout(Attending(logits), torch.rand(1, 3, 32, 32))[0]
    assert large.shape == (32, 32)
    assert large[20, 28] == large.max()


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_heads_are_fused(fusion: Any) -> None:
    logits = torch.randn(3, 4, 17, 17)
    fused = logits.softmax(-1)
    fused = fused.mean(1) if fusion == "mean" else getattr(fused, f"a{fusion}")(1)
    maps = attention_rollout(Attending(logits), torch.rand(2, 3, 32, 32), head_fusion=fusion, upsample=False)
    torch.testing.assert_close(maps, rolled(fused)[0, 1:].view(1, 4, 4).expand(2, 4, 4))


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_smallest_attentions_are_discarded(share: float) -> None:
    logits = torch.randn(2, 1, 17, 17)
    kept = logits.softmax(-1)[:, 0].flatten(1)
    for layer in kept:
        first = layer[0].item()
        layer[layer.sort().values[: int(len(layer) * share)].max() >= layer] = 0
        layer[0] = first
    maps = attention_rollout(Attending(logits), torch.rand(1, 3, 32, 32), discard_ratio=share, upsample=False)
    torch.testing.assert_close(maps[0], rolled(kept.view(2, 17, 17))[0, 1:].view(4, 4))


def test_the_query_is_the_first_token_or_all_positions() -> None:
    logits = torch.randn(2, 1, 17, 17)
    rollout = rolled(logits.softmax(-1)[:, 0])
    images = torch.rand(1, 3, 32, 32)
    first, mean = (
        attention_rollout(Attending(logits), images, query=query, upsample=False) for query in ("first", "mean")
    )
    torch.testing.assert_close(first[0], rollout[0, 1:].view(4, 4))
    torch.testing.assert_close(mean[0], rollout[1:, 1:].mean(0).view(4, 4))


# ---- however it is called


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_transformers_with_and_without_class_token(pool: str, registers: int) -> None:
    model = timm.models.VisionTransformer(
        img_size=(32, 64), patch_size=8, depth=2, num_heads=2, embed_dim=8, num_classes=CLASSES, global_pool=pool,
        class_token=pool == "token", reg_tokens=registers,
    )  # fmt: skip
    query: Any = "mean" if pool == "avg" and registers else None  # a register comes first
    images = torch.rand(2, 3, 32, 64)
    with unchanged(model):
        maps = attention_rollout(model, images, query=query, upsample=False)
    assert maps.shape == (2, 4, 8)
    if pool == "avg" and not registers:
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))


def test_fused_and_plain_attention_are_the_same() -> None:
    kind = animal("timm_vit")
    fused = attention_rollout(kind.model, kind.images())
    blocks: Any = kind.model.blocks
    assert all(block.attn.fused_attn for block in blocks)
    for block in blocks:
        block.attn.fused_attn = False
    try:
        torch.testing.assert_close(attention_rollout(kind.model, kind.images()), fused)
    finally:
        for block in blocks:
            block.attn.fused_attn = True


@pytest.mark.parametrize(
    "attend",
    [
        lambda logits: logits.softmax(-1),
        lambda logits: torch.softmax(logits, dim=-1),
        lambda logits: F.softmax(logits, dim=-1),
        lambda logits: nn.Softmax(dim=-1)(logits),
    ],
    ids=["method", "function", "functional", "module"],
)
def test_every_softmax_is_seen(attend: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(2, 2, 17, 17)
    torch.testing.assert_close(
        attention_rollout(Attending(logits, attend), torch.ones(1, 3, 32, 32)),
        attention_rollout(Attending(logits), torch.ones(1, 3, 32, 32)),
    )


def test_a_softmax_over_channels_is_no_attention() -> None:
    class Weighted(Attending):  # a map of weights that is square by chance
        def forward(self, images: Tensor) -> Tensor:
            weights = images[:, :, :17, :17]
            weights.softmax(1), weights.softmax(dim=-2), F.softmax(weights, 2), torch.softmax(input=weights, dim=0)
            return super().forward(images)

    logits, images = torch.randn(2, 2, 17, 17), torch.ones(1, 3, 32, 32)
    expected = attention_rollout(Attending(logits), images)
    torch.testing.assert_close(attention_rollout(Weighted(logits), images), expected)
    last = Attending(logits, lambda logits: torch.softmax(input=logits, dim=3))
    torch.testing.assert_close(attention_rollout(last, images), expected)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"mask": True}])
def test_the_probabilities_of_fused_attention(options: dict[str, Any]) -> None:
    options = dict(options)
    query, key, value = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6)
    if not options.get("enable_gqa"):
        key, value = key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1)
    if options.pop("mask", False):
        options["attn_mask"] = torch.rand(5, 5) > 0.3
    probabilities = _fused_probabilities(F.scaled_dot_product_attention, query, key, value, **options)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 5))
    values = value.repeat_interleave(2, 1) if options.get("enable_gqa") else value
    torch.testing.assert_close(probabilities @ values, F.scaled_dot_product_attention(query, key, value, **options))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_a_tapped_layer_gives_what_it_gave(need_weights: bool, average: bool) -> None:
    layer, tokens = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    options = {"need_weights": need_weights, "average_attn_weights": average}
    with torch.no_grad():
        output, weights = layer(tokens, tokens, tokens, **options)
        with _AttentionRecorder() as recorder:
            tapped, tapped_weights = layer(tokens, tokens, tokens, **options)
        _, by_head = layer(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(tapped, output)
    torch.testing.assert_close(tapped_weights, weights)
    torch.testing.assert_close(recorder.probabilities[0], by_head)


def test_a_transformer_encoder_of_torch_is_seen() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.stem, self.head = nn.Conv2d(3, 8, 8, stride=8), nn.Linear(8, CLASSES)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.body(self.stem(images).flatten(2).transpose(1, 2)).mean(1))

    maps = attention_rollout(Model(), torch.rand(2, 3, 32, 32), upsample=False)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))


# ---- modes, precision, compilation


@TRANSFORMERS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_in_every_grad_mode(kind: Animal, mode: type) -> None:
    unsettle(kind.model)
    expected = attention_rollout(kind.model, kind.images())
    with mode(), unchanged(kind.model):
        maps = attention_rollout(kind.model, kind.images())
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps, references.attention_rollout(kind.model, kind.images(), torch.zeros(3)))


@TRANSFORMERS
def test_works_under_autocast_and_in_other_precisions(kind: Animal) -> None:
    expected = attention_rollout(kind.model, kind.images())
    with unchanged(kind.model), torch.autocast("cpu", torch.bfloat16):
        maps = attention_rollout(kind.model, kind.images())
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, expected, rtol=0.02, atol=1e-3)
    double = attention_rollout(kind.build().double(), kind.images().double())
    assert double.dtype == torch.float32


@pytest.mark.parametrize("name", ["vit", pytest.param("timm_vit", marks=pytest.mark.matrix)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_models_run_eagerly(name: str) -> None:
    torch._dynamo.reset()
    kind = animal(name)
    model, frames = kind.build().eval(), []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(kind.images())
    before = len(frames)
    assert before
    torch.testing.assert_close(attention_rollout(compiled, kind.images()), attention_rollout(model, kind.images()))
    assert len(frames) == before
    torch._dynamo.reset()


def test_a_lightning_module_with_predict_logs_nothing() -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = animal("vit").build()

    module, images = Module(), animal("vit").images()
    with unchanged(module):
        maps = attention_rollout(module, images, predict=lambda module, images: module.net(images))
    torch.testing.assert_close(maps, attention_rollout(module.net, images))


# ---- errors that help


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net(), "Net shows no attention between tokens; attention_rollout is for vision transformers; use gradcam"),
        (animal("swin").model, r"SwinTransformer is not between the same tokens in all layers \(windows, as in Swin"),
        (Attending(torch.zeros(2, 1, 17, 17), lambda x: x[:1].softmax(-1)), r"expected \(2, heads, .*got \(1, 1, 17,"),
    ],
    ids=["net", "swin", "folded"],
)
def test_models_that_do_not_attend(model: nn.Module, message: str) -> None:
    with unchanged(model), pytest.raises(ConfigurationError, match=message):
        attention_rollout(model, torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_tokens_that_form_no_grid() -> None:
    class Cut(Attending):
        def forward(self, images: Tensor) -> Tensor:
            tokens = torch.zeros(len(images), 2000, 8)
            return self.head((self.logits.new_zeros(len(images), 1, 2000, 2000).softmax(-1)[:, 0] @ tokens)[:, 0])

    with pytest.raises(ConfigurationError, match="the 2000 tokens of Cut form no grid on images of 8 x 8"):
        attention_rollout(Cut(torch.zeros(1)), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_fusion": "sum"}, "head_fusion takes 'mean', 'max' or 'min', got 'sum'"),
        ({"discard_ratio": 1.0}, r"discard_ratio takes a share, at least 0 and less than 1, got 1\.0"),
        ({"discard_ratio": -0.1}, "discard_ratio takes .*got -0.1"),
        ({"discard_ratio": "a"}, "discard_ratio takes a share, at least 0 and less than 1, got 'a'"),
        ({"query": "last"}, "query takes 'first', 'mean' or None, got 'last'"),
        ({"layer": "encoder"}, "attention_rollout explains pixels and takes no layer"),
        ({"targets": 9}, "target 9 is out of range"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    kind = animal("vit")
    with unchanged(kind.model), pytest.raises(ConfigurationError, match=message):
        attention_rollout(kind.model, kind.images(), **options)


def test_upsampling_is_an_option() -> None:
    assert "upsample" in inspect.signature(attention_rollout).parameters
