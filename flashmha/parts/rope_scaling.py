"""Rotary frequencies, and how each kind of scaling changes them, read from a dict in transformers' form.

A pair of features turns by ``position * inv_freq``. Unscaled, ``inv_freq = 1 / base ** (arange(0, dim, 2) / dim)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem.sizes import check_sizes, is_size
from ..problem.wording import spell


class Frequencies(NamedTuple):
    """How fast each pair of features turns, for calls of every length.

    Attributes:
        inv_freq: (dim / 2,), float32 on a CPU; of short calls where calls differ.
        base: of the unscaled frequencies.
        attention_factor: what cos and sin are multiplied by.
        original: the length up to which a call is short; 0 where calls do not differ.
        long: ``inv_freq`` of longer calls under LongRoPE.
        factor: of dynamic scaling, by which longer calls are scaled.
    """

    inv_freq: Tensor
    base: float
    attention_factor: float = 1.0
    original: int = 0
    long: Tensor | None = None
    factor: float | None = None


class Told(NamedTuple):
    """What ``rope_parameters`` and the other arguments say."""

    dim: int
    base: float
    given: Mapping[str, Any]
    max_seqlen: int | None

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number among ``rope_parameters``."""
        value = self.given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"rope_parameters[{name!r}] must be a positive number, got {spell(value)}.")
        return value

    def length(self) -> int:
        """The length that a model was trained for, by default ``max_seqlen``."""
        value = self.given.get(LENGTH, self.max_seqlen)
        if value is None:
            raise ValueError(
                f"rope_parameters must have {LENGTH!r} for {self.kind!r}, or max_seqlen be given, got neither."
            )
        if not is_size(value, 2):
            raise ValueError(f"rope_parameters[{LENGTH!r}] must be a whole number of at least 2, got {spell(value)}.")
        return int(value)

    def growth(self) -> float:
        """The factor of the kinds that have it out of two lengths where it is not given."""
        if "factor" in self.given:
            return self.number("factor")
        if self.max_seqlen is None:
            raise ValueError(
                f"rope_parameters must have 'factor' for {self.kind!r}, or max_seqlen be given, got neither."
            )
        return self.max_seqlen / self.length()

    @property
    def kind(self) -> str:
        kind: str = self.given["rope_type"]
        return kind


