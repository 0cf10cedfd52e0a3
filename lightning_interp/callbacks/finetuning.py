"""Fine-tuning of any classifier as one with exact class activation maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lightning_interp.callbacks._lightning import BaseFinetuning, LightningModule, Trainer, rank_zero_info
from lightning_interp.callbacks.gap_recipes import (
    adapt_classifier,
    fill_zero_parameters,
    get_classifier,
    has_added_convolution,
    is_adapted,
    read_recipes,
    recipe_of,
)
from lightning_interp.callbacks.parameter_groups import (
    GroupIndices,
    add_group,
    find_groups,
    find_head_group,
    follow_head,
    set_rate,
    split_groups,
)
from lightning_interp.checks import check_integer, check_number, is_integer
from lightning_interp.errors import ConfigurationError, describe
from lightning_interp.localize import GAPClassifier
from lightning_interp.model.locate import layer_name, unwrap_compiled

__all__ = ["GAPHeadFinetuning"]

Module = TypeVar("Module", bound=nn.Module)


class GAPHeadFinetuning(BaseFinetuning):
    """Replace a module's classifier by a :class:`GAPClassifier`, train its head, and later the backbone too.

    The classifier is replaced in ``setup``, for fitting, validating, testing and predicting: before the optimisers are
    configured and before a checkpoint is restored. A classifier that is adapted already is kept. Until
    ``unfreeze_at_epoch`` the backbone is frozen: its parameters require no gradient, and its batch norms normalise with
    their running statistics and do not update these (in Lightning's callbacks ``train_bn=True`` updates them for the
    new data, to which the frozen weights do not adapt). All other modules of the backbone, such as dropout, keep their
    mode. Parameters that the user froze stay frozen, and modules that the user set to eval mode stay in it. After the
    run both are as the user set them.

    From that epoch on the backbone trains at the head's learning rate divided by ``head_lr_multiplier``, at every step,
    whatever ``configure_optimizers`` returns: its parameters are moved into parameter groups that hold nothing else, or
    added where only trainable ones were passed. Learning rate schedulers control the head's rate; a rate that the user
    set for the backbone is overridden. Works on one device and under DDP; sharded strategies raise. Put it before
    callbacks that copy the module in their ``setup``, such as weight averaging. A compiled classifier is replaced by
    one that is not compiled.

    Args:
        attribute: The dotted name of the classifier in the module, which must create it in its ``__init__``.
        num_classes: K of a new head; None: the classifier's classes, with its weights where possible.
        unfreeze_at_epoch: The first epoch, counted from 0, in which the backbone trains; None: never.
        head_lr_multiplier: The ratio of the head's learning rate to the backbone's.
        layer: The layer whose output becomes the features: a submodule of the classifier, its dotted name, or None for
            the last spatial features.
        sample: Images (N, C, H, W), or their shape, to run the classifier with; None: 1 x 3 x 224 x 224.
        output_stride: 8 or 16: maps of higher resolution without new weights.
        conv_channels: Adds a 3 x 3 convolution with this number of output channels before the pooling; it trains with
            the head.
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
        if unfreeze_at_epoch is not None:
            check_integer("unfreeze_at_epoch", unfreeze_at_epoch, minimum=0)
        check_number("head_lr_multiplier", head_lr_multiplier, "a positive number", lambda x: 0 < x < float("inf"))
        self.attribute = attribute
        self.num_classes = num_classes
        self.unfreeze_at_epoch = unfreeze_at_epoch
        self.head_lr_multiplier = head_lr_multiplier
        self.layer = layer
        self.sample = _sample_shape(sample)
        self.output_stride = output_stride
        self.conv_channels = conv_channels
        self.dropout = dropout
        self._recipe: dict[str, Any] = {}
        self._is_frozen = False
        self._frozen_parameters: list[str] = []  # by this callback, not by the user
        self._norm_modes: dict[str, bool] = {}  # of the batch norms that this callback set to eval mode
        self._groups: GroupIndices | None = None

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, which depends on the attribute alone."""
        return f"GAPHeadFinetuning{{'attribute': {self.attribute!r}}}"

    def state_dict(self) -> dict[str, Any]:
        """Return the options with which the classifier was adapted, in plain types."""
        return {"recipe": self._recipe} if self._recipe else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing: ``setup`` has adapted the classifier, and everything else depends on the epoch alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the classifier, before optimisers are configured and a checkpoint is restored."""
        strategy = cast(Any, trainer.strategy)
        if strategy.restore_checkpoint_after_setup:
            raise ConfigurationError(
                f"GAPHeadFinetuning works on one device and under DDP, not with {type(strategy).__name__}, which "
                "shards or wraps the parameters; choose Trainer(strategy='ddp')"
            )
        classifier, recipe = get_classifier(pl_module, self.attribute), self._requested_recipe(pl_module)
        if not is_adapted(classifier, recipe):
            if hasattr(strategy.launcher, "_start_method"):
                raise ConfigurationError(
                    "GAPHeadFinetuning would replace the classifier in the started processes only, not in this one; "
                    "choose Trainer(strategy='ddp'), or make a GAPClassifier in the module's __init__"
                )
            rank_zero_info(f"GAPHeadFinetuning: {adapt_classifier(pl_module, recipe).summary}")
        self._recipe = recipe_of(self._classifier(pl_module), recipe)
        if stage != "fit":
            return
        if not any(parameter.requires_grad for parameter in self._head_parameters(pl_module)):
            pl_module.set_submodule(self.attribute, classifier)
            raise ConfigurationError(
                "the classifier keeps its head, which has nothing to train (it is frozen, or has no parameters); "
                "pass num_classes for a new head"
            )
        self.freeze_before_training(pl_module)

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the backbone, unless it trains from the first epoch on."""
        self._is_frozen = self.unfreeze_at_epoch != 0
        if self._is_frozen:
            for name, parameter in self._backbone(pl_module).named_parameters():
                if parameter.requires_grad:
                    self._frozen_parameters.append(name)
                    parameter.requires_grad_(False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Separate the backbone's parameter groups; a checkpoint's optimiser states are restored after this."""
        if not isinstance(unwrap_compiled(get_classifier(pl_module, self.attribute)), GAPClassifier):
            raise ConfigurationError(
                f"{type(pl_module).__name__} made another {self.attribute!r} in its setup() or configure_model(), "
                "after GAPHeadFinetuning had adapted it; make the classifier in __init__"
            )
        if self.unfreeze_at_epoch is not None:
            self._groups = self._separate_groups(trainer, pl_module)
            self._set_rates(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze the backbone in a run that resumes within an epoch, which has no ``on_train_epoch_start``."""
        self._unfreeze_if_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze the backbone if due; set its rates for callbacks that log them."""
        self._unfreeze_if_due(trainer, pl_module)
        self._set_rates(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the frozen batch norms to eval mode, since the module may call ``train()``; set the backbone's rates."""
        if self._is_frozen:
            for name, norm in _norms(self._backbone(pl_module)):
                self._norm_modes.setdefault(name, norm.training)
                norm.training = False
        self._set_rates(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Set the backbone's rates, after schedulers, warm-up and the user have set the head's."""
        self._set_rates(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore modes and ``requires_grad`` as the user set them."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore them after an interrupted run, which has no ``teardown``."""
        self._restore(pl_module)

    @staticmethod
    def load_from_checkpoint(
        module_class: type[Module], path: Any, *, map_location: Any = None, **init_kwargs: Any
    ) -> Module:
        """Load a module that this callback had adapted before it was saved.

        Args:
            module_class: The LightningModule's class, whose ``__init__`` creates the classifier without adaptation.
            path: The checkpoint, saved with ``save_weights_only=False``, as Lightning does by default.
            map_location: The device for the tensors, as in ``torch.load``.
            **init_kwargs: As for Lightning's ``load_from_checkpoint``: arguments of ``module_class`` that are not
                among its saved hyperparameters, and options such as ``weights_only``.

        Returns:
            The module with its weights, in eval mode.

        Raises:
            ConfigurationError: If the checkpoint was saved without this callback's state.

        Example:
            >>> from lightning_interp import GAPHeadFinetuning
            >>> module = GAPHeadFinetuning.load_from_checkpoint(MyModule, "last.ckpt")  # doctest: +SKIP
        """

        def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
            for recipe in read_recipes(checkpoint, module_class.__name__):
                classifier = get_classifier(self, recipe["attribute"])
                if not is_adapted(classifier, recipe):
                    fill_zero_parameters(classifier)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # the new head's trained weights are loaded next
                        adapt_classifier(self, recipe)
            cast(Any, module_class).on_load_checkpoint(self, checkpoint)

        # Lightning calls this hook of the module that it created, right before it loads the weights.
        adapting: Any = type(module_class.__name__, (module_class,), {"on_load_checkpoint": on_load_checkpoint})
        module = adapting.load_from_checkpoint(path, map_location=map_location, **init_kwargs)
        module.__class__ = module_class
        return cast(Module, module.eval())

    def _requested_recipe(self, pl_module: LightningModule) -> dict[str, Any]:
        classifier = unwrap_compiled(get_classifier(pl_module, self.attribute))
        if isinstance(self.layer, nn.Module):
            self.layer = None if isinstance(classifier, GAPClassifier) else layer_name(classifier, self.layer)
        names = ("attribute", "num_classes", "layer", "sample", "output_stride", "conv_channels", "dropout")
        return {name: getattr(self, name) for name in names}

    def _classifier(self, pl_module: nn.Module) -> GAPClassifier:
        return cast(GAPClassifier, unwrap_compiled(get_classifier(pl_module, self.attribute)))

    def _backbone(self, pl_module: nn.Module) -> nn.Module:
        """The original classifier's layers."""
        classifier = self._classifier(pl_module)
        if has_added_convolution(classifier, self._recipe["conv_channels"]):
            return cast(nn.Sequential, classifier.features)[0]
        return classifier.features

    def _head_parameters(self, pl_module: nn.Module) -> list[nn.Parameter]:
        """The parameters of the head and of the added convolution."""
        backbone = {id(parameter) for parameter in self._backbone(pl_module).parameters()}
        return [parameter for parameter in self._classifier(pl_module).parameters() if id(parameter) not in backbone]

    def _unfreeze_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = self.unfreeze_at_epoch
        if not self._is_frozen or epoch is None or trainer.current_epoch < epoch:
            return
        self._unfreeze(pl_module)
        strategy = cast(Any, trainer.strategy)
        if isinstance(strategy.model, DistributedDataParallel):
            # It reduces the gradients of the parameters only that required one when it was created.
            wrapper: Any = strategy.model
            wrapper._remove_autograd_hooks()
            strategy.model = wrapper.module
            strategy.configure_ddp()
        rank_zero_info(f"GAPHeadFinetuning: the backbone trains from epoch {trainer.current_epoch} on")

    def _unfreeze(self, pl_module: nn.Module) -> None:
        backbone = self._backbone(pl_module)
        parameters, norms = dict(backbone.named_parameters()), dict(_norms(backbone))
        for name in self._frozen_parameters:
            parameters[name].requires_grad_(True)
        for name, mode in self._norm_modes.items():
            norms[name].training = mode
        self._frozen_parameters.clear()
        self._norm_modes.clear()
        self._is_frozen = False

    def _restore(self, pl_module: nn.Module) -> None:
        self._groups = None
        if self._is_frozen and isinstance(self._classifier(pl_module), GAPClassifier):
            self._unfreeze(pl_module)
        self._is_frozen = False

    def _separate_groups(self, trainer: Trainer, pl_module: nn.Module) -> GroupIndices:
        """Move the backbone's parameters into parameter groups that hold nothing else."""
        backbone = dict(self._backbone(pl_module).named_parameters())
        frozen = set(self._frozen_parameters)
        trainable = [parameter for name, parameter in backbone.items() if parameter.requires_grad or name in frozen]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        optimizers = list(trainer.optimizers)
        head = find_head_group(optimizers, self._head_parameters(pl_module))
        backbone_ids = {id(parameter) for parameter in backbone.values()}
        for optimizer in optimizers:
            split_groups(optimizer, backbone_ids, schedulers)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        optimized = {id(parameter) for group in groups for parameter in group["params"]}
        missing = [parameter for parameter in trainable if id(parameter) not in optimized]
        if missing:
            names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
            missing_names = [names[id(parameter)] for parameter in missing]
            add_group(optimizers[head[0]], head[1], missing, missing_names, schedulers)
        indices = GroupIndices(head, tuple(find_groups(optimizers, backbone_ids)))
        for optimizer_index, group_index in indices.backbone:
            if isinstance(optimizers[optimizer_index], LBFGS):
                raise ConfigurationError(
                    "LBFGS has one learning rate for all parameters; take another optimiser, or unfreeze_at_epoch=None"
                )
            if optimizer_index == head[0]:
                follow_head(optimizers[optimizer_index], head[1], group_index, self.head_lr_multiplier, schedulers)
        return indices

    def _set_rates(self, trainer: Trainer) -> None:
        if self._groups is None:
            return
        optimizer, group = self._groups.head
        rate = trainer.optimizers[optimizer].param_groups[group]["lr"] / self.head_lr_multiplier
        for optimizer, group in self._groups.backbone:
            set_rate(trainer.optimizers[optimizer].param_groups[group], rate)


def _sample_shape(sample: Sequence[int] | Tensor | None) -> list[int] | None:
    if sample is None:
        return None
    shape = sample.shape if isinstance(sample, Tensor) else sample
    is_shape = isinstance(shape, Sequence) and len(shape) == 4
    if not is_shape or not all(is_integer(length) and length >= 1 for length in shape):
        raise ConfigurationError(
            f"sample takes images (N, C, H, W) or their shape, four positive integers, got {describe(sample)}"
        )
    return [int(length) for length in shape]


def _norms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Norms with running statistics, of any class."""
    for name, submodule in module.named_modules():
        if isinstance(getattr(submodule, "running_mean", None), Tensor):
            yield name, submodule
