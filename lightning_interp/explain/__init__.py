"""Where does it look: pure functions ``(model, images, targets, *, ...) -> maps``."""

from lightning_interp.explain._explainer import Explainer
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
from lightning_interp.explain.modified_relu import deconvnet, guided_backprop, guided_gradcam
from lightning_interp.explain.perturbation import occlusion, rise

__all__ = [
    "Explainer",
    "ablationcam",
    "attention_rollout",
    "cam",
    "deconvnet",
    "eigencam",
    "gradcam",
    "gradcam_plus_plus",
    "guided_backprop",
    "guided_gradcam",
    "hirescam",
    "input_x_gradient",
    "integrated_gradients",
    "layercam",
    "occlusion",
    "rise",
    "saliency",
    "scorecam",
    "smoothgrad",
    "vargrad",
    "xgradcam",
]