def periods(dim: int, base: float | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The tokens in which each pair turns by 1, unscaled: (dim / 2,), float32.

    Frequencies are made of them by transformers' operators in its order: a rounding more would be an angle at position
    100,000.
    """
    made: Tensor = base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    return made


def unscaled(told: Told) -> Frequencies:
    return Frequencies(1.0 / periods(told.dim, told.base), told.base)


def linear(told: Told) -> Frequencies:
    """Positions divided by a factor."""
    return Frequencies(1.0 / periods(told.dim, told.base) / told.number("factor"), told.base)


def exponent(dim: int) -> float:
    """The power of a factor that a base is multiplied by, so that the slowest pair is slowed by the factor itself."""
    if dim <= 2:
        raise ValueError(f"dim must exceed 2 for NTK scaling, got {dim}.")
    return dim / (dim - 2)


def ntk(told: Told) -> Frequencies:
    """A larger base: fast pairs turn as they did, slow ones are slowed by the factor."""
    base = told.base * told.number("factor") ** exponent(told.dim)
    return Frequencies(1.0 / periods(told.dim, base), base)


def dynamic(told: Told) -> Frequencies:
    """A base that grows with the length of the call (``rescale``)."""
    exponent(told.dim)
    original = told.length() if told.max_seqlen is None else told.max_seqlen
    return Frequencies(1.0 / periods(told.dim, told.base), told.base, 1.0, original, factor=told.number("factor"))


def yarn(told: Told) -> Frequencies:
    """Slow pairs slowed by a factor, fast ones left, a ramp between; cos and sin a little larger (arXiv:2309.00071)."""
    factor, original = told.growth(), told.length()
    truncate = told.given.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"rope_parameters['truncate'] must be True or False, got {spell(truncate)}.")

    def find_pair(turns: float) -> float:
        """The pair that turns so often over the original length, as a fraction."""
        return told.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(told.base))

    low, high = find_pair(told.number("beta_fast", 32)), find_pair(told.number("beta_slow", 1))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, told.dim - 1)
    high += 0.001 if low == high else 0.0
    slowed = ((torch.arange(told.dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    kept, plain = 1 - slowed, periods(told.dim, told.base)
    inv_freq = 1.0 / (factor * plain) * (1 - kept) + 1.0 / plain * kept
    if "attention_factor" in told.given:
        return Frequencies(inv_freq, told.base, told.number("attention_factor"))

    def magnify(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if told.given.get("mscale") and told.given.get("mscale_all_dim"):
        attention_factor = magnify(told.number("mscale")) / magnify(told.number("mscale_all_dim"))
    else:
        attention_factor = magnify(1.0)
    return Frequencies(inv_freq, told.base, attention_factor)


def llama3(told: Told) -> Frequencies:
    """Waves longer than the original length slowed by a factor, short ones left, a ramp between."""
    inv_freq, factor, original = 1.0 / periods(told.dim, told.base), told.number("factor"), told.length()
    low, high = told.number("low_freq_factor"), told.number("high_freq_factor")
    if high <= low:
        raise ValueError(f"rope_parameters['high_freq_factor'] must exceed 'low_freq_factor', got {high} and {low}.")
    waves = 2 * math.pi / inv_freq
    kept = (original / waves - low) / (high - low)
    between = (1 - kept) * inv_freq / factor + kept * inv_freq
    scaled = torch.where(waves > original / low, inv_freq / factor, between)
    return Frequencies(torch.where(waves < original / high, inv_freq, scaled), told.base)


def longrope(told: Told) -> Frequencies:
    """A factor for each pair, one list for short calls and one for long ones (arXiv:2402.13753)."""
    original, plain = told.length(), periods(told.dim, told.base)
    short, long = (divide(told, name) for name in ("short_factor", "long_factor"))
    if "attention_factor" in told.given:
        attention_factor = told.number("attention_factor")
    else:
        factor = told.growth()
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Frequencies(1.0 / (short * plain), told.base, attention_factor, original, long=1.0 / (long * plain))


def divide(told: Told, name: str) -> Tensor:
    """The list of factors under a name."""
    listed = told.given[name]
    if not isinstance(listed, (list, tuple)) or len(listed) != told.dim // 2:
        raise ValueError(
            f"rope_parameters[{name!r}] must be a list of dim / 2 = {told.dim // 2} numbers, got {spell(listed)}."
        )
    factors = [told._replace(given={name: one}).number(name) for one in listed]
    return torch.tensor(factors, dtype=torch.float32, device="cpu")


class RopeType(NamedTuple):
    """A kind of scaling, and the keys it must and may have."""

    read: Callable[[Told], Frequencies]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


LENGTH = "original_max_position_embeddings"
ROPE_TYPES = {
    "default": RopeType(unscaled),
    "linear": RopeType(linear, ("factor",)),
    "ntk": RopeType(ntk, ("factor",)),
    "dynamic": RopeType(dynamic, ("factor",), (LENGTH,)),
    "yarn": RopeType(
        yarn,
        optional=(
            "factor",
            LENGTH,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": RopeType(llama3, ("factor", "low_freq_factor", "high_freq_factor"), (LENGTH,)),
    "longrope": RopeType(longrope, ("short_factor", "long_factor"), ("factor", LENGTH, "attention_factor")),
}
"""The kinds that transformers has, by ``rope_type``, and ``ntk``, which keeps its factor at every length."""
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
"""Keys that every kind may have; ``type`` is the older name of ``rope_type``."""
DEFAULT_BASE = 10000.0


def read_rope(
    head_dim: int, dim: int | None, base: float, rope_parameters: Mapping[str, Any] | None, max_seqlen: int | None
) -> tuple[int, Frequencies]:
    """How many features are rotated, and how fast; ``ValueError`` for what is unknown or contradicts itself."""
    if rope_parameters is not None and not isinstance(rope_parameters, Mapping):
        raise ValueError(f"rope_parameters must be a dict, got {spell(rope_parameters)}.")
    given = {name: value for name, value in (rope_parameters or {}).items() if value is not None}
    inner = [name for name, value in given.items() if isinstance(value, Mapping)]
    if inner:
        raise ValueError(
            f"rope_parameters must be the dict of one kind of layer, got one for each of {', '.join(map(str, inner))}: "
            f"pass rope_parameters[{inner[0]!r}] to the Rotary of those layers."
        )
    kind = given.setdefault("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}.")
    known = (*COMMON, *ROPE_TYPES[kind].required, *ROPE_TYPES[kind].optional)
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"rope_parameters of {kind!r} must have no other keys than {', '.join(known)}, got {', '.join(unknown)}."
        )
    missing = [name for name in ROPE_TYPES[kind].required if name not in given]
    if missing:
        raise ValueError(f"rope_parameters of {kind!r} must have {', '.join(missing)}, got {', '.join(given)}.")
    if max_seqlen is not None:
        check_sizes(max_seqlen=max_seqlen)
    base = read_base(base, given)
    dim = read_dim(head_dim, dim, given)
    return dim, ROPE_TYPES[kind].read(Told(dim, base, given, max_seqlen))


def read_base(base: float, given: Mapping[str, Any]) -> float:
    theta = given.get("rope_theta", base)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 1 < theta < math.inf:
        raise ValueError(f"base must be a number above 1, got {spell(theta)}.")
    if base not in (DEFAULT_BASE, theta):
        raise ValueError(
            f"base must be rope_theta where rope_parameters has one, got {base} and {theta}: leave base out."
        )
    return float(theta)


def read_dim(head_dim: int, dim: int | None, given: Mapping[str, Any]) -> int:
    part = given.get("partial_rotary_factor", 1.0)
    if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise ValueError(f"rope_parameters['partial_rotary_factor'] must lie above 0 and at most 1, got {spell(part)}.")
    found = int(head_dim * part)
    if dim is not None and "partial_rotary_factor" in given and dim != found:
        raise ValueError(f"dim must be head_dim * partial_rotary_factor = {found}, got {dim}: leave dim out.")
    dim = found if dim is None else dim
    if not is_size(dim) or dim % 2 or dim > head_dim:
        raise ValueError(f"dim must be even, at least 2 and at most head_dim = {head_dim}, got {spell(dim)}.")
    return dim


def rescale(frequencies: Frequencies, length: Tensor, inv_freq: Tensor, long: Tensor | None) -> Tensor:
    """The frequencies of a call, given its length and those of short and long calls, without a look at the length."""
    if long is not None:
        return torch.where(length > frequencies.original, long, inv_freq)
    assert frequencies.factor is not None
    dim, beyond = 2 * inv_freq.shape[0], length.clamp(min=frequencies.original) / frequencies.original
    growth = (frequencies.factor * beyond - (frequencies.factor - 1)) ** exponent(dim)
    return 1.0 / periods(dim, frequencies.base * growth, inv_freq.device)
