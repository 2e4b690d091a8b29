"""Hypothesis profiles: ``default`` for every day, ``thorough`` for a long night (``HYPOTHESIS_PROFILE=thorough``)."""

import os

import torch
from hypothesis import HealthCheck, settings

slow = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("default", max_examples=50, deadline=None, suppress_health_check=slow)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))

torch.set_num_threads(1)  # drawn tensors are small: a second thread costs more than it brings


def fewer(divisor: int) -> settings:
    """The profile's number of examples divided, for laws whose examples are slow."""
    return settings(max_examples=max(1, settings().max_examples // divisor))
