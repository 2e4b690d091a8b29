"""Models to draw: encoders, transformers and trees of layers, and what a model is made of.

A failure of ``models`` prints a line that builds the same model again after
``from flashmha.testing.models import *; import torch``.
"""

from ...host.public import publish as _publish
from ...host.torch_state import without_fast_path
from .anatomy import anatomy
from .encoder import Architecture, EncoderMasks, architectures, encoder_masks
from .transformer import Transformer, models, transformers
from .tree import Leaf, ModuleGroup, Tree, trees

__all__ = [
    "Architecture",
    "EncoderMasks",
    "Leaf",
    "ModuleGroup",
    "Transformer",
    "Tree",
    "anatomy",
    "architectures",
    "encoder_masks",
    "models",
    "transformers",
    "trees",
    "without_fast_path",
]

_publish(__name__, [globals()[name] for name in __all__])
