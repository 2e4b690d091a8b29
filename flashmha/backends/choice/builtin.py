"""This package's own backends."""

from __future__ import annotations

from ..flash_attn.flash2 import Flash2
from ..flash_attn.flash3 import Flash3
from ..flash_attn.flash4 import Flash4
from ..flex import Flex
from ..naive import Naive
from ..sdpa.backend import Sdpa
from ..split_kv.backend import SplitKV

BUILT_IN = (Sdpa, Flash4, Flash3, Flash2, SplitKV, Flex, Naive)
"""This package's own backends, in the order of the list."""
