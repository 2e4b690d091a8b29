"""Property tests for backends, layers and models: Hypothesis strategies that draw problems, and assertions that judge.

A backend is right when it agrees with the definition in float64, within the rule of ``judge``::

    @given(testing.specs(limits=MyBackend.limits), testing.seeds())
    def test_my_backend(spec, seed):
        testing.assert_agrees(MyBackend, spec, seed)

A layer, or a model, is right when it can stand where the stock one stands::

    @given(testing.problems())
    def test_my_layer(problem):
        blueprint, call = problem
        assume(not (call.hint_alone and blueprint.extra_columns))  # differs on purpose
        stock, mine = blueprint.build(), blueprint.build(MyLayer)
        with call.mode(stock, mine):
            testing.assert_drop_in(stock, mine, kwargs=call.arguments(blueprint))

    @given(testing.models())
    def test_my_swap(model):
        with testing.without_fast_path():
            testing.assert_drop_in(model.build(), my_swap(model.build()), kwargs=model.arguments())

A failure prints a line that fails again after ``from flashmha import *; from flashmha.testing import *; import torch``;
what a model is made of is in ``flashmha.testing.models``.

Every tensor is made from a drawn seed, on torch's default device; ``device="cuda"`` puts what ``specs``, ``masks``,
``biases``, ``blueprints`` and ``models`` draw on a GPU. ``served`` draws what a backend serves on a device, of a few
kinds where each costs seconds of compiling. Whatever draws needs Hypothesis; ``assert_drop_in`` does not.
"""

from typing import Any

from ..host.extras import wanted_by
from ..host.public import publish as _publish
from .closeness import assert_close, assert_same
from .drop_in import assert_drop_in
from .dropout import assert_drops
from .judge import Answer, answer, assert_agrees
from .record import noise, randomized
from .values import coins, numbers, tensors

try:
    from .attention import specs
    from .call import Call, Reply, ask, calls, problems
    from .drawn_biases import biases
    from .drawn_masks import every, masks
    from .grid import served
    from .layer import Blueprint, blueprints
    from .models import models, without_fast_path
    from .values import seeds
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise

__all__ = [
    "Answer",
    "Blueprint",
    "Call",
    "Reply",
    "answer",
    "ask",
    "assert_agrees",
    "assert_close",
    "assert_drop_in",
    "assert_drops",
    "assert_same",
    "biases",
    "blueprints",
    "calls",
    "coins",
    "every",
    "masks",
    "models",
    "noise",
    "numbers",
    "problems",
    "randomized",
    "seeds",
    "served",
    "specs",
    "tensors",
    "without_fast_path",
]

_publish(__name__, [globals()[name] for name in __all__ if name in globals()])


def __getattr__(name: str) -> Any:
    """Name the missing package where a strategy is asked for without Hypothesis; assertions do without."""
    if name in __all__:
        with wanted_by(f"flashmha.testing.{name}"):
            import hypothesis  # noqa: F401
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
