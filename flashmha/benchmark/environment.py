"""The machine of a run: its description, and a canary that says how steady it is."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..host.clock import seconds
from ..host.machine import KERNEL_PACKAGES, installed_versions


class Canary:
    """Work of one size in every round, which tells whether a GPU's clock moved and what it can do; on a CPU, none.

    A product of two matrices of 8192, in bfloat16, and a copy of 1 GiB.
    """

    SIDE, BYTES = 8192, 2**30

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.square = self.source = self.target = None
        if device.type == "cuda":
            self.square = torch.randn(self.SIDE, self.SIDE, device=device, dtype=torch.bfloat16)
            self.source, self.target = (torch.empty(self.BYTES, device=device, dtype=torch.uint8) for _ in range(2))

    def sing(self) -> dict[str, float]:
        """``gemm_tflops`` and ``copy_tbs`` (bytes read and written); nothing on a CPU, where time is counted."""
        square, source, target = self.square, self.source, self.target
        if square is None or source is None or target is None:
            return {}
        product = seconds(lambda: torch.mm(square, square), 5, self.device)
        copy = seconds(lambda: target.copy_(source), 3, self.device)
        return {"gemm_tflops": 2 * self.SIDE**3 / product / 1e12, "copy_tbs": 2 * self.BYTES / copy / 1e12}


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that the numbers depend on, asked under the conditions they are measured in."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": processor(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "packages": installed_versions(("einops", "x-transformers", "torchtune", *KERNEL_PACKAGES)),
    }
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **driver(device),
        }
    return found


def driver(device: torch.device) -> dict[str, str]:
    """The driver, and what the GPU is at after a run; nothing without ``nvidia-smi``."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (text.strip() for text in ran.stdout.split(","))))


def processor() -> str:
    """The name of the CPU, and the widest vectors torch uses on it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> dict[str, Any]:
    """The git commit this package is at, and whether files differ from it; ``None`` outside a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"git": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"git": None, "dirty": None}
