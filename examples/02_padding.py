"""Texts of unequal lengths: padding, empty texts, and a swap in the middle of training.

A small transformer learns which package of Python's standard library a docstring comes from; the texts are read from
the Python that runs this. In a batch, short texts are padded to the longest and a mask hides the padding. Halfway,
``flashmha.replace_mha(model)`` swaps the attention, while a stock twin trains on beside it and in eval takes torch's
fast path. The table at the end compares both on real words and on an empty text (of a function without a docstring),
all of which is padding: there the softmax of stock has nothing to choose from and gives NaN.

    python examples/02_padding.py

Takes about a minute on one CPU core, and uses a GPU where there is one. Ends with an error unless both
agree on real words, flashmha is finite where stock is NaN, and docstrings are told apart far better than by guessing.
"""

import ast
import random
import re
import sysconfig
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from _shared import Batches, Run, off, peak_memory, side_by_side
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import flashmha

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
EPOCHS = 4  # before the swap, and again after it
LONGEST = 80  # words of a text; the rest is cut off
WORDS = 3000  # 0 is padding, 1 a rare word, the others the most frequent ones

# Stock's fast path says this once for each process; it is about nested tensors, which this example does not use.
warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")


class DocstringClassifier(nn.Module):
    """Words (batch, seqlen) -> (batch, packages), of nothing but torch's own layers."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.place = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.question = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classify = nn.Linear(width, len(PACKAGES))

    def encode(self, words: Tensor) -> Tensor:
        return self.encoder(self.embed(words) + self.place[: words.shape[1]], src_key_padding_mask=words == 0)

    def forward(self, words: Tensor) -> Tensor:
        tokens = self.encode(words)
        question = self.question.expand(len(words), -1, -1)
        # As most code calls it: the weights are made by default, and thrown away.
        answer, _ = self.pool(question, tokens, tokens, key_padding_mask=words == 0)
        return self.classify(answer.squeeze(1))


def docstrings() -> list[tuple[tuple[str, ...], int]]:
    """The words and the package of every docstring, shuffled."""
    packages: dict[tuple[str, ...], set[int]] = {}
    for number, name in enumerate(PACKAGES):
        for file in sorted((Path(sysconfig.get_path("stdlib")) / name).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    words = re.findall(r"\w+|[^\w\s]", (ast.get_docstring(node) or "").lower())
                    packages.setdefault(tuple(words[:LONGEST]), set()).add(number)
    # Each text once, else a test could be known by heart; and only where one package has it.
    texts = [(words, *numbers) for words, numbers in packages.items() if words and len(numbers) == 1]
    random.Random(0).shuffle(texts)
    return texts


def batched(texts: list[tuple[tuple[str, ...], int]], numbers: dict[str, int], device: torch.device) -> Batches:
    """64 texts each, not sorted by length: that would hide what padding costs."""
    batches = []
    for start in range(0, len(texts), 64):
        some = texts[start : start + 64]
        rows = [torch.tensor([numbers.get(word, 1) for word in words]) for words, _ in some]
        y = torch.tensor([package for _, package in some])
        batches.append((pad_sequence(rows, batch_first=True).to(device), y.to(device)))
    return batches


def forward_and_backward(run: Run, x: Tensor, y: Tensor) -> tuple[float, int]:
    """The loss, and how many parameters a step along its gradient would turn into NaN."""
    loss = F.cross_entropy(run.model.train()(x), y)
    loss.backward()
    broken = sum(not parameter.grad.isfinite().all() for parameter in run.model.parameters())
    run.optimizer.zero_grad()
    return loss.item(), broken


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for steadier times, whatever else the machine is doing
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = docstrings()
    if len(texts) < 1000:
        raise SystemExit(f"This Python comes with too few docstrings to learn from: {len(texts)}.")
    unseen, seen = texts[: len(texts) // 5], texts[len(texts) // 5 :]
    frequent = Counter(word for words, _ in seen for word in words).most_common(WORDS - 2)
    numbers = {word: number for number, (word, _) in enumerate(frequent, start=2)}
    data, test = batched(seen, numbers, device), batched(unseen, numbers, device)
    model = DocstringClassifier().to(device)
    flash = Run(model, torch.optim.AdamW(model.parameters(), lr=1e-3))  # stock still, until the swap

    with Progress() as progress:
        for epoch in progress.track(range(EPOCHS), description="stock, before the swap"):
            flash.train(data, epoch)

        stock = flash.twin()
        flashmha.replace_mha(model)  # the swap is this line
        flash.train_seconds.clear()  # what is timed starts here
        runs = (stock, flash)

        x, y = test[0]
        with torch.inference_mode():
            words = [run.model.eval().encode(x)[x != 0] for run in runs]
        difference, largest = (words[0] - words[1]).abs().max().item(), words[0].abs().max().item()

        for epoch in progress.track(range(EPOCHS, 2 * EPOCHS), description="stock and flashmha, after it"):
            # They take turns at going first, so that whatever else this machine does slows both alike.
            for run in runs if epoch % 2 else runs[::-1]:
                run.train(data, epoch)
                run.test(test)
                run.test(test)

    with_empty = x.clone()
    with_empty[0] = 0  # the text of a function without a docstring
    with torch.inference_mode(), flashmha.record() as calls:
        scores = [run.model.eval()(with_empty)[0] for run in runs]
    (stock_loss, stock_broken), (loss, broken) = (forward_and_backward(run, with_empty, y) for run in runs)

    total = len(list(model.parameters()))
    train_memory = [peak_memory(partial(forward_and_backward, run, x, y)) for run in runs]
    test_memory = [peak_memory(partial(run.test, test[:1])) for run in runs]
    train_time = [f"{median(run.train_seconds[1:]):.2f} s" for run in runs]
    test_time = [f"{1000 * median(run.test_seconds[2:]):.0f} ms" for run in runs]
    padding = sum((words == 0).sum().item() for words, _ in test) / sum(words.numel() for words, _ in test)
    majority = max(Counter(package for _, package in unseen).values()) / len(unseen)
    backends = ", ".join(f"{count} {name}" for name, count in Counter(call.backend for call in calls).items())

    print()
    side_by_side(
        f"{len(texts):,} docstrings of {len(PACKAGES)} packages on {device.type}; {padding:.0%} of a batch is padding",
        [
            ("encoder on real words at the swap", f"up to {largest:.1f}", off(difference)),
            ("scores of an empty text", *(" ".join(f"{x:.2f}" for x in score[:3]) + " ..." for score in scores)),
            ("loss, an empty text in the batch", f"{stock_loss:.3f}", f"{loss:.3f}"),
            ("parameters its gradient ruins", f"{stock_broken} of {total}", f"{broken} of {total}"),
            ("accuracy on unseen docstrings", f"{stock.accuracies[-1]:.1%}", f"{flash.accuracies[-1]:.1%}"),
            ("accuracy of always guessing one", f"{majority:.1%}", f"{majority:.1%}"),
            ("training loss, last epoch", f"{stock.losses[-1]:.4f}", f"{flash.losses[-1]:.4f}"),
            ("time per epoch", *train_time),
            (f"time to test {len(unseen)}", f"{test_time[0]}, fast path", test_time[1]),
            ("memory, forward + backward of 64", *train_memory),
            ("memory, test of 64", *test_memory),
            ("attention layers, by backend", "3 torch", backends),
        ],
    )

    if difference > 1e-4 * largest:
        raise SystemExit(f"On real words the swap changed the encoder, by up to {difference:.1e}.")
    if not scores[1].isfinite().all() or broken:
        raise SystemExit("An empty text gave flashmha numbers that are not finite.")
    if not scores[0].isnan().all() or not stock_broken:
        raise SystemExit("Stock gave no NaN for an empty text, so what this example says of this torch is wrong.")
    if flash.accuracies[-1] < max(2 * majority, stock.accuracies[-1] - 0.05):
        raise SystemExit(f"The swapped model tells {flash.accuracies[-1]:.1%}, its twin {stock.accuracies[-1]:.1%}.")


if __name__ == "__main__":
    main()
