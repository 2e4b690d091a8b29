"""The README and the site: every snippet runs, tables and pictures are what the scripts make, every name is there."""

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import fewer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import flashmha
import flashmha.testing
from flashmha.__main__ import COMMANDS, main
from flashmha.testing import noise, seeds

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def script(name: str) -> ModuleType:
    """A script of the folder ``scripts`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tables, pictures = script("tables"), script("pictures")


# Snippets

FENCE = re.compile(
    r"^(?P<dent> *)```(?P<kind>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=dent)```", re.DOTALL | re.MULTILINE
)
NEEDS = {
    "a GPU": torch.cuda.is_available,
}
"""What a snippet may need, as its title says (``title="needs a GPU"``), and whether it is here."""


class Snippet(NamedTuple):
    page: str
    line: int
    kind: str
    info: str
    text: str

    @property
    def needs(self) -> str | None:
        """What the title says it needs; ``None`` where it runs everywhere."""
        found = re.search(r'title="needs ([^"]*)"', self.info)
        return found.group(1) if found else None


def snippets(kind: str) -> list[Snippet]:
    """Every fence of a kind on every page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in FENCE.finditer(text):
            if fence["kind"] == kind:
                lines = [line.removeprefix(fence["dent"]) for line in fence["text"].splitlines()]
                line = text[: fence.start()].count("\n") + 1
                found.append(Snippet(str(page.relative_to(ROOT)), line, kind, fence["info"], "\n".join(lines)))
    return found


PYTHON = snippets("python")


def run(snippet: Snippet, names: dict[str, Any]) -> None:
    """A snippet and the tests it defines, in the names of those before it."""
    before = set(names)
    code = "\n" * snippet.line + snippet.text  # an error names the line of the page
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, str(ROOT / snippet.page), "exec"), names)
        for name in [name for name in names if name.startswith("test_") and name not in before]:
            names[name]()


@pytest.mark.parametrize("page", sorted({snippet.page for snippet in PYTHON}))
def test_the_snippets_of_a_page_run_in_order(page: str) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    listed = flashmha.backends.names()
    for snippet in PYTHON:
        if snippet.page == page and (snippet.needs is None or NEEDS[snippet.needs]()):
            run(snippet, names)
    assert flashmha.backends.names() == listed, "a page takes off the list what it puts there"


@pytest.mark.parametrize(
    "snippet", [one for one in PYTHON if one.needs], ids=lambda snippet: f"{snippet.page}:{snippet.line}"
)
def test_a_snippet_that_needs_something_says_what(snippet: Snippet) -> None:
    assert snippet.needs in NEEDS
    if not NEEDS[snippet.needs]():
        pytest.skip(f"needs {snippet.needs}: {snippet.page}:{snippet.line}")


def names_of(page: str) -> dict[str, Any]:
    """What the snippets of a page define."""
    names: dict[str, Any] = {"__name__": "page"}
    for snippet in PYTHON:
        if snippet.page == page:
            run(snippet, names)
    return names


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Any]:
    return names_of("docs/checkpoints.md")


@settings(parent=fewer(3))
@given(data=st.data(), normed=st.booleans(), seed=seeds())
def test_the_functions_of_a_page_convert_an_attention_of_transformers(
    checkpoints: dict[str, Any], data: st.DataObject, normed: bool, seed: int
) -> None:
    """Llama's or Qwen3's: its output, and its state dict back again."""
    name = "qwen3" if normed else "llama"
    theirs = pytest.importorskip(f"transformers.models.{name}.modeling_{name}", reason="needs pip install transformers")
    kv_heads, group, half = (data.draw(st.integers(1, 3)) for _ in range(3))
    kind, kind_name = ({"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}), name.capitalize()
    config = getattr(theirs, f"{kind_name}Config")(
        hidden_size=kv_heads * group * data.draw(st.integers(1, 4)),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=4 * half,
        attention_bias=data.draw(st.booleans()),
        rms_norm_eps=data.draw(st.sampled_from((1e-6, 0.5))),
        rope_parameters={"rope_theta": 100.0, **data.draw(st.sampled_from(kind))},
        attn_implementation="eager",
    )
    attention = getattr(theirs, f"{kind_name}Attention")(config, layer_idx=0).eval()
    for place, parameter in enumerate(attention.parameters()):
        parameter.data = noise(seed + place, *parameter.shape, dtype=torch.float32)
    layer = checkpoints["layer_of"](config, normed)
    layer.load_state_dict(checkpoints["from_transformers"](attention.state_dict()))
    x = noise(seed, 2, data.draw(st.integers(1, 9)), config.hidden_size, dtype=torch.float32)
    turns = getattr(theirs, f"{kind_name}RotaryEmbedding")(config)(x, torch.arange(x.shape[1])[None])
    hidden = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
    expected = attention(x, position_embeddings=turns, attention_mask=hidden)[0]
    torch.testing.assert_close(layer(x, x, x)[0], expected, rtol=1e-3, atol=1e-3)
    back = checkpoints["to_transformers"](layer.state_dict(), config)
    assert back.keys() == attention.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in attention.state_dict().items())


@settings(parent=fewer(3))
@given(
    heads=st.integers(1, 3), d_kv=st.integers(1, 6), d_model=st.integers(1, 8), seqlen=st.integers(1, 40), seed=seeds()
)
def test_the_function_of_a_page_converts_the_layers_of_t5(
    checkpoints: dict[str, Any], heads: int, d_kv: int, d_model: int, seqlen: int, seed: int
) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="needs pip install transformers")
    config = t5.T5Config(d_model=d_model, d_kv=d_kv, num_heads=heads, attn_implementation="eager")
    theirs = [t5.T5Attention(config, has_relative_attention_bias=not place, layer_idx=place).eval() for place in (0, 1)]
    for place, parameter in enumerate(parameter for attention in theirs for parameter in attention.parameters()):
        parameter.data = noise(seed + place, *parameter.shape, dtype=torch.float32)
    layers = checkpoints["t5_layers"](2, d_model, heads, d_kv)
    layers.load_state_dict(checkpoints["from_t5"]([attention.state_dict() for attention in theirs]))
    x = noise(seed, 2, seqlen, d_model, dtype=torch.float32)
    bias = theirs[0].compute_bias(seqlen, seqlen)
    for layer, attention in zip(layers, theirs):
        torch.testing.assert_close(layer(x, x, x)[0], attention(x, position_bias=bias)[0], rtol=1e-3, atol=1e-3)


