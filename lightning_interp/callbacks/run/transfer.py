"""Copies of tensors to the CPU while training goes on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """A copy on the CPU that the training thread starts and the writer's thread waits for.

    From a GPU the tensor is copied into pinned memory without blocking the training thread; an event marks the end of
    the copy. A tensor on the CPU is handed over as it is.

    Args:
        tensor: Any tensor that is not changed in place any more.

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
        return HostCopy, (self.wait(),)  # another rank gets the finished copy

    def wait(self) -> Tensor:
        """Return the copy, once it is finished."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor
