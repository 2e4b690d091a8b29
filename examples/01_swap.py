"""Swap the attention of a model in the middle of its training.

A small vision transformer, built from torch's own layers, learns to read the 1,797 handwritten digits that
scikit-learn ships. Halfway, ``flashmha.replace_mha(model)`` puts its attention on flashmha, and the same optimizer
goes on with the same parameters. A stock twin, copied just before the swap, trains on beside it, on the same batches,
so that the table at the end compares like with like: outputs, losses, accuracy, time and memory.

    python examples/01_swap.py

Takes about half a minute on two CPU cores, and uses a GPU where there is one. Ends with an error unless the swap kept
the outputs, the optimizer and the accuracy, and every attention layer ran on flashmha.
"""

import copy
import dataclasses
from collections import Counter
from statistics import median

import torch
import torch.nn.functional as F
from _shared import now, peak_memory, side_by_side
from einops import rearrange
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import flashmha

EPOCHS = 14
"""Before the swap, and again after it."""


class DigitTransformer(nn.Module):
    """(batch, 16 patches, 4 pixels) -> (batch, 10 classes), of nothing but torch's own layers."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        # Without dropout, stock and flashmha can be compared in train mode too, number by number.
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.question = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classify = nn.Linear(width, 10)

    def forward(self, patches: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(patches) + self.place)
        question = self.question.expand(len(tokens), -1, -1)
        answer, _ = self.pool(question, tokens, tokens, need_weights=False)
        return self.classify(answer.squeeze(1))


@dataclasses.dataclass
class Run:
    """A model, its optimizer, and what training it one epoch after another gave."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def train(self, x: Tensor, y: Tensor, epoch: int) -> None:
        """The epoch is the seed of its batches, so that two runs see the same ones."""
        start = now(x.device)
        self.model.train()
        losses = []
        for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).to(x.device).split(64):
            loss = F.cross_entropy(self.model(x[batch]), y[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        self.losses.append(torch.stack(losses).mean().item())
        self.seconds.append(now(x.device) - start)

    @torch.no_grad()
    def outputs(self, x: Tensor, training: bool = False) -> Tensor:
        return self.model.train(training)(x)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return (self.outputs(x).argmax(dim=1) == y).double().mean().item()

    def steps(self) -> int:
        """How many steps the optimizer remembers for each of the model's parameters."""
        return int(min(self.optimizer.state[parameter]["step"].item() for parameter in self.model.parameters()))

    def memory(self, x: Tensor, y: Tensor) -> str:
        self.model.train().zero_grad()
        return peak_memory(lambda: F.cross_entropy(self.model(x), y).backward(), x.device)


def digits(device: torch.device) -> list[Tensor]:
    """Training and test images, each cut into 4x4 patches of 2x2 pixels, then training and test labels."""
    images, labels = load_digits(return_X_y=True)
    patches = rearrange(torch.tensor(images).float() / 16, "n (h p w q) -> n (h w) (p q)", h=4, p=2, w=4, q=2)
    parts = train_test_split(patches, torch.tensor(labels), test_size=360, stratify=labels, random_state=0)
    return [part.to(device) for part in parts]


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, x_test, y, y_test = digits(device)
    model = DigitTransformer().to(device)
    flash = Run(model, torch.optim.AdamW(model.parameters(), lr=1e-3))  # stock still, for the first half

    with Progress() as progress:
        bar = progress.add_task("before the swap", total=EPOCHS)
        for epoch in range(EPOCHS):
            flash.train(x, y, epoch)
            progress.update(bar, advance=1, description=f"before the swap: loss {flash.losses[-1]:.4f}")

        stock = Run(*copy.deepcopy((model, flash.optimizer)))
        flashmha.replace_mha(model)  # the swap is this line; all the rest only looks at what it did

        held = [parameter for group in flash.optimizer.param_groups for parameter in group["params"]]
        same = all(old is new for old, new in zip(held, model.parameters(), strict=True))
        largest = stock.outputs(x_test).abs().max().item()
        differences = [
            (flash.outputs(x_test, training) - stock.outputs(x_test, training)).abs().max().item()
            for training in (False, True)
        ]
        with flashmha.record() as calls:
            flash.outputs(x_test)
        before, steps_before = [run.accuracy(x_test, y_test) for run in (stock, flash)], flash.steps()

        flash.seconds.clear()  # from here on the two take turns, so that this machine's moods slow both alike
        bar = progress.add_task("after the swap", total=EPOCHS)
        for epoch in range(EPOCHS, 2 * EPOCHS):
            for run in (stock, flash) if epoch % 2 else (flash, stock):
                run.train(x, y, epoch)
            description = f"after the swap: loss {flash.losses[-1]:.4f}, of the stock twin {stock.losses[-1]:.4f}"
            progress.update(bar, advance=1, description=description)

    after = [run.accuracy(x_test, y_test) for run in (stock, flash)]
    backends = Counter(call.backend for call in calls)
    report = flashmha.swap_report(model)
    layers = [row for row in report if row.kind == "FlashMultiHeadAttention"]
    print(f"\nprint(flashmha.swap_report(model)):\n{report}\n\nprint(calls[0]), of flashmha.record():\n{calls[0]}\n")
    ms = [f"{1000 * median(run.seconds[1:]):.0f} ms" for run in (stock, flash)]  # the first epoch only warms up
    side_by_side(
        f"1,437 digits to learn from, 360 to be tested on; {device.type}, {EPOCHS} epochs before the swap and after it",
        [
            ("outputs right after the swap, eval", f"up to {largest:.1f}", f"off by at most {differences[0]:.1e}"),
            (
                "outputs right after the swap, train mode",
                f"up to {largest:.1f}",
                f"off by at most {differences[1]:.1e}",
            ),
            ("parameters that the optimizer holds", "a copy", "the very same" if same else "others"),
            ("steps that it remembers, at the swap", f"{steps_before}", f"{steps_before}"),
            ("steps that it remembers, at the end", f"{stock.steps()}", f"{flash.steps()}"),
            ("test accuracy at the swap", *(f"{share:.1%}" for share in before)),
            ("test accuracy at the end", *(f"{share:.1%}" for share in after)),
            ("training loss of the last epoch", *(f"{run.losses[-1]:.5f}" for run in (stock, flash))),
            (f"time per epoch, median of {EPOCHS - 1}", *ms),
            (
                "most tensor memory, forward and backward of 256",
                *(run.memory(x[:256], y[:256]) for run in (stock, flash)),
            ),
            ("backend: attention layers", "torch's own", ", ".join(f"{name}: {n}" for name, n in backends.items())),
        ],
    )

    if max(differences) > 1e-4 * largest:
        raise SystemExit(f"The outputs changed with the swap, by up to {max(differences):.1e}.")
    if not same or flash.steps() != 2 * steps_before:
        raise SystemExit("The optimizer did not go on with the parameters and the state it had.")
    if {id(call.layer) for call in calls} != {id(m) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}:
        raise SystemExit(
            f"Not every attention layer ran on flashmha: {len(calls)} calls, {len(layers)} layers swapped."
        )
    if after[1] < 0.95 or after[1] < after[0] - 0.02:
        raise SystemExit(f"The swapped model reads {after[1]:.1%} of the digits, its stock twin {after[0]:.1%}.")


if __name__ == "__main__":
    main()
