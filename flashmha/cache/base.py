"""``Cache``: the keys and values of one self-attention layer, row by row, and the verbs that change them."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host.torch_state import insist, readable
from ..problem.cached import Pages, Positions
from ..problem.masks import Mask
from ..problem.ragged import KeyLengths, mark_private
from ..problem.sizes import check_sizes
from ..problem.wording import dtype_name, spell
from .checks import COUNT_DTYPES, MOST_TOKENS, check_chosen, refuse_gradients, row_numbers
from .rows import Rows


class Moved(NamedTuple):
    """Tokens at ``source`` (batch, tokens) go to ``target``, and rows are then of ``lengths`` (batch,)."""

    source: Tensor
    target: Tensor
    lengths: Tensor


class Cache(Rows):
    """Keys and values of one layer, written in place, so that each token is projected once.

    A row holds its own number of tokens, which stand at positions 0, 1, ...: padding takes no place, so that a row is
    as it would be alone. Lengths are a tensor on the device, so that neither a compiled step nor a CUDA graph is bound
    to one. Verbs are named as those of transformers' cache layers.

    Heads are (batch, seqlen, heads_kv, head_dim) throughout.

    Attributes:
        lengths: (batch,) int32, tokens that each row holds.
    """

    lengths: Tensor
    max_seqlen: int | None
    """Tokens that a row has room for, ``None`` without an end."""

    @property
    @abc.abstractmethod
    def store(self) -> tuple[Tensor, Tensor]:
        """The tensors that keys and values lie in, (..., heads_kv, head_dim)."""

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """Slots of a row."""

    @abc.abstractmethod
    def write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Put neighbouring tokens where ``positions`` (batch, seqlen) belong."""

    @abc.abstractmethod
    def take(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens at ``positions`` (batch, seqlen)."""

    @abc.abstractmethod
    def read(self, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots, (batch, slots, heads_kv, head_dim)."""

    @abc.abstractmethod
    def check_room(self, seqlen: int, held: list[int] | None) -> None:
        """Raise where so many tokens have no place behind those ``held``; where that is ``None`` the device may."""

    def check_end(self, seqlen: int, held: list[int]) -> None:
        """Raise where rows would be longer than they may."""
        longest = max(held) + seqlen
        if self.max_seqlen is not None and longest > self.max_seqlen:
            raise ValueError(
                f"max_seqlen must be at least {longest} for {seqlen} tokens behind {max(held)}, got {self.max_seqlen}: "
                f"make a longer {type(self).__name__}, or crop or reset it."
            )

    def reserve(self, seqlen: int) -> None:
        """Make sure of room for ``seqlen`` tokens more, ahead of steps that see no lengths; waits for the device.

        Raises:
            ValueError: rows become longer than ``max_seqlen``, or there are too few pages. Nothing is booked.
        """
        check_sizes(0, seqlen=seqlen)
        held = self.lengths.tolist()
        self.check_end(seqlen, held)
        self.make_room(seqlen, held)

    def make_room(self, seqlen: int, held: list[int]) -> None:
        """Book what so many tokens behind those ``held`` need, where memory is not there from the start."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes of device memory it holds."""

    def get_seq_length(self) -> Tensor:
        """The tokens that each row holds, (batch,) int32: the cache's own tensor, which the next call changes."""
        return self.lengths

    def positions(self, seqlen: int, real: Tensor | None = None) -> Tensor:
        """Where the next tokens will stand, (batch, seqlen).

        Args:
            real: (batch, seqlen) bool, which of them are no padding. Padding stands where the token before it does.
        """
        if real is None:
            return self.lengths[:, None] + torch.arange(seqlen, dtype=torch.int32, device=self.lengths.device)
        return self.lengths[:, None] + real.cumsum(1, dtype=torch.int32) - 1

    def slots(self) -> Tensor | None:
        """The position of each slot's token, (batch, slots), -1 for none; ``None`` where slot j is for position j."""
        return None

    def pages(self) -> Pages | None:
        """In which pages of ``store`` the slots of each row lie; ``None`` where it holds rows."""
        return None

    def rule(self) -> Mask:
        """Which slots hold a token, after ``update``."""
        return mark_private(KeyLengths(self.lengths.clone()))

    def placed(self, positions: Tensor, slots: int, padded: bool) -> Positions:
        """Where queries at ``positions`` and the first slots stand, for rules that count."""
        places = self.slots()
        return Positions(positions, None if places is None else places[:, :slots], at_end=not padded)

    def held(self) -> list[int] | None:
        """The tokens that each row holds as numbers; ``None`` where looking would wait for a device or end a graph."""
        return self.lengths.tolist() if readable(self.lengths) else None

    def update(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Write the heads of new tokens behind those of each row; keys and values of all slots.

        Args:
            k, v: (batch, seqlen, heads_kv, head_dim).
            real: (batch, seqlen) bool: which tokens are no padding. ``None`` for all.

        Raises:
            ValueError: they are not such heads, want gradients, or have no room. The cache is as it was.
        """
        self.append(k, v, real)
        return self.read(self.capacity)

    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> list[int] | None:
        """``update`` without a look at what is there; the tokens that each row holds then, as ``held`` says."""
        self.check(k, v, real)
        seqlen, held = k.shape[1], self.held()
        self.check_room(seqlen, held)
        if real is None:
            self.put(k, v, held)
            self.lengths.add_(seqlen)
            return None if held is None else [count + seqlen for count in held]
        order = first_real(real)[:, :, None, None]
        k, v = (x.gather(1, order.expand(-1, -1, *x.shape[2:])) for x in (k, v))
        self.put(k, v, held)
        self.lengths.add_(real.sum(dim=1, dtype=torch.int32))
        return self.held()

    def put(self, k: Tensor, v: Tensor, held: list[int] | None) -> None:
        """Write new tokens behind those of each row, which are ``held`` where that is known."""
        self.write(k, v, self.positions(k.shape[1]).long())

    def check(self, k: Tensor, v: Tensor, real: Tensor | None) -> None:
        """Raise where heads are not those of this cache."""
        for name, x, held in (("k", k, self.store[0]), ("v", v, self.store[1])):
            if not isinstance(x, Tensor) or x.shape != (self.batch, *k.shape[1:2], *held.shape[-2:]):
                raise ValueError(
                    f"{name} must be (batch={self.batch}, seqlen, heads_kv={held.shape[-2]}, head_dim="
                    f"{held.shape[-1]}) in this {type(self).__name__}, got {spell(x)}."
                )
            if x.dtype != held.dtype or x.device != held.device:
                raise ValueError(
                    f"{name} must be {dtype_name(held.dtype)} on {held.device}, as this {type(self).__name__} was "
                    f"made, got {dtype_name(x.dtype)} on {x.device}: make the cache with dtype= and device= of the "
                    "heads."
                )
        refuse_gradients(k, v)
        if real is not None and not (
            isinstance(real, Tensor) and real.shape == k.shape[:2] and real.dtype == torch.bool
        ):
            raise ValueError(f"real must be bool (batch, seqlen) = {tuple(k.shape[:2])}, got {spell(real)}.")

    def crop(self, length: int | Tensor) -> None:
        """Keep the first ``length`` tokens of each row, forget what is behind them, as a speculation that failed.

        Args:
            length: a number, or one for each row, (batch,); negative for as many tokens less than there are. A row of
                fewer tokens stays as it is.
        """
        self.lengths.copy_(self.cropped(length))

    def cropped(self, length: int | Tensor) -> Tensor:
        """The lengths after ``crop``, which change nothing yet."""
        if isinstance(length, Tensor):
            if length.shape != (self.batch,) or length.dtype not in COUNT_DTYPES:
                raise ValueError(f"length must be an int or integers (batch,) = ({self.batch},), got {spell(length)}.")
            wanted = length.clamp(-MOST_TOKENS, MOST_TOKENS).to(self.lengths)
        elif isinstance(length, int) and not isinstance(length, bool):
            wanted = torch.full_like(self.lengths, max(-MOST_TOKENS, min(length, MOST_TOKENS)))
        else:
            raise TypeError(f"length must be an int or integers (batch,), got {spell(length)}.")
        wanted = torch.where(wanted < 0, self.lengths + wanted, wanted)
        return torch.minimum(self.lengths, wanted.clamp(min=0))

    def keep(self, length: int | Tensor, chosen: Tensor) -> None:
        """Of the tokens behind ``length``, as in ``crop``, keep the chosen ones: the path of a tree of guesses.

        Args:
            chosen: (batch, tokens) integers, places counted from ``length``, in order; -1 at the end for none. They
                then follow one another.

        Raises:
            ValueError: other places than those of tokens; on a GPU an error of the device, which is not waited for.
        """
        self.move(self.kept(length, chosen))

    def kept(self, length: int | Tensor, chosen: Tensor) -> Moved:
        """Where the tokens of ``keep`` go; nothing changes yet."""
        left = self.cropped(length)[:, None]
        check_chosen(chosen, self.batch)
        guesses, real = self.lengths[:, None] - left, chosen >= 0
        behind = torch.cat([real[:, :1], real[:, :-1] & (chosen[:, 1:] > chosen[:, :-1])], dim=1)
        insist(
            ~real | ((chosen < guesses) & behind),
            lambda: (
                f"chosen must be places of the {guesses[:, 0].tolist()} tokens, in order, and -1 behind them, got "
                f"{chosen.tolist()}."
            ),
        )
        # where there is none, a row's last token is put where it is
        last = (self.lengths[:, None] - 1).clamp(min=0).long()
        places = left + torch.arange(chosen.shape[1], device=left.device)
        lengths = left[:, 0] + real.sum(dim=1, dtype=torch.int32)
        return Moved(torch.where(real, left + chosen, last), torch.where(real, places, last), lengths)

    def move(self, moved: Moved) -> None:
        """Put tokens where they go."""
        self.write(*self.take(moved.source), moved.target)
        self.lengths.copy_(moved.lengths)

    def by_row(self) -> list[Tensor]:
        return [*self.store, self.lengths]

    def release(self, rows: Iterable[int]) -> None:
        """Forget the tokens of rows that are done, whose memory holds zeros again; pages go back to their pool.

        Raises:
            ValueError: rows that are not there, or no numbers. Nothing is forgotten.
        """
        where = torch.tensor(row_numbers(rows, self.batch), device=self.lengths.device, dtype=torch.int64)
        for tensor in self.by_row():
            tensor.index_fill_(0, where, 0)

    def reset(self) -> None:
        """Forget every token; the memory stays, and holds zeros again."""
        for tensor in self.by_row():
            tensor.zero_()

    def state(self) -> Any:
        """What ``restore`` needs to undo an ``update`` behind which the call failed."""
        return self.lengths.clone()

    def restore(self, state: Any) -> None:
        """Go back to a state; what was written since lies behind the lengths."""
        self.lengths.copy_(state)

    def __repr__(self) -> str:
        heads, size = self.store[0].shape[-2:]
        kind = dtype_name(self.store[0].dtype)
        return f"{type(self).__name__}(batch={self.batch}, heads_kv={heads}, head_dim={size}, {kind})"


def first_real(real: Tensor) -> Tensor:
    """The order of tokens (batch, seqlen) in which the real ones of a row come first."""
    return real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
