"""Tensors on their way from the device to the writer, while training goes on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """A tensor that the training thread hands over and the writer's thread receives.

    From a GPU it is copied into pinned memory without the training thread waiting for it; an event says when it is
    there. On the CPU it is handed over as it is.

    Args:
        tensor: Any tensor that nothing changes in place any more.

    Example:
        >>> import torch
        >>> HostCopy(torch.ones(2)).wait()
        tensor([1., 1.])
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._tensor = tensor.cpu()

    def __reduce__(self) -> tuple[type[HostCopy], tuple[Tensor]]:
        return HostCopy, (self.wait(),)  # another rank gets what has arrived

    def wait(self) -> Tensor:
        """The tensor on the CPU, waited for where it is still on its way."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor
