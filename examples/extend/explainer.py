"""An explainer: a class activation map whose channels count by the sign of their gradient alone.

python examples/extend/explainer.py
"""

import torch
from torch import Tensor
from training import train

from lightning_interp import CAMMonitor
from lightning_interp.explain import explainer
from lightning_interp.model.hooks import HookPoint
from lightning_interp.model.trace import Trace


@explainer(family="class_activation", layer="gradients")
def signcam(trace: Trace, layer: HookPoint) -> Tensor:
    """Activations, added where their channel raises the score and subtracted where it lowers it."""
    activations, gradients = trace.activations(layer).float(), trace.gradients(layer).float()
    return torch.einsum("nc,nchw->nhw", gradients.mean((2, 3)).sign(), activations)


if __name__ == "__main__":
    trainer = train([CAMMonitor(method=signcam, probe=6)])
    module, images = trainer.lightning_module, torch.rand(2, 3, 24, 24)
    print(f"cam/signcam was written to {trainer.log_dir}; without Lightning: {tuple(signcam(module, images).shape)}")
