"""The options with which a classifier of a module was adapted, its recipe, and adapting it in place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.localize import GAPClassifier
from lightning_interp.model.locate import unwrap_compiled

__all__ = [
    "adapt_classifier",
    "fill_zero_parameters",
    "get_classifier",
    "has_added_convolution",
    "is_adapted",
    "read_recipes",
    "recipe_of",
]

_RECIPE = "_gap_head_recipe"  # the attribute of an adapted classifier that holds its recipe


def get_classifier(module: nn.Module, attribute: str) -> nn.Module:
    """Return the classifier of this dotted name; raise a :class:`ConfigurationError` where there is no such module."""
    classifier: Any = module
    for name in attribute.split("."):
        classifier = getattr(classifier, name, None)
    if isinstance(classifier, nn.Module):
        return classifier
    names = [name for name, _ in module.named_modules() if name]
    near = difflib.get_close_matches(attribute, names, n=3) or names[:8]
    problem = "is missing" if classifier is None else f"is {describe(classifier)}"
    hint = f"it has {' and '.join(map(repr, near))}. " if near else ""
    raise ConfigurationError(
        f"GAPHeadFinetuning adapts the classifier {type(module).__name__}.{attribute}, a module, but it {problem} "
        f"after __init__; {hint}Pass attribute=, the classifier's name; and where setup() or configure_model() makes "
        "it, make it in __init__: Lightning calls these after the callbacks' setup"
    )


def is_adapted(classifier: nn.Module, recipe: Mapping[str, Any]) -> bool:
    """Whether a classifier is a ``GAPClassifier`` with the classes and the convolution of a recipe."""
    classifier = unwrap_compiled(classifier)
    if not isinstance(classifier, GAPClassifier):
        return False
    channels, classes = recipe["conv_channels"], recipe["num_classes"]
    if channels is not None and not has_added_convolution(classifier, channels):
        return False
    # A head without weights has the maps of the original classes, so a number of classes requires a new one.
    return classes is None or classes == getattr(classifier.head, "out_features", None)


def has_added_convolution(classifier: GAPClassifier, channels: int | None) -> bool:
    """Whether the features end in the convolution that ``conv_channels`` adds."""
    features = classifier.features
    if channels is None or not isinstance(features, nn.Sequential) or len(features) != 3:
        return False
    return isinstance(features[1], nn.Conv2d) and features[1].out_channels == channels


def adapt_classifier(module: nn.Module, recipe: Mapping[str, Any]) -> GAPClassifier:
    """Replace a module's classifier by an adapted one, which holds its recipe."""
    classifier = get_classifier(module, recipe["attribute"])
    options = {name: value for name, value in recipe.items() if name not in ("attribute", "sample")}
    sample = None if recipe["sample"] is None else _sample(classifier, recipe["sample"])
    adapted = GAPClassifier.from_classifier(classifier, sample=sample, **options)
    # Adapted a second time, to other classes: both recipes together adapt the original classifier.
    first = recipe_of(classifier, {})
    second = {name: value for name, value in recipe.items() if value is not None or name not in first}
    setattr(adapted, _RECIPE, {**first, **second})
    module.set_submodule(recipe["attribute"], adapted)
    return adapted


def recipe_of(classifier: nn.Module, default: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe that a classifier holds, or the default."""
    recipe: dict[str, Any] = getattr(unwrap_compiled(classifier), _RECIPE, default)
    return recipe


def read_recipes(checkpoint: Mapping[str, Any], module_name: str) -> list[dict[str, Any]]:
    """Return the recipes in a checkpoint; raise a :class:`ConfigurationError` where it has none."""
    states = (checkpoint.get("callbacks") or {}).items()
    recipes = [state["recipe"] for key, state in states if str(key).startswith("GAPHeadFinetuning{")]
    if recipes:
        return recipes
    raise ConfigurationError(
        f"the checkpoint has no state of GAPHeadFinetuning: where its {module_name} was not adapted by the callback, "
        f"load it with {module_name}.load_from_checkpoint; one that was adapted must be saved with "
        "save_weights_only=False"
    )


@torch.no_grad()
def fill_zero_parameters(classifier: nn.Module) -> None:
    """Fill parameters that are all zero with noise: the structure of a head is detected by its logits."""
    generator = torch.Generator().manual_seed(0)
    for parameter in classifier.parameters():
        if parameter.is_floating_point() and not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _sample(classifier: nn.Module, shape: list[int]) -> Tensor:
    like = next((parameter for parameter in classifier.parameters() if parameter.is_floating_point()), torch.zeros(()))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