def calls() -> list[tuple[str, str]]:
    """Every call of the command line on a page: where it stands, and the call."""
    found = []
    for snippet in snippets("sh"):
        for line in snippet.text.splitlines():
            call = re.search(r"(?:^|\s)(?:python -m )?(flashmha [^#]*)", line.partition("#")[0])
            if call and "pip install" not in line:
                found.append((f"{snippet.page}:{snippet.line}", call.group(1).strip()))
    return found


@pytest.mark.parametrize(("place", "call"), calls())
def test_a_call_of_the_command_line_has_its_flags(place: str, call: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, command, *arguments = call.split()
    assert command in COMMANDS or command.startswith("--"), place
    with pytest.raises(SystemExit):
        main([command, "--help"] if command in COMMANDS else [command])
    shown = capsys.readouterr().out
    for flag in arguments:
        if flag.startswith("--"):
            assert re.search(rf"{flag}\b", shown), f"{place}: {command} has no {flag}"


# Tables and pictures


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_shows_the_tables_of_the_code_and_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.written(text, page) == text, "run: python scripts/tables.py"


def test_every_section_has_one_place() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for section in tables.SECTIONS:
        assert all(text.count(mark) == 1 for mark in tables.marks(section)), section


@given(before=st.text("ab\n"), between=st.text("ab\n"), after=st.text("ab\n"))
def test_a_section_is_replaced_and_nothing_else(before: str, between: str, after: str) -> None:
    begin, end = tables.marks("backends")
    made = tables.written(f"{before}{begin}{between}{end}{after}", Path("page.md"))
    assert made == f"{before}{begin}\n{tables.backends_table()}\n{end}{after}"
    assert tables.written(made, Path("page.md")) == made
    assert tables.written(before + between, Path("page.md")) == before + between


@pytest.mark.parametrize("wrong", ("{begin}", "{end}", "{end}{begin}", "{begin}{end}{begin}{end}"))
def test_half_a_section_is_refused(wrong: str) -> None:
    begin, end = tables.marks("backends")
    with pytest.raises(ValueError, match="must hold the lines"):
        tables.written(wrong.format(begin=begin, end=end), Path("page.md"))


@pytest.mark.parametrize("section", tables.RUNS)
def test_the_figures_of_a_run_hide_no_loss(section: str) -> None:
    found, shown = tables.read(section), tables.content(section)
    for case in found["cases"]:
        lost = [one for one in found["summary"] if case["verdicts"].get(one) == "LOSS"]
        assert not lost or case["id"] in shown, f"{case['id']} is lost by {lost}"


def test_the_picture_is_drawn_from_the_results() -> None:
    assert Image.open(pictures.PICTURE).text["Description"] == pictures.described(), "run: python scripts/pictures.py"


def test_the_picture_can_be_drawn(tmp_path: Path) -> None:
    pictures.draw(tmp_path / "again.png")
    sizes = [Image.open(path).size for path in (tmp_path / "again.png", pictures.PICTURE)]
    assert sizes[0] == sizes[1]


# The README, the site and the metadata


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1000
    rows = [len(block.strip().splitlines()) - 2 for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert rows and max(rows) <= 12
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(pictures) == 1 and (ROOT / pictures[0]).stat().st_size <= 150 * 1024


def test_the_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_reference_holds_every_public_name() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = re.findall(r"^::: flashmha\.(\w+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert set(shown) == {*flashmha.__all__, "testing"}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in PAGES[1:]:
        assert re.search(rf" {page.relative_to(ROOT / 'docs')}$", navigation, re.MULTILINE), page


def test_every_extra_is_explained() -> None:
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(
        r"^(\w+) = \[", metadata.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M
    )
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert extras and all(f"| `{extra}` |" in text for extra in extras)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type"} <= set(citation)
    assert citation["version"] == flashmha.__version__ and citation["license"] == "BSD-3-Clause"
    assert citation["authors"] and all("name" in author for author in citation["authors"])
