"""The layers of other libraries that have rotary, norms of heads or grouped heads; imported where they take part."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor, nn

from .cases import Case
from .hand import make_norm
from .inputs import Inputs
from .peers import Contestant, OutAndWeights

StateDict = dict[str, Tensor]


class Library(Contestant):
    """A layer of a library with a matrix for q, k and v each, no bias, and interleaved rotary.

    Attributes:
        package: what has to be imported.
        distribution: what has to be installed.
    """

    package: str
    distribution: str

    def why_not_here(self) -> str | None:
        """The reason why it takes no part on this machine."""
        if importlib.util.find_spec(self.package) is not None:
            return None
        return f"not installed: pip install {self.distribution}"

    def refuses(self, case: Case) -> str | None:
        if case.level != self.level:
            return super().refuses(case)
        if case.bias:
            return "for projections without biases"
        if case.lengths is not None or case.weights or case.seqlen_q != case.seqlen_k or not case.batch_first:
            return "for self-attention of whole sequences, batch first"
        return None

    def matrices(self, state: StateDict, case: Case) -> list[Tensor]:
        """The projections of q and k (heads, head_dim, embed_dim), whose pairs lie together, and of v."""
        heads = (case.heads, case.heads_kv, case.heads_kv)
        rows = state["in_proj_weight"].split([each * case.head_dim for each in heads])
        q, k, v = (x.unflatten(0, (each, -1)) for x, each in zip(rows, heads))
        return [interleave(q, 1, case), interleave(k, 1, case), v]


def interleave(x: Tensor, axis: int, case: Case) -> Tensor:
    """Features i and i + head_dim / 2, which turn together, side by side."""
    return swap_axes_within(x, axis, 2) if case.rotary else x


def swap_axes_within(x: Tensor, axis: int, parts: int) -> Tensor:
    """An axis of so many equal parts, the first of each part first."""
    apart: Tensor = x.unflatten(axis, (parts, -1))
    return apart.transpose(axis, axis + 1).flatten(axis, axis + 1)


class XTransformers(Library):
    """``x_transformers.Attention`` on SDPA; its query heads share key heads in turns."""

    name, package, distribution = "x_transformers", "x_transformers", "x-transformers"

    class Module(nn.Module):
        def __init__(self, case: Case) -> None:
            super().__init__()
            library: Any = importlib.import_module("x_transformers.x_transformers")
            self.attention = library.Attention(
                case.embed_dim,
                dim_head=case.head_dim,
                heads=case.heads,
                kv_heads=case.heads_kv,
                causal=case.causal,
                flash=True,
                qk_rmsnorm=case.qk_norm is not None,
            )
            # its models compute the angles once for all layers, in float32
            self.angles = None
            if case.rotary:
                self.angles = library.RotaryEmbedding(case.head_dim).forward_from_seq_len(case.seqlen_k)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, rotary_pos_emb=self.angles)
            return out

    def refuses(self, case: Case) -> str | None:
        return super().refuses(case) or ("normalises by the mean square alone" if case.qk_norm == "layer" else None)

    def build(self, case: Case) -> nn.Module:
        return self.Module(case)

    def translate(self, state: StateDict, case: Case) -> StateDict:
        def in_turns(x: Tensor, axis: int) -> Tensor:
            return swap_axes_within(x, axis, case.heads_kv)

        q, k, v = self.matrices(state, case)
        out = in_turns(state["out_proj.weight"].unflatten(1, (case.heads, -1)), 1).flatten(1)
        own = {"to_q": in_turns(q, 0).flatten(0, 1), "to_k": k.flatten(0, 1), "to_v": v.flatten(0, 1), "to_out": out}
        named = {f"attention.{name}.weight": x for name, x in own.items()}
        if case.qk_norm is not None:
            for name, heads in (("q", case.heads), ("k", case.heads_kv)):
                scale = interleave(state[f"{name}_norm.weight"], 0, case)
                named[f"attention.{name}_rmsnorm.gamma"] = (scale - 1.0).expand(heads, 1, -1)
        return named

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        return module(inputs.query), None


class Torchtune(Library):
    """``torchtune.modules.MultiHeadAttention``."""

    name, package, distribution = "torchtune", "torchtune", "torchtune torchao"

    def refuses(self, case: Case) -> str | None:
        behind = case.rotary and case.qk_norm is not None
        return super().refuses(case) or ("normalises behind the rotation" if behind else None)

    def build(self, case: Case) -> nn.Module:
        modules = "torchtune.modules"
        attention: Any = importlib.import_module(f"{modules}.attention")
        positions: Any = importlib.import_module(f"{modules}.position_embeddings")
        norms: Any = importlib.import_module(f"{modules}.rms_norm")
        rms = case.qk_norm == "rms"
        rows = (case.heads * case.head_dim, case.heads_kv * case.head_dim)
        made: nn.Module = attention.MultiHeadAttention(
            embed_dim=case.embed_dim,
            num_heads=case.heads,
            num_kv_heads=case.heads_kv,
            head_dim=case.head_dim,
            q_proj=nn.Linear(case.embed_dim, rows[0], bias=False),
            k_proj=nn.Linear(case.embed_dim, rows[1], bias=False),
            v_proj=nn.Linear(case.embed_dim, rows[1], bias=False),
            output_proj=nn.Linear(case.embed_dim, case.embed_dim, bias=False),
            pos_embeddings=positions.RotaryPositionalEmbeddings(case.head_dim, case.seqlen_k) if case.rotary else None,
            q_norm=norms.RMSNorm(case.head_dim) if rms else make_norm(case),
            k_norm=norms.RMSNorm(case.head_dim) if rms else make_norm(case),
            max_seq_len=case.seqlen_k,
            is_causal=case.causal,
        )
        return made

    def translate(self, state: StateDict, case: Case) -> StateDict:
        own = {f"{name}_proj.weight": x.flatten(0, 1) for name, x in zip("qkv", self.matrices(state, case))}
        norms = {name: x for name, x in state.items() if "_norm." in name}
        if case.qk_norm == "rms":
            norms = {name.replace("weight", "scale"): x for name, x in norms.items()}
        return {**own, "output_proj.weight": state["out_proj.weight"], **norms}

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        return module(inputs.query, inputs.query), None
