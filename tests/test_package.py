"""The package as a whole: public names, import order, import cost, the wheel, the command line."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import flashmha
from flashmha.__main__ import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flashmha"
ORDER = """
    extras masks scores spec errors heads order
    backends.base backends.flash backends.compact backends.blocks backends.block_tables backends.grouped
    backends.packing backends.plugins backends.ranking backends.tuned backends.waiting
    backends.flash4_mask backends.flash4_launches backends.flash4_kernels
    backends.naive backends.sdpa backends.flex backends.flash2 backends.flash3 backends.flash4
    backends.registry backends functional deferred
    features stock nested arguments call columns hops padding packed kernels tiles weights projection plain forward
    module route encoder convert explain
    commands commands.devices commands.screen commands.destination commands.variables commands.picture tolerance
    testing.record testing.values testing.paste testing.choice testing.dropout testing.attention testing.kernels
    testing.judge testing.drop_in testing.anatomy testing.tree
    testing.layer testing.encoder testing.transformer testing.call testing
    benchmark.cases benchmark.suites benchmark.inputs benchmark.reference benchmark.machine benchmark.peers
    benchmark.kernels benchmark.encoders benchmark.lineup benchmark.verdicts benchmark.gate benchmark.runner
    benchmark.report benchmark.plots
    benchmark.command benchmark
    commands.info commands.explain commands.verify commands.tune
    wrapper __main__ __init__
""".split()  # noqa: SIM905
LEAVES = {"testing", "benchmark", "commands", "__main__"}
"""Folders and files that nothing but one another imports."""
LISTS = ("backends.registry",)
"""A room of the backends that holds them all."""
ACROSS = {("wrapper", "benchmark.machine")}
"""But for these."""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The files of this package that a file imports when it runs."""
    folder = list(path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    checks = [node for node in nodes if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    for_types = {inner for check in checks for inner in ast.walk(check)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level and node not in for_types:
            base = folder[: len(folder) - node.level + 1] + (node.module or "").split(".")
            module = ".".join(part for part in base if part)
            for alias in node.names:
                inner = f"{module}.{alias.name}" if module else alias.name
                found.add(inner if inner in FILES else module or "__init__")
    return found


def is_leaf(name: str) -> bool:
    return name.split(".")[0] in LEAVES


def test_every_file_has_its_place() -> None:
    assert sorted(FILES) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name: str) -> None:
    for other in imports(FILES[name]):
        if other == "__init__" and is_leaf(name):
            continue  # the version
        assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}, which comes later"
        assert not is_leaf(other) or is_leaf(name) or (name, other) in ACROSS, f"{name} imports {other}, a leaf"
        if name.startswith("backends.") and name not in LISTS:
            assert other in ORDER[: ORDER.index("backends.naive")], f"{name} imports {other}"


def test_public_names_are_sorted_complete_and_documented() -> None:
    assert flashmha.__all__ == sorted(flashmha.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(flashmha.__all__) == imported
    for name in flashmha.__all__:
        thing = getattr(flashmha, name)
        assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_importing_the_package_imports_no_kernels_and_no_extras() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import flashmha; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names))); print('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found, compiler = result.stdout.splitlines()
    assert set(ast.literal_eval(found)) <= {"flashmha", "einops", "torch"}, found
    assert compiler == "False"


def test_no_hint_installs_the_package_of_the_same_name_on_the_index() -> None:
    """FlashMHA on the package index is another project's; ours is torch-flashmha, and imported as flashmha."""
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^name = "torch-flashmha"$', metadata, re.MULTILINE)
    texts = [
        *PACKAGE.rglob("*.py"),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").glob("*.py"),
    ]
    texts += [ROOT / "pyproject.toml", ROOT / "tests" / "backend_package" / "pyproject.toml"]
    for path in texts:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"(?<![\w-])flashmha\[", line), f"{path.name}: {line}"
            assert not re.search(r"pip install\b.*[\s'\"](?<!torch-)flashmha(?![\w./-])", line), f"{path.name}: {line}"
            assert not re.search(r'dependencies = .*"flashmha', line), f"{path.name}: {line}"


def test_a_wheel_holds_the_package_under_its_import_name(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, capture_output=True, text=True, check=True, cwd=ROOT)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.startswith(f"torch_flashmha-{flashmha.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assert {name.split("/")[0] for name in names} == {"flashmha", f"torch_flashmha-{flashmha.__version__}.dist-info"}
    assert {f"flashmha/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")} <= set(names)
    assert "Name: torch-flashmha" in about


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in flashmha.backends.names():
        assert name in printed
    assert torch.__version__ in printed


def test_the_console_script_and_the_module_are_one() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "flashmha", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == f"flashmha {flashmha.__version__}"
    assert 'flashmha = "flashmha.__main__:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
