"""A language model writes with a cache: each character is projected once, and read by all that come later.

The model of ``03_language_model.py`` learns for a while. Then it goes on from several prompts at once, of different
lengths, first by reading all its text again for every character and then with a cache. Its layers see 63 characters
back, so that small rings hold all that they will ever look at, however long the text becomes.

    python examples/04_generate.py

Takes about a minute on two CPU cores, and uses a GPU where there is one. Ends with an error unless both ways expect the
same characters, and the cache is faster.
"""

import importlib
import time
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import track
from torch import Tensor, nn

import flashmha

learning = importlib.import_module("03_language_model")

STEPS, LENGTH = 150, 200
PROMPTS = ("The following ", "A function ", "If the object is a list, ", "import ")


def expect(
    model: nn.Module, tokens: Tensor, cache: flashmha.KVCache | None = None, real: Tensor | None = None
) -> Tensor:
    """Scores of the next character, as the model gives them, of new tokens (batch, seqlen) behind those of a cache."""
    x = model.embed(tokens)
    for number, block in enumerate(model.blocks):
        y = block.norm1(x)
        held = None if cache is None else cache[f"blocks.{number}.attention"]
        padding = None if real is None else ~real
        x = x + block.attention(y, y, y, key_padding_mask=padding, cache=held)[0]
        x = x + block.feed_forward(block.norm2(x))
    scores: Tensor = model.predict(model.norm(x))
    return scores


def learn(text: str, number: dict[str, int], device: torch.device) -> nn.Module:
    """The model after some steps."""
    tokens = torch.tensor([number[letter] for letter in text], device=device)
    model = learning.LanguageModel(len(number)).to(device)
    optimizer, order = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in track(range(STEPS), description=f"learning on {device.type}"):
        learning.loss_of(model, *learning.draw(tokens, learning.BATCH, order)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def choose(scores: Tensor, generator: torch.Generator) -> Tensor:
    """One character for each row, (batch, 1), out of the scores (batch, characters)."""
    return torch.multinomial((scores.float() / 0.7).softmax(dim=-1), 1, generator=generator)


def write_again(model: nn.Module, prompts: list[Tensor], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The next character of every row and its scores, each time by reading the whole row again."""
    rows = list(prompts)
    for _ in range(LENGTH):
        scores = torch.cat([expect(model, row[None])[:, -1] for row in rows])
        chosen = choose(scores, generator)
        rows = [torch.cat([row, letter]) for row, letter in zip(rows, chosen)]
        yield chosen, scores


def write_on(
    model: nn.Module, prompts: list[Tensor], cache: flashmha.KVCache, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same with a cache: the prompts in one call, padded on the right, and then a character a row at a time."""
    lengths = torch.tensor([len(row) for row in prompts], device=prompts[0].device)
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    real = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    scores = expect(model, padded, cache, real)[torch.arange(len(prompts)), lengths - 1]
    for _ in range(LENGTH):
        chosen = choose(scores, generator)
        yield chosen, scores
        scores = expect(model, chosen, cache)[:, -1]


def show(
    way: Iterator[tuple[Tensor, Tensor]], title: str, letters: list[str], console: Console
) -> tuple[Tensor, float]:
    """Write as it comes, with the characters a second; all scores (LENGTH, batch, characters), and that number."""
    texts, kept, pace = list(PROMPTS), [], 0.0
    start = time.perf_counter()
    with Live(console=console, refresh_per_second=8) as live:
        for count, (chosen, scores) in enumerate(way, 1):
            kept.append(scores)
            texts = [text + letters[index] for text, index in zip(texts, chosen[:, 0].tolist())]
            pace = count * len(texts) / (time.perf_counter() - start)
            lines = "\n".join(text.replace("\n", " ") for text in texts)
            live.update(Panel(lines, title=f"{title}: {pace:,.0f} characters a second", title_align="left"))
    return torch.stack(kept), pace


@torch.inference_mode()
def compare(model: nn.Module, prompts: list[Tensor], letters: list[str], console: Console) -> tuple[float, float, int]:
    """How far the two ways differ in what they expect, how much faster the cache is, and its bytes."""
    device, longest = prompts[0].device, max(map(len, prompts))
    seed = torch.Generator(device).manual_seed(0)
    again, slow = show(write_again(model, prompts, seed), "reading all again", letters, console)
    cache = flashmha.KVCache.of(model, len(prompts), longest + LENGTH, chunk=longest)
    on, fast = show(write_on(model, prompts, cache, seed.manual_seed(0)), "with a cache", letters, console)
    return (again - on).abs().max().item(), fast / slow, cache.nbytes


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, console = learning.manual(), Console()
    letters = sorted(set(text))
    number = {letter: index for index, letter in enumerate(letters)}
    model = learn(text, number, device)
    prompts = [torch.tensor([number[letter] for letter in prompt], device=device) for prompt in PROMPTS]
    off, faster, nbytes = compare(model, prompts, letters, console)
    print(f"{faster:.1f} times as fast with a cache of {nbytes / 1024:.0f} KiB; scores differ by {off:.1e} at most.")
    if not off < 1e-2:
        raise SystemExit(f"The cache expects other characters: scores differ by {off:.1e}.")
    if not faster > 1:
        raise SystemExit(f"The cache is no faster: {faster:.2f} times.")


if __name__ == "__main__":
    main()
