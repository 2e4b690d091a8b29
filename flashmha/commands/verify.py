"""``flashmha verify``: this machine's backends judged against the definition, on problems that Hypothesis draws."""

from __future__ import annotations

import argparse
import dataclasses

import torch

from ..backends import Backend, expand, get, names
from ..backends.limits import FEATURES
from ..host.extras import wanted_by
from ..problem.spec import AttentionSpec
from ..problem.wording import summarize_error
from ..testing.values import DRAWN_HEAD_DIMS, LONGEST
from .devices import device, devices
from .flags import add_sizes, at_least
from .screen import Advance, add_json, print_json, print_table, progress

AGREES, FAILS, NOT_AVAILABLE = "agrees", "FAILS", "not available"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME[,NAME]", help="default: every backend on the list")
    parser.add_argument("--device", metavar="NAME[,NAME]", help="default: every device of this machine")
    parser.add_argument(
        "--examples", type=at_least(1), default=100, help="problems to serve, a backend and device, default 100"
    )
    parser.add_argument("--longest", type=at_least(1), help=f"the most queries and keys, default {LONGEST}, a GPU more")
    add_sizes(
        parser,
        "--head-dims",
        f"default {','.join(map(str, DRAWN_HEAD_DIMS))}, as far as the backend takes them, and others on a GPU; a "
        "backend that compiles has fixed problems there, whatever these two say",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other problems, default 0")
    add_json(parser)


@dataclasses.dataclass
class Verdict:
    """The result of one backend on one device.

    Attributes:
        examples: how many problems it served.
        refuses: the features its limits leave out on this device.
        worst: the largest share of its allowance that an error took; ``None`` where nothing was measured.
        verdict: ``agrees``, ``FAILS`` or ``not available``.
        why: what failed, or why it is not available.
        problem, tensors: the smallest problem it fails, and the seed of its q, k and v.
        paste: the line of Python that judges it on that problem again.
        replay: the command that draws the same problems again.
    """

    backend: str
    device: str
    examples: int = 0
    refuses: list[str] = dataclasses.field(default_factory=list)
    worst: float | None = None
    verdict: str = AGREES
    why: str | None = None
    problem: str | None = None
    tensors: int | None = None
    paste: str | None = None
    replay: str | None = None

    @property
    def row(self) -> tuple[str, ...]:
        """The verdict as a row of a table."""
        worst = "" if self.worst is None else f"{self.worst:.2f}"
        said = f"{NOT_AVAILABLE}: {self.why}" if self.verdict == NOT_AVAILABLE else self.verdict
        refuses = ", ".join(self.refuses)
        if 2 * len(self.refuses) > len(FEATURES):
            refuses = "all but " + ", ".join(name for name in FEATURES if name not in self.refuses)
        return self.backend, self.device, str(self.examples or ""), refuses, worst, said

    def __str__(self) -> str:
        parts = [f"{self.backend} on {self.device} {self.verdict}: {self.why}"]
        if self.problem is not None:
            parts += [f"  problem: {self.problem}", f"  tensors: seed {self.tensors}", f"  paste:   {self.paste}"]
        return "\n".join((*parts, f"  again:   {self.replay}"))


@dataclasses.dataclass(frozen=True)
class DrawnProblems:
    """Which problems are drawn: how many, of which seed, and how large; ``None`` leaves that to the kit."""

    examples: int
    seed: int
    longest: int | None = None
    head_dims: tuple[int, ...] | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> DrawnProblems:
        """The problems that the flags ask for."""
        sizes = None if options.head_dims is None else tuple(options.head_dims)
        return cls(options.examples, options.seed, options.longest, sizes)

    @property
    def flags(self) -> str:
        """The flags that say it."""
        more = "" if self.longest is None else f" --longest {self.longest}"
        more += "" if self.head_dims is None else f" --head-dims {','.join(map(str, self.head_dims))}"
        return f"--examples {self.examples} --seed {self.seed}{more}"


def verify_backend(backend: Backend, where: torch.device, drawn: DrawnProblems, advance: Advance) -> Verdict:
    """One backend on one device, on as many problems as wanted that it serves."""
    with wanted_by("verify"):
        import hypothesis

        from ..testing import assert_agrees, seeds, served
        from ..testing.judge import replay_line
    absent = backend.limits.not_on.get(where.type, frozenset())
    verdict = Verdict(backend.name, str(where))
    reason = backend.why_not_here(where)
    if reason is not None:
        verdict.verdict, verdict.why = NOT_AVAILABLE, reason
        return verdict
    verdict.refuses = [name for name in FEATURES if name not in backend.limits.features - absent]
    last: list[tuple[AttentionSpec, int]] = []
    refusals: list[str] = []

    @hypothesis.seed(drawn.seed)
    @hypothesis.settings(
        max_examples=drawn.examples,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.target, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(served(backend, where, head_dims=drawn.head_dims, longest=drawn.longest), seeds())
    def law(spec: AttentionSpec, seed: int) -> None:
        last[:] = [(spec, seed)]
        refusal = backend.why_not(spec) or backend.why_not_built(spec)
        refusals[:] = [refusal] if refusal else refusals
        hypothesis.assume(refusal is None)
        share = assert_agrees(backend, spec, seed)
        verdict.examples += 1
        verdict.worst = share if verdict.worst is None else max(verdict.worst, share)
        advance()

    try:
        law()
    except hypothesis.errors.Unsatisfiable:
        verdict.verdict, verdict.why = FAILS, f"it serves no problem inside its limits ({', '.join(refusals)})"
    except Exception as error:  # a wrong answer, or whatever a kernel raises: what came last is the smallest problem
        verdict.verdict, verdict.why = FAILS, summarize_error(error)
        if last:
            verdict.problem, verdict.tensors = str(last[0][0]), last[0][1]
            verdict.paste = replay_line(backend, *last[0])
    else:
        if verdict.examples < drawn.examples:  # Hypothesis stops looking after ten times as many
            verdict.verdict = FAILS
            served_of = f"it served {verdict.examples} of {drawn.examples} problems"
            verdict.why = f"{served_of}, and refused nearly all that were drawn"
    if verdict.verdict == FAILS:
        verdict.replay = f"python -m flashmha verify --backend {backend.name} --device {where} {drawn.flags}"
    return verdict


def main(options: argparse.Namespace) -> int:
    drawn = DrawnProblems.of(options)
    wanted = names() if options.backend is None else expand([name.strip() for name in options.backend.split(",")])
    where = devices() if options.device is None else [device(name.strip()) for name in options.device.split(",")]
    pairs = [(get(name), one) for one in where for name in wanted]
    able = sum(backend.why_not_here(one) is None for backend, one in pairs)
    with progress("judging", able * drawn.examples) as advance:
        verdicts = [verify_backend(backend, one, drawn, advance) for backend, one in pairs]
    if options.json:
        print_json([dataclasses.asdict(verdict) for verdict in verdicts])
    else:
        columns = ("backend", "device", "examples", "refuses", "worst error / bound", "verdict")
        print_table(columns, [verdict.row for verdict in verdicts])
        for verdict in verdicts:
            if verdict.verdict == FAILS:
                print(f"\n{verdict}")
    found = {verdict.verdict for verdict in verdicts}
    return 0 if AGREES in found and FAILS not in found else 1
