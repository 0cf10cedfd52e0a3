"""Where does it look: pure functions ``(model, images, targets, *, ...) -> maps``."""

from lightning_interp.explain._explainer import Explainer
from lightning_interp.explain.activation_maps import cam, gradcam
from lightning_interp.explain.input_gradients import saliency, smoothgrad

__all__ = ["Explainer", "cam", "gradcam", "saliency", "smoothgrad"]
