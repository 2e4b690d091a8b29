"""The fields of a problem, checked, and what they say: its features, its mask and its bias."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..host.torch_state import (
    is_compiling,
    is_dense,
)
from .cached import OwnTokens, Pages, Positions
from .documents import Documents
from .masks import Dense, Mask, find_rule
from .positions import Restarts, check_range
from .ragged import PADDING_CLASSES, KeyLengths, KeyPadding, Padding, mark_private
from .scores import BIAS_DTYPES, Bias, TensorBias
from .windows import Window, normalize
from .wording import dtype_name, spell

DEFAULT_DEVICE = torch.device("cpu")
NUMBER = (int, float, torch.SymFloat, Tensor)


@dataclasses.dataclass(frozen=True, eq=False)
class Fields:
    """The fields of ``AttentionSpec``, and its questions."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype = torch.float32
    device: torch.device = DEFAULT_DEVICE
    mask: Mask | None = None
    bias: Bias | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    softmax_scale: float | None = None
    dropout_p: float = 0.0
    needs_grad: bool = False
    need_lse: bool = False
    deterministic: bool = False
    aten_only: bool = False
    needs: frozenset[str] | tuple[str, ...] = dataclasses.field(init=False, repr=False)
    usual_scale: bool = dataclasses.field(init=False, repr=False, default=False)
    """No scale was given, and the default is what functions of PyTorch's own take: it need not be said."""

    def __post_init__(self) -> None:
        if not is_compiling():
            self.check_kinds()
        self.settle()

    def check_kinds(self) -> None:
        """Raise where a field is no such thing; ``of``, which takes them from tensors, need not ask."""
        for name in ("batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "head_dim_v"):
            size = getattr(self, name)
            if not isinstance(size, (int, torch.SymInt)) or (type(size) is int and size < 0):
                raise ValueError(f"{name} must be a whole number of at least 0, got {size!r}.")
        kinds: tuple[tuple[str, type, bool], ...] = (
            ("dtype", torch.dtype, False),
            ("device", torch.device, False),
            ("mask", Mask, True),
            ("bias", Bias, True),
            ("sinks", Tensor, True),
        )
        for name, kind, optional in kinds:
            value = getattr(self, name)
            if not isinstance(value, kind) and not (optional and value is None):
                raise TypeError(f"{name} must be a {kind.__name__}{' or None' * optional}, got {value!r}.")

    def settle(self) -> None:
        """Check that the fields make one problem, and fill in what follows from them."""
        self.check()
        fill = object.__setattr__
        if self.softmax_scale is None:
            fill(self, "softmax_scale", max(self.head_dim, 1) ** -0.5)
            fill(self, "usual_scale", self.head_dim > 0)
        if self.mask is not None:
            self.mask.check(self.batch, self.heads, self.seqlen_q, self.seqlen_k)
            fill(self, "mask", normalize(self.mask, self.seqlen_q, self.seqlen_k))
        if self.bias is not None:
            self.bias.check(self.batch, self.heads, self.seqlen_q, self.seqlen_k)
        fill(self, "needs", freeze_features(self.needed()))

    def check(self) -> None:
        """Raise ``ValueError`` where the numbers do not make one problem."""
        if self.heads_kv < 1 or self.heads % self.heads_kv:
            raise ValueError(
                f"heads must be a multiple of heads_kv, got heads={self.heads} and heads_kv={self.heads_kv}."
            )
        numbers = (("dropout_p", self.dropout_p), ("softcap", self.softcap), ("softmax_scale", self.softmax_scale))
        for name, number in numbers:
            if not isinstance(number, NUMBER) and (number is not None or name == "dropout_p"):
                raise TypeError(f"{name} must be a number, got {number!r}.")
        if not 0.0 <= self.dropout_p <= 1.0:
            raise ValueError(f"dropout_p must be between 0 and 1, got {self.dropout_p}.")
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be greater than 0 and finite (None for no cap), got {self.softcap}.")
        if self.softmax_scale is not None and not -math.inf < self.softmax_scale < math.inf:
            raise ValueError(f"softmax_scale must be finite, got {self.softmax_scale}.")
        sinks = self.sinks
        if sinks is None:
            return
        if not is_dense(sinks) or sinks.dtype not in BIAS_DTYPES or sinks.shape != (self.heads,):
            raise ValueError(f"sinks must have shape (heads,) = ({self.heads},), floating point, got {spell(sinks)}.")

    @property
    def features(self) -> frozenset[str]:
        """The names of what a backend must be able to do."""
        return frozenset(self.needs)

    def needed(self) -> list[str]:
        """The names of the features."""
        asked = {
            "softcap": self.softcap is not None,
            "sinks": self.sinks is not None,
            "dropout": self.dropout_p > 0.0,
            "gqa": self.heads != self.heads_kv,
            "head_dim_v": self.head_dim != self.head_dim_v,
            "backward": self.needs_grad,
            "lse": self.need_lse,
            "lse_grad": self.need_lse and self.needs_grad,
            "deterministic": self.deterministic and self.needs_grad,
        }
        names = [name for name, wanted in asked.items() if wanted]
        for holder in (self.mask, self.bias):
            if holder is not None:
                names.extend(holder.features)
        return names

    @property
    def outline(self) -> tuple[Any, ...] | None:
        """A key of the problem: all that is known of it but the values of its mask's tensors, and of a ``TensorBias``.

        ``None`` where there are other tensors, and while PyTorch traces.
        """
        bias = self.bias
        if self.sinks is not None or is_compiling() or (bias is not None and type(bias) is not TensorBias):
            return None
        if not (type(self.batch) is type(self.seqlen_q) is type(self.seqlen_k) is int):  # symbols have no hash
            return None
        rules: list[Any] = []
        for part in () if self.mask is None else self.mask.parts:
            if type(part) not in (Window, Dense, Documents, KeyPadding, KeyLengths, Positions, Pages, OwnTokens):
                return None
            rules.append(type(part))
            if isinstance(part, Positions):
                rules += (part.keys is None, part.at_end)
            elif isinstance(part, Pages):
                rules.append(part.page_size)
            if isinstance(part, (Dense, OwnTokens)):
                rules.append(part.allowed.shape)
            elif isinstance(part, (Window, Documents)):
                rules += part.sizes
        if isinstance(bias, TensorBias):
            rules += (TensorBias, bias.tensor.shape, bias.tensor.dtype, "bias_grad" in self.needs)
        # fmt: off
        return (
            self.batch, self.seqlen_q, self.seqlen_k, self.heads, self.heads_kv, self.head_dim, self.head_dim_v,
            self.dtype, self.device, self.softcap, self.softmax_scale, self.dropout_p, self.needs_grad, self.need_lse,
            self.deterministic, self.aten_only, *rules,
        )

    @property
    def scale(self) -> float:
        """``softmax_scale`` as the number it always is."""
        assert self.softmax_scale is not None
        return self.softmax_scale

    @property
    def window(self) -> Window | None:
        """The mask's window in bottom-right positions."""
        return find_rule(self.mask, Window)

    @property
    def dense(self) -> Dense | None:
        """The mask's tensor for every query and key."""
        return find_rule(self.mask, Dense)

    @property
    def documents(self) -> Documents | None:
        """The mask's packed documents."""
        mask = self.mask
        if mask is None or type(mask) is Documents:
            return mask
        return find_rule(mask, Documents)

    @property
    def positions(self) -> Positions | None:
        """Where the tokens of each row stand, where the keys lie in a cache."""
        return find_rule(self.mask, Positions)

    @property
    def pages(self) -> Pages | None:
        """In which pages of a pool the keys of each row lie, where k and v are pools."""
        return find_rule(self.mask, Pages) if "pages" in self.needs else None

    @property
    def places(self) -> Restarts | None:
        """What biases are told of where tokens stand: the documents, or the positions of a cache."""
        return None if self.mask is None else self.mask.documents

    @property
    def is_padded(self) -> bool:
        """Keys of some batch items are padding."""
        return "key_padding" in self.needs or "key_lengths" in self.needs

    def padding(self) -> Padding | None:
        """The mask's padding as one rule, which keeps what is computed of it."""
        mask = self.mask
        if type(mask) in PADDING_CLASSES:
            return mask  # type: ignore[return-value]
        rules = [part for part in (() if mask is None else mask.parts) if isinstance(part, Padding)]
        if len(rules) < 2:
            return rules[0] if rules else None
        valid = self.valid_keys()
        assert valid is not None
        return mark_private(KeyPadding(valid))

    def valid_keys(self) -> Tensor | None:
        """Which keys the padding leaves, (batch, seqlen_k) bool; ``None`` without padding."""
        valid: Tensor | None = None
        for part in () if self.mask is None else self.mask.parts:
            if isinstance(part, Padding):
                table = part.real(self.seqlen_k)
                valid = table if valid is None else valid & table
        return valid

    def key_lengths(self) -> Tensor:
        """The lengths of a mask with ``KeyLengths`` as kernels take them, (batch,) int32."""
        rule = find_rule(self.mask, KeyLengths)
        assert rule is not None
        lengths = rule.lengths
        return rule.once(("lengths", self.seqlen_k), lambda: lengths.clamp(0, self.seqlen_k).int())

    def allowed(self, queries: range | None = None, keys: range | None = None) -> Tensor | None:
        """The mask as a bool tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), ``True`` = may attend.

        For a range of queries or keys it broadcasts to that, and nothing larger is made.
        """
        if self.mask is None:
            return None
        if queries is not None or keys is not None:
            check_range("queries", queries, self.seqlen_q)
            check_range("keys", keys, self.seqlen_k)
        return self.mask.materialize(
            self.batch, self.heads, self.seqlen_q, self.seqlen_k, self.device, queries=queries, keys=keys
        )

    def added(self, queries: range | None = None, keys: range | None = None) -> Tensor | None:
        """The bias as a tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), or to a range as ``allowed``."""
        if self.bias is None:
            return None
        if queries is not None or keys is not None:
            check_range("queries", queries, self.seqlen_q)
            check_range("keys", keys, self.seqlen_k)
        sizes = (self.batch, self.heads, self.seqlen_q, self.seqlen_k)
        return self.bias.materialize(*sizes, self.device, self.places, queries, keys)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"AttentionSpec({self})")  # what Hypothesis prints: one line

    def __str__(self) -> str:
        shape = (
            f"batch={self.batch} seqlen_q={self.seqlen_q} seqlen_k={self.seqlen_k} "
            f"heads={self.heads} heads_kv={self.heads_kv} head_dim={self.head_dim}"
        )
        if self.head_dim_v != self.head_dim:
            shape += f" head_dim_v={self.head_dim_v}"
        shape += f" {dtype_name(self.dtype)} on {self.device}"
        if self.mask is not None:
            shape += f", mask {self.mask!r}"
        if self.bias is not None:
            shape += f", bias {self.bias!r}"
        rest = sorted(self.features - (self.mask.features if self.mask else frozenset()))
        return shape + (f", needs {' '.join(rest)}" if rest else "")


def freeze_features(names: list[str]) -> frozenset[str] | tuple[str, ...]:
    """Features as a problem holds them: where a graph breaks, Dynamo 2.8 cannot hand on a frozenset it has traced."""
    return tuple(names) if is_compiling() else frozenset(names)
