"""What was swapped and what was not, with the reason."""

from __future__ import annotations

import dataclasses

from torch import nn

from ..layer.features import find_overridden, is_ours
from ..layer.module import FlashMultiHeadAttention
from ..layer.options import find_set, spell_option
from ..layer.projection import why_unheard
from .decoder import FlashTransformerDecoder, FlashTransformerDecoderLayer
from .encoder import FlashTransformerEncoder, is_stock
from .known import find_unknown
from .modules import CLASS, UNDO, check_model, holds, walk, why_not_yet, why_own_forward, why_stock_stays


@dataclasses.dataclass(frozen=True)
class SwapRow:
    """One attention layer of a model: its name, its class, whether flashmha runs it, and why (not)."""

    name: str
    kind: str
    swapped: bool
    why: str

    def __str__(self) -> str:
        return f"{'swapped' if self.swapped else 'left   '}  {self.name or '(root)'}  {self.kind}: {self.why}"


class SwapReport(tuple[SwapRow, ...]):
    """One row for each ``nn.MultiheadAttention`` of a model, and for each encoder or decoder around them; print it."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no nn.MultiheadAttention in this model"


def swap_report(model: nn.Module) -> SwapReport:
    """List what ``replace_mha`` swapped in a model, what not, and why; before a swap, what it would leave."""
    check_model(model)
    rows = []
    for name, module, fsdp in walk(model):
        kind, undo = type(module).__name__, vars(module).get(UNDO, {})
        if isinstance(module, FlashMultiHeadAttention):
            why = "by replace_mha" if CLASS in undo else "built as one"
            more = [spell_option(module, option) for option in find_set(module)] + find_overridden(module)
            if more:
                why += f", with {', '.join(more)}"
            notes = [
                note
                for note in (why_not_yet(module), why_own_forward(module), why_silent(name, module))
                if note is not None
            ]
            rows.append(SwapRow(name, kind, True, "; ".join([why, *notes])))
        elif isinstance(module, nn.MultiheadAttention):
            why = why_stock_stays(module, fsdp) or "replace_mha would swap it"
            rows.append(SwapRow(name, kind, False, why))
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and UNDO in vars(module):
            kept = [f"{attribute} set to {getattr(module, attribute)}" for attribute in undo if attribute != CLASS]
            rows.append(
                SwapRow(name, kind, True, "; ".join(kept or ["calls self_attn in eval too", *describe_padding(module)]))
            )
        elif isinstance(module, DECODERS) and holds(module, FlashMultiHeadAttention):
            why_none = why_no_cache(module)
            rows.append(SwapRow(name, kind, why_none is None, why_none or "takes a cache"))
    return SwapReport(rows)


DECODERS = (nn.TransformerDecoder, nn.TransformerDecoderLayer)


def why_no_cache(module: nn.Module) -> str | None:
    """Say why a decoder or a layer of one, whose attention was swapped, takes no cache; ``None`` where it does."""
    if isinstance(module, (FlashTransformerDecoder, FlashTransformerDecoderLayer)):
        return None
    stock = next(kind for kind in DECODERS if isinstance(module, kind))
    if type(module) is not stock:
        return f"takes no cache: a subclass of nn.{stock.__name__}, whose own code a swap would lose"
    if not is_stock(module, stock):
        return "takes no cache: its forward is not PyTorch's"
    return "takes no cache: replace_mha did not swap all that is in it"


def describe_padding(module: nn.Module) -> list[str]:
    """Say what an encoder does about padding, as far as its own make-up says."""
    if not isinstance(module, FlashTransformerEncoder):
        return []
    why = find_unknown(module)
    return [
        "may leave padding out once for all layers" if why is None else f"each layer sees padding for itself: {why}"
    ]


def why_silent(name: str, module: FlashMultiHeadAttention) -> str | None:
    """Say what does not run at a layer's ``out_proj``, as far as it can be known.

    An adapter around the layer puts it into the weights, and a ``merge`` of the layer's own may call it.
    """
    wrapped = name.rpartition(".")[2] == "base_layer"
    return None if wrapped or not is_ours(module, "merge") else why_unheard(module)
