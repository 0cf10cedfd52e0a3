"""Attribution methods as pure functions ``(model, images, targets, *, ...) -> maps``."""

from lightning_interp.checks import check_choice
from lightning_interp.explain._explainer import FAMILIES, Explainer, Family, explainer
from lightning_interp.explain.activation_maps import cam, gradcam, gradcam_plus_plus, hirescam, layercam, xgradcam
from lightning_interp.explain.attention import attention_rollout
from lightning_interp.explain.gradient_free import ablationcam, eigencam, scorecam
from lightning_interp.explain.input_gradients import (
    input_x_gradient,
    integrated_gradients,
    saliency,
    smoothgrad,
    vargrad,
)
from lightning_interp.explain.maps import normalize_maps, resize_maps
from lightning_interp.explain.modified_relu import deconvnet, guided_backprop, guided_gradcam
from lightning_interp.explain.perturbation import occlusion, rise

__all__ = [
    "Explainer",
    "ablationcam",
    "attention_rollout",
    "cam",
    "deconvnet",
    "eigencam",
    "explainer",
    "explainers",
    "gradcam",
    "gradcam_plus_plus",
    "guided_backprop",
    "guided_gradcam",
    "hirescam",
    "input_x_gradient",
    "integrated_gradients",
    "layercam",
    "normalize_maps",
    "occlusion",
    "resize_maps",
    "rise",
    "saliency",
    "scorecam",
    "smoothgrad",
    "vargrad",
    "xgradcam",
]


def explainers(family: Family | None = None) -> dict[str, Explainer]:
    """Return the explainers that this package exports, by name and in order of definition.

    Args:
        family: Only those of one family: ``"class_activation"``, ``"gradients"``, ``"perturbation"`` or
            ``"attention"``; None: all.

    Raises:
        ConfigurationError: If there is no such family.

    Example:
        >>> list(explainers("perturbation"))
        ['occlusion', 'rise']
    """
    if family is not None:
        check_choice("family", family, FAMILIES)
    exported = [value for name in __all__ if isinstance(value := globals()[name], Explainer)]
    return {
        method.name: method
        for method in sorted(exported, key=lambda method: method.definition_index)
        if family in (None, method.family)
    }
