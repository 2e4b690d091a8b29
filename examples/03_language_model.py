"""A language model that learns to write: rotary positions, grouped heads, normed queries and keys, a window.

A small decoder reads the manual of Python, 460,000 characters of English that come with the Python that runs this, and
says of each character which comes next. As it learns, it goes on from the same few words, and noise becomes words and
words become sentences. Everything about attention is one constructor call in ``Block``.

    python examples/03_language_model.py

Takes under two minutes on two CPU cores, and uses a GPU where there is one. Ends with an error unless the model
says what comes next far better than the last two characters do.
"""

import importlib
import itertools
import math
from collections import Counter

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, TextColumn
from torch import Tensor, nn

import flashmha

WIDTH, HEADS, KV_HEADS, LAYERS = 128, 4, 2, 4
SEQLEN, BATCH, STEPS = 128, 16, 400
PROMPT = "The following "
SAMPLES = (0, 50, 150, 300)  # after so many steps it writes, and once more at the end


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and beside a residual: (batch, seqlen, WIDTH) both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = flashmha.FlashMultiHeadAttention(
            WIDTH,
            HEADS,
            bias=False,
            batch_first=True,
            num_kv_heads=KV_HEADS,
            qk_norm="rms",
            rotary=flashmha.Rotary(WIDTH // HEADS),
            causal=True,
            window=(63, 0),  # with four layers, a character sees what stood 252 before it
            need_weights=False,
        )
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.feed_forward(self.norm2(x))


class LanguageModel(nn.Module):
    """Characters (batch, seqlen) -> scores of the next one (batch, seqlen, characters)."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH)
        self.predict = nn.Linear(WIDTH, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.predict(self.norm(self.blocks(self.embed(tokens))))


def manual() -> str:
    """The manual of Python as text."""
    return "\n".join(importlib.import_module("pydoc_data.topics").topics.values())


def draw(tokens: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pieces of a text (count, SEQLEN), and the same one character on."""
    starts = torch.randint(len(tokens) - SEQLEN - 1, (count,), generator=generator)
    pieces = torch.stack([tokens[start : start + SEQLEN + 1] for start in starts.tolist()])
    return pieces[:, :-1], pieces[:, 1:]


def loss_of(model: LanguageModel, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.inference_mode()
def write(model: LanguageModel, prompt: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """The prompt (seqlen) and ``length`` characters more, each drawn from what the model expects."""
    model.eval()
    text = prompt
    for _ in range(length):
        likely = (model(text[None, -SEQLEN:])[0, -1].float() / 0.7).softmax(dim=-1)
        text = torch.cat([text, torch.multinomial(likely, 1, generator=generator)])
    model.train()
    return text


def by_two_characters(seen: str, unseen: str, characters: int) -> float:
    """The loss of guessing by how often a character follows the two before it."""
    pairs, threes = Counter(itertools.pairwise(seen)), Counter(zip(seen, seen[1:], seen[2:]))
    surprise = [
        math.log((pairs[three[:2]] + 0.1 * characters) / (threes[three] + 0.1))
        for three in zip(unseen, unseen[1:], unseen[2:])
    ]
    return sum(surprise) / len(surprise)


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = manual()
    letters = sorted(set(text))
    number = {letter: index for index, letter in enumerate(letters)}
    tokens = torch.tensor([number[letter] for letter in text], device=device)
    cut = len(tokens) * 9 // 10
    seen, unseen = tokens[:cut], tokens[cut:]
    prompt = torch.tensor([number[letter] for letter in PROMPT], device=device)
    test = draw(unseen, 64, torch.Generator().manual_seed(1))

    model = LanguageModel(len(letters)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS, pct_start=0.1)
    order = torch.Generator().manual_seed(0)
    console = Console()
    loss = math.log(len(letters))

    def show(step: int) -> None:
        written = write(model, prompt, 160, torch.Generator(device).manual_seed(step))
        sample = "".join(letters[index] for index in written.tolist())
        console.print(Panel(sample, title=f"after {step} steps, loss {loss:.2f}", title_align="left"), markup=False)

    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.2f}"), console=console) as bar:
        task = bar.add_task(f"learning on {device.type}", total=STEPS, loss=loss)
        for step in range(STEPS):
            if step in SAMPLES:
                show(step)
            found = loss_of(model, *draw(seen, BATCH, order))
            found.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            loss = 0.9 * loss + 0.1 * found.item() if step else found.item()
            bar.update(task, advance=1, loss=loss)
    show(STEPS)

    with torch.inference_mode(), flashmha.record() as calls:
        unseen_loss = loss_of(model.eval(), *test).item()
    simple = by_two_characters(text[:cut], text[cut:], len(letters))
    backends = ", ".join(sorted({call.backend for call in calls}))
    print(f"Unseen text: {unseen_loss:.2f} nats a character, {simple:.2f} by the two before it, on {backends}.")
    if not unseen_loss < simple - 0.2:
        raise SystemExit(f"The model learned too little: {unseen_loss:.2f}, where counting gives {simple:.2f}.")


if __name__ == "__main__":
    main()
