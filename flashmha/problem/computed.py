"""Results computed of a tensor, and whether the tensor is the same since."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..host.torch_state import is_stream_capturing

Made = TypeVar("Made")


class Computed:
    """Results computed of a tensor, with what tells whether the tensor has changed since."""

    __slots__ = ("by_values", "seen", "stream", "values", "version")

    def __init__(self, held: Tensor, stream: int, private: bool, by_values: bool | None = None) -> None:
        self.values: dict[Hashable, Any] = {}
        self.stream, self.version = stream, 0
        self.by_values = tells_by_values(held) if by_values is None else by_values
        self.seen: Tensor | None = None
        if private:
            return
        if self.by_values:
            self.seen = make_plain(held.clone)
        else:  # an alias, so that no other tensor gets this address
            self.seen, self.version = held.detach(), held._version

    def fetch(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """The result of a name, which ``make`` makes where there is none yet."""
        if name not in self.values:
            self.values[name] = make()
        found: Made = self.values[name]
        return found

    def fits(self, held: Tensor) -> bool:
        """Compare the tensor with what it was."""
        seen = self.seen
        if seen is None or seen.shape != held.shape or seen.device != held.device:
            return False
        if self.by_values:
            return torch.equal(seen, held)
        return not held.is_inference() and held._version == self.version and held.data_ptr() == seen.data_ptr()


def tells_by_values(tensor: Tensor) -> bool:
    """Whether a tensor's values tell that it has changed: on a CPU, where NumPy may write, which moves no version."""
    return tensor.device.type == "cpu"


def hides_changes(tensor: Tensor) -> bool:
    """Whether nothing tells that a tensor has changed: one of inference mode has no version."""
    return tensor.is_inference() and not tells_by_values(tensor)


def stream_of(tensor: Tensor) -> tuple[int, bool]:
    """The stream that operators on a tensor join, 0 where there is one alone, and whether it is captured."""
    if not tensor.is_cuda:
        return 0, False
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()), is_stream_capturing()


def make_plain(make: Callable[[], Made]) -> Made:
    """Call ``make`` outside autograd and inference mode, so that any later call may use its tensors."""
    with torch.inference_mode(False), torch.no_grad():
        return make()
