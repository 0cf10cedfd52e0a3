from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError
from lightning_interp.model.hooks import HookPoint, replace, run_until
from lightning_interp.model.locate import locate
from tests.helpers.states import hook_count, unchanged
from tests.helpers.zoo import Net, animal

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_a_tensor_is_replaced_inside_only(model: Net) -> None:
    model.eval()
    features, expected = model.features(IMAGES), model(IMAGES)
    with unchanged(model), replace(locate(model, "first"), lambda tensor: 0 * tensor):
        torch.testing.assert_close(model(IMAGES), model(0 * IMAGES)[:1].expand(4, -1))
    with replace(locate(model, "second"), lambda tensor: 2 * tensor):
        torch.testing.assert_close(model(IMAGES), model.head(2 * features.mean((2, 3))))
    assert torch.equal(model(IMAGES), expected)
    assert hook_count(model) == 0


def test_the_replacement_ends_after_errors(model: Net) -> None:
    def fail(tensor: Tensor) -> Tensor:
        raise ArithmeticError

    model.eval()
    with unchanged(model), pytest.raises(ArithmeticError), replace(locate(model, "first"), fail):
        model(IMAGES)
    assert hook_count(model) == 0


def test_replacing_the_input_of_a_function() -> None:
    model, images = animal("densenet").model.eval(), animal("densenet").images()
    with unchanged(model), replace(locate(model, None, images), lambda tensor: tensor + 1):
        expected = model.classifier(model.features(images).relu().mean((2, 3)) + 1)
        torch.testing.assert_close(model(images), expected)


def test_replacing_one_of_several_calls() -> None:
    model, images = animal("repeating").model.eval(), animal("repeating").images()
    with replace(locate(model, "block", call_index=0), lambda tensor: 0 * tensor):
        got = model(images)
    torch.testing.assert_close(got, model.head(model.block(0 * model.block(model.stem(images))).mean((2, 3))))


@pytest.mark.parametrize("kind", [tuple, list])
def test_replacing_the_tensor_among_several_things(kind: Callable[..., Any]) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return kind((x, "text"))

    model = Several()
    with replace(HookPoint("", model), lambda tensor: tensor + 1):
        got = model(torch.zeros(2))
    assert type(got) is kind
    assert (got[0].tolist(), got[1]) == ([1, 1], "text")


@pytest.mark.parametrize("name", ["first", "second"])
def test_run_until_stops_at_the_point(model: Net, name: str) -> None:
    ran = []
    model.eval()
    for child, module in model.named_children():
        module.register_forward_hook(lambda module, args, output, child=child: ran.append(child))
    got = run_until(model, IMAGES, locate(model, name))
    assert "head" not in ran
    expected = model.first(IMAGES) if name == "first" else model.features(IMAGES)
    torch.testing.assert_close(got, expected)
    assert got.requires_grad
    assert hook_count(model) == 3  # those of this test


def test_run_until_a_function() -> None:
    model, images = animal("densenet").model.eval(), animal("densenet").images()
    with unchanged(model):
        got = run_until(model, images, locate(model, None, images))
    torch.testing.assert_close(got, model.features(images).relu())


def test_run_until_a_point_that_is_not_reached(model: Net) -> None:
    model.unused = nn.ReLU()
    with pytest.raises(ConfigurationError, match="the layer 'unused' did not run in the model's forward pass; choose"):
        run_until(model, IMAGES, locate(model, "unused"))
    assert hook_count(model) == 0
