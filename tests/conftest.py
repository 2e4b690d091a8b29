"""Hypothesis profiles, and the device the suite runs on: ``pytest --device cuda`` is the same tests on a GPU.

Profiles: ``default`` for every day, ``thorough`` for a long night (``HYPOTHESIS_PROFILE=thorough``).

On a GPU torch makes every tensor there unless it is told otherwise. Tests about a CPU bear the marker ``cpu`` with the
reason, or stand in a file of ``CPU_FILES``, and are left out; tests that need a kernel bear the marker ``gpu``.
``--report FILE`` writes what came of the run, and on what, as JSON.
"""

import datetime
import importlib.util
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import engine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

slow = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("default", max_examples=50, deadline=None, suppress_health_check=slow)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
engine.MAX_SHRINKING_SECONDS = sys.maxsize  # a slow machine finds the same smallest example, only later
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))

torch.set_num_threads(1)  # drawn tensors are small: a second thread costs more than it brings

CPU_FILES = {
    "test_autocast": "pretends a GPU",
    "test_benchmark": "times layers on a CPU",
    "test_benchmark_heads": "times layers on a CPU",
    "test_commands": "asks about the devices by name",
    "test_docs": "runs the pages, which choose their device",
    "test_ddp": "runs processes on gloo",
    "test_detection": "pretends a GPU",
    "test_errors": "errors raised before any kernel",
    "test_examples": "runs the examples, which choose their device",
    "test_flex": "pretends a GPU",
    "test_kinds": "errors raised before any kernel",
    "test_hidden": "compiles a kernel an example on a GPU; the kit draws such biases there",
    "test_package": "reads files",
    "test_ranking": "judges problems without tensors",
    "test_registry": "the list, which no device changes",
    "test_spec": "judges problems without tensors",
    "test_testing": "judges the kit by backends with seeded bugs",
}
"""Files whose laws have no numbers of a device, and what they have instead; ``pytest --device cpu`` runs them."""
PACKAGES = ("flash-attn", "flash_attn_3", "fa3-fwd", "flash-attn-4", "triton", "hypothesis", "pytest")


def fewer(divisor: int) -> settings:
    """The profile's number of examples divided, for laws whose examples are slow."""
    return settings(max_examples=max(1, settings().max_examples // divisor))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where tensors live, default cpu")
    parser.addoption("--report", type=Path, metavar="FILE", help="write counts, versions and the GPU's name as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu(reason): a law about a CPU, which pytest --device cpu runs")
    config.addinivalue_line("markers", "gpu: needs a kernel of a GPU, which pytest --device cuda has")
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device must be cpu on this machine: torch.cuda.is_available() is False")
        # not set_default_device, a mode of Python's: under a mode torch's encoders leave their fast path
        torch.set_default_tensor_type(torch.cuda.FloatTensor)
    if config.getoption("--report") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(config.getoption("--report")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest --device cuda"))
        return
    left_out = [item for item in items if item.get_closest_marker("cpu") or item.path.stem in CPU_FILES]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device the suite runs on."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="module")
def machine(device: torch.device) -> torch.device:
    """A device that runs kernels of Triton: a GPU, or a CPU where ``TRITON_INTERPRET=1`` interprets them."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton: pip install triton")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU (pytest --device cuda), or TRITON_INTERPRET=1")
    return device


@pytest.fixture
def every_map_is_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention weights are deferred, also small ones, which are ordinary tensors otherwise."""
    monkeypatch.setattr("flashmha.weights.attend.FEW_SCORES", 0)


class Report:
    """What came of a run and on what, as a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        stats = terminalreporter.stats
        reasons: dict[str, int] = {}
        for skipped in stats.get("skipped", ()):
            reason = skipped.longrepr[2].removeprefix("Skipped: ") if skipped.longrepr else ""
            reasons[reason] = reasons.get(reason, 0) + 1
        device = config.getoption("--device")
        found = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "profile": settings.get_current_profile_name(),
            "passed": len(stats.get("passed", ())),
            "failed": sorted({report.nodeid for word in ("failed", "error") for report in stats.get(word, ())}),
            "skipped": dict(sorted(reasons.items())),
            "versions": versions(),
        }
        self.path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, Any]:
    """Of Python, torch, what torch brings, and the packages of kernels that are installed."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


class Copies(TorchDispatchMode):
    """Writes down operators that copy what they are given."""

    NAMES = ("clone", "copy_", "_to_copy", "cat", "stack", "index_select", "gather", "where")

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.NAMES:
            self.made.append(name)
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that an operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor):
                self.seen = max(self.seen, one.untyped_storage().nbytes())
        return result
