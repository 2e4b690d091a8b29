"""The examples' models and data, at a glance; ``.ci/run`` runs them whole."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmha

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def swapped_and_not(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    model.eval()
    with torch.no_grad():
        stock = model(x)
        with flashmha.record() as calls:
            flash = flashmha.replace_mha(model)(x)
    return stock, flash, len(calls)


def test_the_digits_are_real_and_the_swap_changes_no_score() -> None:
    example = load("01_swap")
    train, test = example.digits(torch.device("cpu"))
    assert sum(len(y) for _, y in train + test) == 1797
    stock, flash, calls = swapped_and_not(example.DigitTransformer(), test[0][0])
    torch.testing.assert_close(flash, stock, atol=1e-4, rtol=1e-4)
    assert calls == 3


def test_the_texts_are_real_and_an_empty_one_gets_numbers() -> None:
    example = load("02_padding")
    texts = example.docstrings()
    assert len(texts) > 1000
    words = torch.randint(1, example.WORDS, (4, 20), generator=torch.Generator().manual_seed(0))
    words[1, 7:] = 0
    words[2] = 0
    stock, flash, calls = swapped_and_not(example.DocstringClassifier(), words)
    real = [0, 1, 3]
    torch.testing.assert_close(flash[real], stock[real], atol=1e-4, rtol=1e-4)
    assert stock[2].isnan().all() and flash[2].isfinite().all()
    assert calls == 3


def test_a_cache_changes_nothing_that_the_model_expects() -> None:
    example = load("04_generate")
    model = example.learning.LanguageModel(40).eval()
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = flashmha.KVCache.of(model, 2, 9)
    with torch.no_grad():
        made = [example.expect(model, tokens[:, at], cache) for at in (slice(0, 6), slice(6, 7), slice(7, 9))]
        torch.testing.assert_close(torch.cat(made, dim=1), model(tokens))


def test_the_manual_is_real_and_the_model_looks_at_nothing_that_comes_later() -> None:
    example = load("03_language_model")
    text = example.manual()
    assert len(text) > 100_000 and "the " in text
    model = example.LanguageModel(40).eval()
    tokens = torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 40
    with torch.no_grad(), flashmha.record() as calls:
        one, two = model(tokens), model(changed)
    assert len(calls) == 2 * example.LAYERS
    torch.testing.assert_close(one[:, :12], two[:, :12])
    assert not torch.allclose(one[:, 12], two[:, 12])
