"""The environment variables that automatic choice follows: what they say must be there."""

from __future__ import annotations

from ..backends import expand
from ..backends.choice import tuned
from ..backends.choice.wishes import BACKEND_VARIABLE, read_variable


def check_variables(*devices: str, table: bool = True) -> None:
    """Raise where a variable cannot be followed: at a call it would be a surprise, here it is the first thing said.

    Args:
        devices: device types for which the tuned table, where there is one, must have been measured here.
        table: look at the tuned table at all.

    Raises:
        ValueError: a name in ``FLASHMHA_BACKEND`` is no backend's, or ``FLASHMHA_TUNED`` names no table that fits.
    """
    named = read_variable()
    if named is not None:
        expand(named, BACKEND_VARIABLE)
    for device in (*devices, "") if table else ():  # no device: the file is read and not held against this machine
        tuned.state_on(device)
