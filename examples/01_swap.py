"""Swap the attention of a model in the middle of its training.

A small vision transformer, built from torch's own layers, learns to read the 1,797 handwritten digits that
scikit-learn ships. Halfway, ``flashmha.replace_mha(model)`` puts its attention on flashmha, and the same optimizer
goes on with the same parameters. A stock twin, copied just before the swap, trains on beside it, on the same batches,
so that the table at the end compares like with like: outputs, losses, accuracy, time and memory.

    python examples/01_swap.py

Takes about half a minute on one CPU core, and uses a GPU where there is one. Ends with an error unless the swap
kept the outputs, the optimizer and the accuracy, and every attention layer ran on flashmha.
"""

from collections import Counter
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from _shared import Batches, Run, off, peak_memory, side_by_side
from einops import rearrange
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import flashmha

EPOCHS = 12  # before the swap, and again after it


class DigitTransformer(nn.Module):
    """(batch, 16 patches, 4 pixels) -> (batch, 10 classes), of nothing but torch's own layers."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        # Without dropout, stock and flashmha can be compared in train mode too, number by number.
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.question = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classify = nn.Linear(width, 10)

    def forward(self, patches: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(patches) + self.place)
        question = self.question.expand(len(tokens), -1, -1)
        answer, _ = self.pool(question, tokens, tokens, need_weights=False)
        return self.classify(answer.squeeze(1))


def digits(device: torch.device) -> tuple[Batches, Batches]:
    """Training and test batches: images, each cut into 4x4 patches of 2x2 pixels, and the digits they show."""
    images, labels = load_digits(return_X_y=True)
    patches = rearrange(torch.tensor(images).float() / 16, "n (h p w q) -> n (h w) (p q)", h=4, p=2, w=4, q=2)
    parts = train_test_split(patches, torch.tensor(labels), test_size=360, stratify=labels, random_state=0)
    x, x_test, y, y_test = (part.to(device) for part in parts)
    return list(zip(x.split(64), y.split(64), strict=True)), [(x_test, y_test)]


@torch.no_grad()
def outputs(run: Run, x: Tensor, training: bool) -> Tensor:
    return run.model.train(training)(x)


def steps(run: Run) -> int:
    """How many steps the optimizer remembers for the parameters that the model has now."""
    return int(min(run.optimizer.state[parameter].get("step", 0) for parameter in run.model.parameters()))


def forward_and_backward(run: Run, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(run.model.train()(x), y).backward()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for steadier times, whatever else the machine is doing
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, test = digits(device)
    model = DigitTransformer().to(device)
    flash = Run(model, torch.optim.AdamW(model.parameters(), lr=1e-3))  # stock still, until the swap

    with Progress() as progress:
        for epoch in progress.track(range(EPOCHS), description="stock, before the swap"):
            flash.train(data, epoch)

        stock = flash.twin()
        flashmha.replace_mha(model)  # the swap is this line; the rest trains on and looks at what it did

        held = [parameter for group in flash.optimizer.param_groups for parameter in group["params"]]
        same = all(old is new for old, new in zip(held, model.parameters(), strict=True))
        at_swap = steps(flash)
        x, y = test[0]
        largest = outputs(stock, x, False).abs().max().item()
        eval_off, train_off = (
            (outputs(flash, x, training) - outputs(stock, x, training)).abs().max().item() for training in (False, True)
        )
        with flashmha.record() as calls:
            outputs(flash, x, False)
        for run in (stock, flash):
            run.test(test)
            run.train_seconds.clear()  # what is timed starts here

        for epoch in progress.track(range(EPOCHS, 2 * EPOCHS), description="stock and flashmha, after it"):
            # They take turns at going first, so that whatever else this machine does slows both alike.
            for run in (stock, flash) if epoch % 2 else (flash, stock):
                run.train(data, epoch)
        for run in (stock, flash):
            run.test(test)

    memory = [peak_memory(partial(forward_and_backward, run, x, y)) for run in (stock, flash)]
    ms = [1000 * median(run.train_seconds[1:]) for run in (stock, flash)]
    backends = ", ".join(f"{count} {name}" for name, count in Counter(call.backend for call in calls).items())

    print(f"\nflashmha.swap_report(model) says:\n{flashmha.swap_report(model)}\n")
    print(f"flashmha.record() says, of the first of {len(calls)} attention layers:", *calls[:1], "", sep="\n")
    side_by_side(
        f"Reading digits on {device.type}: {EPOCHS} epochs, the swap, {EPOCHS} epochs more",
        [
            ("outputs just after the swap, eval", f"up to {largest:.1f}", off(eval_off)),
            ("outputs just after the swap, train", f"up to {largest:.1f}", off(train_off)),
            ("parameters in the optimizer", "copies", "the very same" if same else "OTHERS"),
            ("steps the optimizer remembers", f"{at_swap}, then {steps(stock)}", f"{at_swap}, then {steps(flash)}"),
            ("test accuracy at the swap", f"{stock.accuracies[0]:.1%}", f"{flash.accuracies[0]:.1%}"),
            ("test accuracy at the end", f"{stock.accuracies[1]:.1%}", f"{flash.accuracies[1]:.1%}"),
            ("training loss, last epoch", f"{stock.losses[-1]:.4f}", f"{flash.losses[-1]:.4f}"),
            ("time per epoch", f"{ms[0]:.0f} ms", f"{ms[1]:.0f} ms"),
            ("memory, forward + backward of 360", *memory),
            ("attention layers, by backend", "3 torch", backends),
        ],
    )

    if max(eval_off, train_off) > 1e-4 * largest:
        raise SystemExit(f"The swap changed the outputs, by up to {max(eval_off, train_off):.1e}.")
    if not same or steps(flash) != 2 * at_swap:
        raise SystemExit("The optimizer did not go on with the parameters and the state it had.")
    if {call.layer for call in calls} != {
        layer for layer in model.modules() if isinstance(layer, nn.MultiheadAttention)
    }:
        raise SystemExit("Not every attention layer of the model ran on flashmha.")
    if flash.accuracies[1] < max(0.9, stock.accuracies[1] - 0.03):
        raise SystemExit(f"The swapped model reads {flash.accuracies[1]:.1%}, its twin {stock.accuracies[1]:.1%}.")


if __name__ == "__main__":
    main()
