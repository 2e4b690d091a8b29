"""The benchmark: speed, memory and error of flashmha beside its peers, decided within one run.

``python -m flashmha bench`` computes every case with every contestant. What is wrong is not timed; the others take
turns in rounds, each in a new order, and a ratio is formed within a round. A twin of our own contestant says how much
of a difference is noise. ``Plan`` and ``run`` do the same from Python.
"""

from .cases import Case, select
from .runner import Plan, run
from .suites import SUITES, every_case

__all__ = ["SUITES", "Case", "Plan", "every_case", "run", "select"]
