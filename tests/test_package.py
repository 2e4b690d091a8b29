"""The package as a whole: public names, import order, import cost, the wheel, the command line."""

import ast
import io
import pickle
import pickletools
import re
import subprocess
import sys
import typing
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmha
import flashmha.testing
from flashmha.__main__ import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flashmha"
FLOORS = [
    line.split()
    for line in """
    version host
    problem
    backends
    backends.rewrites
    backends.flash_attn backends.sdpa backends.split_kv
    backends.choice
    functional
    weights
    parts cache
    layer
    swap
    lab testing benchmark
    testing.models
    commands
    __main__ __init__
    """.strip().splitlines()
]
"""Folders, and files of the root, from the ground up; what shares a line imports nothing of the other."""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}
RANKS = {folder: rank for rank, line in enumerate(FLOORS) for folder in line}


def imports(path: Path) -> set[str]:
    """The files of this package that a file imports, for types alone too."""
    folder = list(path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1] + (node.module or "").split(".")
            module = ".".join(part for part in base if part)
            for alias in node.names:
                inner = f"{module}.{alias.name}" if module else alias.name
                found.add(inner if inner in FILES else module or "__init__")
    return found


def floor(name: str) -> str:
    """The floor that a file is on; a folder's face is on the highest of its folders."""
    if FILES[name].name == "__init__.py" and name in RANKS:
        return max((one for one in RANKS if f"{one}.".startswith(f"{name}.")), key=RANKS.__getitem__)
    return name if name in RANKS else name.rpartition(".")[0]


ARROWS = [(name, other) for name, path in sorted(FILES.items()) for other in sorted(imports(path))]


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_down(name: str) -> None:
    here = floor(name)
    for other in imports(FILES[name]):
        there = floor(other)
        down = here == there or RANKS[there] < RANKS[here]
        assert down or is_face(name, other), f"{name} imports {other}"


def is_face(name: str, other: str) -> bool:
    """A folder's face imports what is in the folder, and names that it hands on."""
    return FILES[name].name == "__init__.py" and (name == "__init__" or other.startswith(f"{name}."))


def test_no_two_files_import_each_other_by_any_way() -> None:
    left = {name: {other for one, other in ARROWS if one == name} for name in FILES}
    while True:
        free = [name for name, others in left.items() if not others & left.keys()]
        if not free:
            break
        for name in free:
            del left[name]
    assert not left, f"a circle goes through {', '.join(sorted(left))}"


STATE = re.compile(
    r"torch\.(compiler\._?is_\w+|jit\.(is|_is)_\w+|cuda\.is_current_stream_capturing|overrides\.\w*has_torch_function\w*"
    r"|is_inference_mode_enabled|is_autocast\w*|get_autocast\w*|_is_functional_tensor|_dynamo\.is_\w+|onnx\.is_\w+"
    r"|_C\.(_functorch\.\w+|_(is|are|get|len|current)_\w+)|autograd\.forward_ad\._current_level"
    r"|(are|is)_deterministic\w*|_subclasses\.\w+)"
)
"""What asks PyTorch whether it compiles, exports, traces, transforms, captures or casts."""
LITERAL = {"torch.jit.is_scripting": {"layer.module", "swap.decoder", "swap.encoder"}}
"""What TorchScript has to read in place, and where."""


