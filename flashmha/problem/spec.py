"""AttentionSpec: one attention problem without its tensors.

Backends judge it, property tests draw it, errors print it. It holds the mask's and the scores' own tensors (lengths,
slopes, sinks) but never q, k or v, so that every limit of a GPU kernel can be tested on a laptop.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..host.torch_state import (
    are_ordinary,
    asks_deterministic,
    is_compiling,
    is_deterministic,
    needs_aten,
)
from .cached import Pages, without_pages
from .documents import Documents
from .fields import Fields, freeze_features
from .masks import Mask, find_rule
from .ragged import KeyLengths, KeyPadding
from .scores import Bias
from .tensors import check_entries, check_tensors, refuse_device
from .windows import Window


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSpec(Fields):
    """One attention problem: sizes, dtype, device, mask, scores, and what the answer must have.

    ``mask`` is normalised (see ``windows.normalize``); ``softmax_scale`` is always a number. ``aten_only`` is set
    where PyTorch needs its own operators: while exporting, under torch.func, for tensor subclasses. ``shared`` is set
    where later calls get the same object, so that what is found out about it may be remembered. So is a ``form``,
    which problems share that differ in the tensors of their padding or documents alone.
    """

    shared: bool = dataclasses.field(init=False, repr=False, default=False)
    form: AttentionSpec | None = dataclasses.field(init=False, repr=False, default=None)

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | None = None,
        bias: Bias | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        softmax_scale: float | None = None,
        dropout_p: float = 0.0,
        need_lse: bool = False,
        deterministic: bool | None = None,
    ) -> AttentionSpec:
        """The problem of these tensors; all validation happens here, once.

        A problem without tensors of its own is made once and shared by later calls with the same; one whose
        padding or documents are all it holds is made of the last with such a mask.

        Shapes: q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_kv, head_dim),
        v (batch, seqlen_k, heads_kv, head_dim_v); beside ``Pages`` k and v are pools. ``deterministic=None`` follows
        torch, see ``is_deterministic``.
        """
        dtype, device = q.dtype, q.device
        key: tuple[Any, ...] | None = None
        rule = type(mask)
        if bias is None and sinks is None and (mask is None or rule in REMADE) and are_ordinary(q, k, v):
            grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            if deterministic is None:
                deterministic = asks_deterministic() and is_deterministic()  # the second takes a step in Python
            # fmt: off
            key = (
                q.shape, k.shape, v.shape, dtype, k.dtype, v.dtype, device, k.device, v.device,
                grad, softcap, softmax_scale, dropout_p, need_lse, deterministic, rule,
                mask.sizes if rule is Documents or rule is Window else None,  # type: ignore[union-attr]
            )
            # fmt: on
            try:
                known = reuse(key, mask)
            except TypeError:  # what has no hash is no number, and is refused below
                key = known = None
            if known is not None:
                return known
        pages = None if mask is None else find_rule(mask, Pages)
        check_tensors(q, k, v, None if pages is None else pages.page_size)
        batch, seqlen_q, heads, head_dim = q.shape
        _, seqlen_k, heads_kv, head_dim_v = v.shape
        for name, holder in () if mask is None and bias is None else (("mask", mask), ("bias", bias)):
            if holder is not None and any(tensor.device != device for tensor in holder.tensors()):
                refuse_device(name, holder, holder.tensors(), device)
        if pages is not None:
            check_entries(pages.block_table, k.shape[0])
            seqlen_k = pages.seqlen_k
        if sinks is not None and isinstance(sinks, Tensor) and sinks.device != device:
            raise ValueError(f"sinks must be on the device of q, {device}, got {sinks.device}.")
        needs_grad = torch.is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (bias is not None and any(tensor.requires_grad for tensor in bias.tensors()))
            or (sinks is not None and sinks.requires_grad)
        )
        if deterministic is None:
            deterministic = is_deterministic()
        fields: dict[str, Any] = {
            "batch": batch,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "heads": heads,
            "heads_kv": heads_kv,
            "head_dim": head_dim,
            "head_dim_v": head_dim_v,
            "dtype": dtype,
            "device": device,
            "mask": mask,
            "bias": bias,
            "softcap": softcap,
            "sinks": sinks,
            "softmax_scale": softmax_scale,
            "dropout_p": dropout_p,
            "needs_grad": needs_grad,
            "need_lse": need_lse,
            "deterministic": deterministic,
            "aten_only": needs_aten(q, k, v),
        }
        return cls(**fields) if is_compiling() else cls.share(key, fields)

    @classmethod
    def between(
        cls,
        sizes: tuple[int, int, int],
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        needs_grad: bool,
        mask: Mask | None = None,
        dropout_p: float = 0.0,
    ) -> AttentionSpec:
        """The problem of heads before they are projected: ordinary tensors, v like k; as ``of`` would say of them.

        For (batch, seqlen_q, seqlen_k), dtypes and a mask that were checked, outside compilers and transforms.
        """
        deterministic = asks_deterministic() and is_deterministic()
        bare = (sizes, heads, head_dim, dtype, device, needs_grad, dropout_p, deterministic)
        key: tuple[Any, ...] | None = bare
        if mask is not None:
            rule = type(mask)
            of_mask = mask.sizes if rule is Documents or rule is Window else None  # type: ignore[attr-defined]
            key = (*bare, rule, of_mask) if rule in REMADE else None
        known = None if key is None else shared.get(key)
        if known is not None:
            return known if mask is None or known.shared else known.over(mask)
        batch, seqlen_q, seqlen_k = sizes
        fields = {
            "batch": batch,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "heads": heads,
            "heads_kv": heads,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "dtype": dtype,
            "device": device,
            "mask": mask,
            "dropout_p": dropout_p,
            "needs_grad": needs_grad,
            "deterministic": deterministic,
        }
        return cls.share(key, fields)

    @classmethod
    def share(cls, key: tuple[Any, ...] | None, fields: dict[str, Any]) -> AttentionSpec:
        """A problem of these fields, shared under a key where it may be."""
        spec: AttentionSpec = object.__new__(cls)  # as the class does, without a call for each field
        spec.__dict__.update(fields)
        spec.settle()
        if key is not None:
            if len(shared) >= SHARED:
                shared.clear()
            mask = fields["mask"]
            if mask is None or type(mask) is Window:
                shared[key] = spec
                spec.__dict__["shared"] = True
            elif spec.mask is mask:
                shared[key] = spec.take_form()
        return spec

    def take_form(self) -> AttentionSpec:
        """The form of a problem whose mask is padding or documents: all but its tensors, for ``over`` to fill in."""
        return self.changed(mask=None)

    def over(self, mask: Mask) -> AttentionSpec:
        """The problem of this form over a mask of its kind, not checked again."""
        twin: AttentionSpec = object.__new__(AttentionSpec)
        twin.__dict__.update(self.__dict__, mask=mask, form=self)
        return twin

    def changed(self, **fields: Any) -> AttentionSpec:
        """The same problem with other values in some fields, not checked again."""
        twin: AttentionSpec = object.__new__(AttentionSpec)
        usual = self.usual_scale and fields.keys().isdisjoint(("softmax_scale", "head_dim"))
        twin.__dict__.update(self.__dict__ | {"shared": False, "form": None, "usual_scale": usual} | fields)
        return twin

    def in_rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, AttentionSpec]:
        """Keys and values that lie in pages, copied into rows, and the problem that they make."""
        pages = self.pages
        if pages is None:
            return k, v, self
        assert self.mask is not None
        mask = without_pages(self.mask)
        if is_compiling():  # Dynamo 2.8 cannot trace ``changed``
            fields = {name: getattr(self, name) for name in GIVEN}
            fields["mask"] = mask
            return pages.read(k), pages.read(v), AttentionSpec(**fields)
        needs = freeze_features([name for name in self.needs if name != "pages"])
        return pages.read(k), pages.read(v), self.changed(mask=mask, needs=needs)

    def with_lse(self) -> AttentionSpec:
        """The same problem, with the log-sum-exp too, as numbers that no gradient passes."""
        return self.changed(need_lse=True, needs=freeze_features([*self.needs, "lse"]))


GIVEN = tuple(field.name for field in dataclasses.fields(AttentionSpec) if field.init)
"""The fields that a problem is made of."""
REMADE = (Window, KeyPadding, KeyLengths, Documents)
"""Masks whose problem is made of the last with such a mask; a window has no tensors, so that one problem is enough."""


SHARED = 1024
"""How many problems are kept."""
shared: dict[tuple[Any, ...], AttentionSpec] = {}
"""Problems by what makes them: one is found again in a quarter of the time that making it takes."""


def reuse(key: tuple[Any, ...], mask: Mask | None) -> AttentionSpec | None:
    """A problem that was made before: itself, or its form over another mask of the kind."""
    known = shared.get(key)
    if known is None or known.shared or mask is None:
        return known
    for tensor in mask.tensors():  # a generator would take two steps more
        if tensor.device != known.device:
            refuse_device("mask", mask, mask.tensors(), known.device)
    mask.check(known.batch, known.heads, known.seqlen_q, known.seqlen_k)
    return known.over(mask)
