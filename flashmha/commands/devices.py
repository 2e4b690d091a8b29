"""The devices of this machine, by the names that flags take."""

from __future__ import annotations

import torch


def devices() -> list[torch.device]:
    """The CPU, then every accelerator."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        found += [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    return found


def device(name: str | None = None) -> torch.device:
    """The device of a name, or the first accelerator; ``ValueError`` where this machine has no such device."""
    here = devices()
    if name is None:
        return here[1] if len(here) > 1 else here[0]
    try:
        wanted = torch.device(name)
    except RuntimeError:
        wanted = None
    for one in here:
        if wanted is not None and wanted.type == one.type and wanted.index in (None, one.index or 0):
            return one
    raise ValueError(f"device must be one of {', '.join(map(str, here))} on this machine, got {name!r}.")


def description(one: torch.device) -> str:
    """A device with what decides which kernels it has."""
    if one.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu: {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads != 1)}"
    if one.type == "cuda":
        major, minor = torch.cuda.get_device_capability(one)
        return f"{one}: {torch.cuda.get_device_name(one)}, compute capability {major}.{minor}"
    return str(one)
