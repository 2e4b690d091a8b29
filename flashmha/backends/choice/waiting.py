"""What is lost while a kernel is not compiled, against the seconds that compiling takes.

A short problem does not wait for a compiler: it goes to the next backend, and each such call loses a little. Once the
calls that one kernel would have served have lost more than the kernel costs, the next one waits for it. How long a
process runs is not known; this way it loses at most twice what the best choice in hindsight would have. All of it is
arithmetic on estimates: nothing here looks at a device, and nothing is timed but compilers.
"""

from __future__ import annotations

import os

from ...host.torch_state import asks_deterministic
from ...problem.spec import AttentionSpec
from .ranking import keys, work

SPEED, STREAM = 5e14, 3e12
"""Operations and bytes a second of a fused kernel on an H200, half precision."""
TRAINING = 3.5
"""A forward with its backward, in forwards."""
GAIN = 0.3
"""The part of its time that a call loses with the next backend; on an H200 61 us become 84, or 120 with cuDNN, at 512
tokens, and 16 become 20 or 22 at 128."""

VARIABLE = "FLASHMHA_FIRST_CHOICE"
"""Set to anything but 0: a problem stays with the backend it was given first."""


def loss(spec: AttentionSpec) -> float:
    """The seconds that a call of a problem loses without its kernel: a part of what its operations or bytes take."""
    rows = spec.heads * spec.seqlen_q + spec.heads_kv * keys(spec)
    moved = 2.0 * spec.batch * rows * spec.head_dim * spec.dtype.itemsize
    seconds = max(work(spec) / SPEED, moved / STREAM)
    return GAIN * seconds * (TRAINING if spec.needs_grad else 1.0)


def keeps() -> bool:
    """Problems stay with their first choice: torch is to be deterministic, or the variable says so."""
    return asks_deterministic() or os.environ.get(VARIABLE, "0") not in ("", "0")