def asked_of_torch(path: Path) -> set[str]:
    """The names of torch that a file uses, whole, whatever it calls the modules they are in."""
    tree, short, found = ast.parse(path.read_text(encoding="utf-8")), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            short.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("torch"):
            short.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    found.update(short.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            found.add(f"{short.get(first, first)}.{rest}")
    return found


def test_one_room_asks_torch_what_it_is_doing() -> None:
    asking = {name: set(filter(STATE.fullmatch, asked_of_torch(path))) for name, path in FILES.items()}
    assert len(asking.pop("host.torch_state")) > 10
    for name, questions in asking.items():
        own = {question for question, places in LITERAL.items() if name in places}
        assert questions <= own, f"{name} asks {', '.join(sorted(questions - own))}; host.torch_state does that"
        assert own <= questions, f"{name} asks no {', '.join(sorted(own - questions))} any more"


def test_every_folder_has_a_floor_and_something_in_it() -> None:
    folders = {".".join(path.relative_to(PACKAGE).parts[:-1]) for path in FILES.values()} - {""}
    roots = {name for name in FILES if "." not in name and FILES[name].name != "__init__.py"} | {"__init__"}
    assert set(RANKS) == folders | roots
    for folder in folders:
        assert any(floor(name) == folder for name in FILES if name != folder), f"{folder} is empty"


def test_a_name_has_one_meaning_across_the_package() -> None:
    homes: dict[str, set[str]] = {}
    for file, path in FILES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            found = [target.id for target in targets if isinstance(target, ast.Name)]
            found += [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            for name in found:
                homes.setdefault(name, set()).add(file)
    shared = {name: sorted(files) for name, files in homes.items() if len(files) > 1 and not name.startswith("__")}
    assert len(shared) <= 15, shared


def test_a_file_holds_one_noun() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    long = {name: lines for name, lines in lengths.items() if lines > 300}
    assert len(long) <= 3, long


def test_public_names_are_sorted_complete_and_documented() -> None:
    assert flashmha.__all__ == sorted(flashmha.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    aliases = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert set(flashmha.__all__) == {
        alias.name for alias in aliases if not (alias.asname or alias.name).startswith("_")
    }
    for name in flashmha.__all__:
        thing = getattr(flashmha, name)
        assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"


@pytest.mark.parametrize("package", (flashmha, flashmha.testing), ids=lambda package: package.__name__)
def test_public_names_are_at_home_where_they_are_imported_from(package: Any) -> None:
    for name in package.__all__:
        thing = getattr(package, name)
        assert thing.__module__ == package.__name__, name
        if isinstance(thing, type):
            assert f"{package.__name__}.{name}" in repr(thing)
            typing.get_type_hints(thing)
            assert not any(isinstance(hint, str) for hint in vars(thing).get("__annotations__", {}).values()), name
        if thing.__qualname__ == name:  # Hypothesis names what it wraps after its own function
            assert pickle.loads(pickle.dumps(thing)) is thing


SPEC = flashmha.AttentionSpec(1, 3, 3, 2, 2, 4, 4, mask=flashmha.causal())


@pytest.mark.parametrize(
    "thing",
    (
        flashmha.FlashMultiHeadAttention(8, 2),
        flashmha.FlashTransformerEncoderLayer(8, 2),
        flashmha.FlashAttentionWrapper(),
        SPEC,
        flashmha.KeyPadding(torch.ones(1, 2, dtype=torch.bool)),
        flashmha.NoBackendError(SPEC, {}),
        flashmha.causal,
        flashmha.testing.Blueprint(),
    ),
    ids=lambda thing: getattr(thing, "__name__", type(thing).__name__),
)
def test_a_pickle_names_the_package_and_no_file_of_it(thing: Any) -> None:
    """So that a file may move, and what was saved is still loaded."""
    data = pickle.dumps(thing)
    found = {
        argument.split()[0] if operation.name == "GLOBAL" else argument
        for operation, argument, _ in pickletools.genops(data)
        if isinstance(argument, str) and argument.startswith("flashmha")
    }
    assert found and found <= {"flashmha", "flashmha.testing"}
    pickle.loads(data)


def test_a_saved_layer_is_loaded_by_its_public_name() -> None:
    layer, file = flashmha.FlashMultiHeadAttention(8, 2, window=(3, 0)), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    globals_ = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    ours = {name for name in globals_ if name.startswith("flashmha")}
    assert ours == {"flashmha.FlashMultiHeadAttention", "flashmha.Window"}
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is flashmha.FlashMultiHeadAttention


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
    pytest.importorskip("hatchling", reason="needs pip install hatchling")
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


SKIPS = {"pytest.skip": 0, "pytest.mark.skipif": None, "pytest.mark.skip": None, "pytest.importorskip": None}
"""How a test is skipped, and where its reason stands: among the arguments, or as ``reason``."""


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("*.py")), ids=lambda file: file.name)
def test_a_skip_says_what_would_run_it(file: Path) -> None:
    for call in ast.walk(ast.parse(file.read_text())):
        if isinstance(call, ast.Call) and (name := ast.unparse(call.func)) in SKIPS:
            given = {each.arg: each.value for each in call.keywords} | dict(enumerate(call.args))
            reason = given.get("reason", given.get(SKIPS[name]))
            assert reason is not None, f"line {call.lineno} gives no reason"
            first = reason.values[0] if isinstance(reason, ast.JoinedStr) else reason
            assert isinstance(first, ast.Constant) and first.value.startswith("needs "), f"line {call.lineno}"


def test_every_file_that_runs_kernels_of_triton_is_interpreted_in_ci() -> None:
    """Those that ask for ``machine``, a fixture; a kernel's file has its test among them."""
    (line,) = [line for line in (ROOT / ".ci/run").read_text().splitlines() if "TRITON_INTERPRET=1" in line]
    files = Path(__file__).parent.glob("test_*.py")
    asking = {file.name for file in files if re.search(r"\bmachine: torch\.device[,)]", file.read_text())}
    assert asking == set(re.findall(r"test_\w+\.py", line)) != set()
