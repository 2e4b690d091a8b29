"""Property tests for backends, layers and models: Hypothesis strategies that draw problems, and assertions that judge.

A backend is right when it agrees with the definition in float64, within the rule of ``judge``::

    @given(testing.specs(limits=MyBackend.limits), testing.seeds())
    def test_my_backend(spec, seed):
        testing.assert_agrees(MyBackend, spec, seed)

A layer, or a model, is right when it can stand where the stock one stands::

    @given(testing.problems())
    def test_my_layer(problem):
        blueprint, call = problem
        stock, mine = blueprint.build(), blueprint.build(MyLayer)
        with call.mode(stock, mine):
            testing.assert_drop_in(stock, mine, kwargs=call.arguments(blueprint))

    @given(testing.models())
    def test_my_swap(model):
        with testing.without_fast_path():
            testing.assert_drop_in(model.build(), my_swap(model.build()), kwargs=model.arguments())

A failure prints a line that fails again after ``from flashmha import *; from flashmha.testing import *; import torch``.

Every tensor is made from a drawn seed, on torch's default device; ``device="cuda"`` puts what ``specs``, ``masks``,
``biases``, ``blueprints`` and ``models`` draw on a GPU. ``served`` draws what a backend serves on a device, of a few
kinds where each costs seconds of compiling.
"""

from .anatomy import anatomy
from .attention import biases, every, masks, seeds, specs, tensors
from .call import Call, Reply, ask, calls, problems
from .drop_in import assert_drop_in
from .dropout import assert_drops
from .encoder import Architecture, EncoderMasks, architectures, encoder_masks, without_fast_path
from .judge import Answer, answer, assert_agrees, assert_close, assert_same
from .kernels import served
from .layer import Blueprint, blueprints
from .record import noise, randomized
from .transformer import Transformer, models, transformers
from .tree import Tree, trees
from .values import coins, numbers

__all__ = [
    "Answer",
    "Architecture",
    "Blueprint",
    "Call",
    "EncoderMasks",
    "Reply",
    "Transformer",
    "Tree",
    "anatomy",
    "answer",
    "architectures",
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
    "encoder_masks",
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
    "transformers",
    "trees",
    "without_fast_path",
]
