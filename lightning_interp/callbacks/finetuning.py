"""Fine-tune any classifier as one whose class activation maps are exact."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lightning_interp.callbacks._lightning import BaseFinetuning, LightningModule, Trainer, rank_zero_info
from lightning_interp.callbacks.parameter_groups import (
    Places,
    add_group,
    find_head,
    follow,
    set_rate,
    split_groups,
    where,
)
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.localize import GAPClassifier
from lightning_interp.model.locate import layer_name, unwrap_compiled

__all__ = ["GAPHeadFinetuning"]

Module = TypeVar("Module", bound=nn.Module)
_RECIPE = "_gap_head_recipe"  # where an adapted classifier keeps what it was adapted with


class GAPHeadFinetuning(BaseFinetuning):
    """Swaps a module's classifier for a :class:`GAPClassifier`, trains its head, and later the backbone too.

    The swap is in ``setup``, for fitting, validating, testing and predicting: before the optimisers are configured and
    before a checkpoint is restored. A classifier that is adapted already stays. Until ``unfreeze_at_epoch`` the
    backbone is frozen: its parameters take no gradient, and its batch norms normalise by the statistics that they came
    with and leave these alone (in Lightning's own callbacks ``train_bn=True`` lets them drift towards the new data
    under weights that do not follow). Everything else of it, dropout for one, stays in its mode. What you
    had frozen stays frozen, and what was in eval mode stays in it. The run leaves both as you had set them.

    After that the backbone trains at the head's rate divided by ``head_lr_multiplier``, at every step, whatever
    ``configure_optimizers`` gives: its parameters are moved into groups of their own, or added where only trainable
    ones were passed. Learning rate schedulers see the head's rate; a rate of your own for the backbone gives way.
    Works on one device and under DDP; sharded strategies raise. Put it before callbacks that copy the module in their
    own ``setup``, such as weight averaging. A compiled classifier is swapped for one that is not.

    Args:
        attribute: The dotted name of the classifier in the module, which must make it in its ``__init__``.
        num_classes: K of a new head; None: as many as there are, with the trained weights where they fit.
        unfreeze_at_epoch: The first epoch, counted from 0, in which the backbone trains; None: never.
        head_lr_multiplier: How many times the backbone's learning rate the head's is.
        layer: Where to cut: a submodule of the classifier, its dotted name, or None: the last tensor with places.
        sample: Images (N, C, H, W), or the shape of some, to run the classifier with; None: 1 x 3 x 224 x 224.
        output_stride: 8 or 16: finer maps without new weights.
        conv_channels: Adds a 3 x 3 convolution to so many channels before the pooling; it trains with the head.
        dropout: Probability of dropout before the linear layer.

    Raises:
        ConfigurationError: If an argument is out of range; in ``setup``, if there is no such classifier, it cannot be
            adapted, or the strategy shards it; before the first batch, if no optimiser trains the head.

    Example:
        >>> from lightning_interp import GAPHeadFinetuning
        >>> callback = GAPHeadFinetuning(num_classes=37, unfreeze_at_epoch=2, head_lr_multiplier=10)
        >>> callback.state_key
        "GAPHeadFinetuning{'attribute': 'model'}"

    Reference:
        Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """

    def __init__(
        self,
        *,
        attribute: str = "model",
        num_classes: int | None = None,
        unfreeze_at_epoch: int | None = 1,
        head_lr_multiplier: float = 10.0,
        layer: str | nn.Module | None = None,
        sample: Sequence[int] | Tensor | None = None,
        output_stride: int | None = None,
        conv_channels: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(attribute, str) or not attribute:
            raise ConfigurationError(f"attribute takes the classifier's dotted name in the module, got {attribute!r}")
        if unfreeze_at_epoch is not None and not _is_count(unfreeze_at_epoch, least=0):
            raise ConfigurationError(
                f"unfreeze_at_epoch takes an epoch, counted from 0, or None, got {unfreeze_at_epoch!r}"
            )
        if (
            isinstance(head_lr_multiplier, bool)
            or not isinstance(head_lr_multiplier, (int, float))
            or not (0 < head_lr_multiplier < float("inf"))
        ):
            raise ConfigurationError(f"head_lr_multiplier takes a positive number, got {head_lr_multiplier!r}")
        self.attribute = attribute
        self.num_classes = num_classes
        self.unfreeze_at_epoch = unfreeze_at_epoch
        self.head_lr_multiplier = head_lr_multiplier
        self.layer = layer
        self.sample = _shape(sample)
        self.output_stride = output_stride
        self.conv_channels = conv_channels
        self.dropout = dropout
        self._recipe: dict[str, Any] = {}
        self._is_frozen = False
        self._parameters_frozen: list[str] = []  # by this callback, not by the user
        self._modes: dict[str, bool] = {}  # of the batch norms that this callback holds
        self._places: Places | None = None

    @property
    def state_key(self) -> str:
        """The same in every run; another one for another attribute."""
        return f"GAPHeadFinetuning{{'attribute': {self.attribute!r}}}"

    def state_dict(self) -> dict[str, Any]:
        """What the classifier was adapted with, in plain types."""
        return {"recipe": self._recipe} if self._recipe else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore: ``setup`` has adapted the classifier, and all else follows from the epoch."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Swap the classifier, before optimisers are configured and a checkpoint is restored."""
        strategy = cast(Any, trainer.strategy)
        if strategy.restore_checkpoint_after_setup:
            raise ConfigurationError(
                f"GAPHeadFinetuning works on one device and under DDP, not with {type(strategy).__name__}, which "
                "shards or wraps the parameters; choose Trainer(strategy='ddp')"
            )
        before, asked = _classifier(pl_module, self.attribute), self._asked(pl_module)
        if not _stays(before, asked):
            if hasattr(strategy.launcher, "_start_method"):
                raise ConfigurationError(
                    "GAPHeadFinetuning would swap the classifier in the started processes only, not in this one; "
                    "choose Trainer(strategy='ddp'), or make a GAPClassifier in the module's __init__"
                )
            rank_zero_info(f"GAPHeadFinetuning: {_adapt(pl_module, asked).summary}")
        self._recipe = getattr(self._classifier(pl_module), _RECIPE, asked)
        if stage != "fit":
            return
        if not any(each.requires_grad for each in self._new_parameters(pl_module)):
            _replace(pl_module, self.attribute, before)
            raise ConfigurationError(
                "the classifier keeps its own head, which has nothing to train (it is frozen, or has no parameters); "
                "pass num_classes for a new head"
            )
        self.freeze_before_training(pl_module)

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the backbone, unless it trains from the start."""
        self._is_frozen = self.unfreeze_at_epoch != 0
        if self._is_frozen:
            for name, parameter in self._backbone(pl_module).named_parameters():
                if parameter.requires_grad:
                    self._parameters_frozen.append(name)
                    parameter.requires_grad_(False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the backbone parameter groups of its own; a checkpoint's optimiser states are restored after this."""
        if not isinstance(unwrap_compiled(_classifier(pl_module, self.attribute)), GAPClassifier):
            raise ConfigurationError(
                f"{type(pl_module).__name__} made another {self.attribute!r} in its setup() or configure_model(), "
                "after GAPHeadFinetuning had adapted it; make the classifier in __init__"
            )
        if self.unfreeze_at_epoch is not None:
            self._places = self._set_apart(trainer, pl_module)
            self._set_rates(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on in the middle of an epoch starts none."""
        self._unfreeze_if_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze the backbone where it is time; show the rates that will be used."""
        self._unfreeze_if_due(trainer, pl_module)
        self._set_rates(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hold the frozen batch norms, whatever else called ``train()``; show the rates that will be used."""
        if self._is_frozen:
            for name, norm in _norms(self._backbone(pl_module)):
                self._modes.setdefault(name, norm.training)
                norm.training = False
        self._set_rates(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Schedulers, warm-ups and the user have set the head's rate; the backbone's follows."""
        self._set_rates(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave modes and ``requires_grad`` as the user set them."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An interrupted run has no ``teardown``."""
        self._release(pl_module)

    @staticmethod
    def load_from_checkpoint(
        module_class: type[Module], path: Any, *, map_location: Any = None, **init_kwargs: Any
    ) -> Module:
        """Bring back a module that this callback had adapted when it was saved.

        Args:
            module_class: The LightningModule's class, whose ``__init__`` makes the classifier as it was before.
            path: The checkpoint, saved with ``save_weights_only=False``, as Lightning does by default.
            map_location: Where the tensors go, as in ``torch.load``.
            **init_kwargs: As for Lightning's own ``load_from_checkpoint``: arguments of ``module_class`` that are not
                among its saved hyperparameters, and ``weights_only`` and the like.

        Returns:
            The module with its weights, in eval mode.

        Raises:
            ConfigurationError: If the checkpoint was saved without this callback's state.

        Example:
            >>> from lightning_interp import GAPHeadFinetuning
            >>> module = GAPHeadFinetuning.load_from_checkpoint(MyModule, "last.ckpt")  # doctest: +SKIP
        """

        def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
            for recipe in _recipes(checkpoint, module_class.__name__):
                if not _stays(_classifier(self, recipe["attribute"]), recipe):
                    _stir(_classifier(self, recipe["attribute"]))
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # the new head is about to get its trained weights
                        _adapt(self, recipe)
            cast(Any, module_class).on_load_checkpoint(self, checkpoint)

        # Lightning calls this hook of the module that it made, right before it loads the weights.
        adapting: Any = type(module_class.__name__, (module_class,), {"on_load_checkpoint": on_load_checkpoint})
        module = adapting.load_from_checkpoint(path, map_location=map_location, **init_kwargs)
        module.__class__ = module_class
        return cast(Module, module.eval())

    def _asked(self, pl_module: LightningModule) -> dict[str, Any]:
        classifier = _classifier(pl_module, self.attribute)
        if isinstance(self.layer, nn.Module):
            adapted = isinstance(unwrap_compiled(classifier), GAPClassifier)
            self.layer = None if adapted else layer_name(unwrap_compiled(classifier), self.layer)
        names = ("attribute", "num_classes", "layer", "sample", "output_stride", "conv_channels", "dropout")
        return {name: getattr(self, name) for name in names}

    def _classifier(self, pl_module: nn.Module) -> GAPClassifier:
        return cast(GAPClassifier, unwrap_compiled(_classifier(pl_module, self.attribute)))

    def _backbone(self, pl_module: nn.Module) -> nn.Module:
        """All that was there before."""
        classifier = self._classifier(pl_module)
        if _has_convolution(classifier, self._recipe["conv_channels"]):
            return cast(nn.Sequential, classifier.features)[0]
        return classifier.features

    def _new_parameters(self, pl_module: nn.Module) -> list[nn.Parameter]:
        old = {id(each) for each in self._backbone(pl_module).parameters()}
        return [each for each in self._classifier(pl_module).parameters() if id(each) not in old]

    def _unfreeze_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        at = self.unfreeze_at_epoch
        if not self._is_frozen or at is None or trainer.current_epoch < at:
            return
        self._thaw(pl_module)
        strategy = cast(Any, trainer.strategy)
        if isinstance(strategy.model, DistributedDataParallel):
            # It reduces the gradients of those parameters only that took one when it was made.
            wrapper: Any = strategy.model
            wrapper._remove_autograd_hooks()
            strategy.model = wrapper.module
            strategy.configure_ddp()
        rank_zero_info(f"GAPHeadFinetuning: the backbone trains from epoch {trainer.current_epoch} on")

    def _thaw(self, pl_module: nn.Module) -> None:
        backbone = self._backbone(pl_module)
        parameters, norms = dict(backbone.named_parameters()), dict(_norms(backbone))
        for name in self._parameters_frozen:
            parameters[name].requires_grad_(True)
        for name, mode in self._modes.items():
            norms[name].training = mode
        self._parameters_frozen.clear()
        self._modes.clear()
        self._is_frozen = False

    def _release(self, pl_module: nn.Module) -> None:
        self._places = None
        if self._is_frozen and isinstance(self._classifier(pl_module), GAPClassifier):
            self._thaw(pl_module)
        self._is_frozen = False

    def _set_apart(self, trainer: Trainer, pl_module: nn.Module) -> Places:
        backbone = dict(self._backbone(pl_module).named_parameters())
        frozen = set(self._parameters_frozen)
        trainable = [each for name, each in backbone.items() if each.requires_grad or name in frozen]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        names = {id(each): name for name, each in pl_module.named_parameters()}
        optimizers = list(trainer.optimizers)
        head = find_head(optimizers, self._new_parameters(pl_module))
        backbone_ids = {id(each) for each in backbone.values()}
        for optimizer in optimizers:
            split_groups(optimizer, backbone_ids, schedulers)
        known = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
        missing = [each for each in trainable if id(each) not in known]
        if missing:
            add_group(optimizers[head[0]], head[1], missing, [names[id(each)] for each in missing], schedulers)
        places = Places(head, tuple(where(optimizers, backbone_ids)))
        for number, group in places.backbone:
            if isinstance(optimizers[number], LBFGS):
                raise ConfigurationError(
                    "LBFGS has one learning rate for all parameters; take another optimiser, or unfreeze_at_epoch=None"
                )
            if number == head[0]:
                follow(optimizers[number], head[1], group, self.head_lr_multiplier, schedulers)
        return places

    def _set_rates(self, trainer: Trainer) -> None:
        if self._places is None:
            return
        optimizer, group = self._places.head
        rate = trainer.optimizers[optimizer].param_groups[group]["lr"] / self.head_lr_multiplier
        for optimizer, group in self._places.backbone:
            set_rate(trainer.optimizers[optimizer].param_groups[group], rate)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _shape(sample: Sequence[int] | Tensor | None) -> list[int] | None:
    if sample is None:
        return None
    shape = sample.shape if isinstance(sample, Tensor) else sample
    if not isinstance(shape, Sequence) or len(shape) != 4 or not all(_is_count(each, least=1) for each in shape):
        raise ConfigurationError(
            f"sample takes images (N, C, H, W) or their shape, four positive integers, got {describe(sample)}"
        )
    return [int(each) for each in shape]


def _classifier(module: nn.Module, attribute: str) -> nn.Module:
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if isinstance(found, nn.Module):
        return found
    names = [name for name, _ in module.named_modules() if name]
    near = difflib.get_close_matches(attribute, names, n=3) or names[:8]
    came = "is missing" if found is None else f"is {describe(found)}"
    hint = f"it has {' and '.join(map(repr, near))}. " if near else ""
    raise ConfigurationError(
        f"GAPHeadFinetuning adapts the classifier {type(module).__name__}.{attribute}, a module, but it {came} after "
        f"__init__; {hint}Pass attribute=, the classifier's name; and where setup() or configure_model() makes it, "
        "make it in __init__: Lightning calls these after the callbacks' setup"
    )


def _stays(classifier: nn.Module, asked: Mapping[str, Any]) -> bool:
    """Whether this is adapted already, as it was asked."""
    classifier = unwrap_compiled(classifier)
    if not isinstance(classifier, GAPClassifier):
        return False
    channels, classes = asked["conv_channels"], asked["num_classes"]
    if channels is not None and not _has_convolution(classifier, channels):
        return False
    # A head without weights keeps the old classes' maps: whoever asks for classes wants a new one.
    return classes is None or classes == getattr(classifier.head, "out_features", None)


def _has_convolution(classifier: GAPClassifier, channels: int | None) -> bool:
    """Whether the features end in the convolution that ``conv_channels`` adds."""
    features = classifier.features
    if channels is None or not isinstance(features, nn.Sequential) or len(features) != 3:
        return False
    return isinstance(features[1], nn.Conv2d) and features[1].out_channels == channels


def _images(classifier: nn.Module, shape: list[int]) -> Tensor:
    like = next((each for each in classifier.parameters() if each.is_floating_point()), torch.zeros(()))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _adapt(module: nn.Module, recipe: Mapping[str, Any]) -> GAPClassifier:
    """Put an adapted classifier in the place of the one that is there."""
    before = _classifier(module, recipe["attribute"])
    options = {name: value for name, value in recipe.items() if name not in ("attribute", "sample")}
    sample = None if recipe["sample"] is None else _images(before, recipe["sample"])
    adapted = GAPClassifier.from_classifier(before, sample=sample, **options)
    # Adapted for the second time, to other classes: from the plain classifier both together lead here.
    earlier = getattr(unwrap_compiled(before), _RECIPE, {})
    later = {name: value for name, value in recipe.items() if value is not None or name not in earlier}
    setattr(adapted, _RECIPE, {**earlier, **later})
    _replace(module, recipe["attribute"], adapted)
    return adapted


def _replace(module: nn.Module, attribute: str, classifier: nn.Module) -> None:
    parent, _, name = attribute.rpartition(".")
    setattr(module.get_submodule(parent), name, classifier)


def _recipes(checkpoint: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    states = (checkpoint.get("callbacks") or {}).items()
    found = [state["recipe"] for key, state in states if str(key).startswith("GAPHeadFinetuning{")]
    if found:
        return found
    raise ConfigurationError(
        f"the checkpoint has no state of GAPHeadFinetuning: where its {kind} was not adapted by the callback, load it "
        f"with {kind}.load_from_checkpoint; one that was adapted must be saved with save_weights_only=False"
    )


@torch.no_grad()
def _stir(classifier: nn.Module) -> None:
    """Fill what an untrained classifier has at zero: one whose logits are all zero does not show what its head is."""
    generator = torch.Generator().manual_seed(0)
    for parameter in classifier.parameters():
        if parameter.is_floating_point() and not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _norms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norms that keep running statistics, whoever wrote them."""
    for name, each in module.named_modules():
        if isinstance(getattr(each, "running_mean", None), Tensor):
            yield name, each
