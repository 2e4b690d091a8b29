"""What a module is made of, to prove that a change was undone."""

from __future__ import annotations

from typing import Any

from torch import nn


class Identity:
    """A thing that equals only itself, kept alive so that its id is not given away."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.thing is other.thing

    def __repr__(self) -> str:
        return repr(self.thing)


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything a module is, under every name: the object, its class, its attributes and what is in its dicts."""

    def contents(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value), [(key, Identity(inner)) for key, inner in value.items()]
        return Identity(value)

    return {
        name: (Identity(module), type(module), {key: contents(value) for key, value in vars(module).items()})
        for name, module in model.named_modules(remove_duplicate=False)
    }
