"""The paper's claims, one declaration each, as tests of what a store has recorded.

A claim looks at an experiment, or at the variants of one, and yields findings: a number with its interval, and whether
it holds. What it cannot be asked of yields nothing, and a claim that finds nothing in a store says what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from trajstore.analysis.examining import curves, laws, maps, operators
from trajstore.analysis.examining.finding import OPEN, Finding

from trajstore.errors import ConfigurationError, ConflictError, NotFoundError, StatisticError, choices
from trajstore.reading.handles import unreadable_told
from trajstore.store import Store, StoredExperiment

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CLAIMS", "Claim", "Examined", "claims", "examine", "frame"]

_CANNOT = (StatisticError, ConfigurationError, ConflictError, NotFoundError)
"""What is recorded is too little, or cannot be computed again: data are missing or others, the problem has changed."""

Ask = Callable[[StoredExperiment], Iterator[Finding]]
AskVariants = Callable[[Mapping[str, StoredExperiment]], Iterator[Finding]]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and how to look for it."""

    source: str
    says: str
    needs: str
    """What must be recorded for it to be examined."""
    ask: Ask | None = None
    ask_variants: AskVariants | None = None


@dataclass(frozen=True)
class Examined:
    """A row of the table."""

    claim: str
    source: str
    says: str
    experiment: str
    about: str
    statistic: str
    value: float
    low: float
    high: float
    verdict: str
    evidence: str


CLAIMS: Mapping[str, Claim] = {
    "bound": Claim(
        "Theorem 2.2",
        "backward iterates of contractions stay within C kⁿ of their limit",
        "backward on `quadratic`, or `least-squares` with a ridge, where the learning rate lets every map contract",
        maps.bound,
    ),
    "converges": Claim(
        "Theorem 2.2, Section 4", "backward iterates converge to a point", "backward", curves.converges
    ),
    "rate": Claim(
        "Theorem 2.2", "backward iterates settle at the rate of the products", "backward that settles", maps.rate
    ),
    "wanders": Claim(
        "Section 2", "forward iterates converge to a distribution and to no point", "forward", curves.forward_wanders
    ),
    "jumps": Claim(
        "Example 2.4",
        "of two constant maps forward jumps for ever, backward stays at T_1",
        "the preset `two-constants`",
        maps.jumps,
    ),
    "lemma": Claim(
        "Lemma 2.5",
        "a step contracts at least by √(1 − 2hm + h²M²)",
        "`quadratic` or `least-squares` with a ridge, at a small learning rate",
        maps.lemma,
    ),
    "curvature": Claim("Example 2.1", "a step contracts if and only if h < 2/λ_max", "`quadratic`", maps.curvature),
    "closed-form": Claim("Section 3", "iterates on a quadratic have closed forms", "`quadratic`", maps.closed_form),
    "law": Claim(
        "Theorem 2.6",
        "forward and backward iterates of one step have the same law",
        "forward and backward of 100 seeds or more from one θ₀ (`--seeds 0-199 --init-seed 0`)",
        laws.same_law,
    ),
    "less-variance": Claim(
        "Section 4, Appendix A", "backward curves vary less than forward ones", "forward and backward",
        curves.less_variance,
    ),
    "lower-loss": Claim(
        "Section 4, Appendix A", "backward has the lower loss in the last half", "forward and backward",
        curves.lower_loss,
    ),
    "elsewhere": Claim(
        "Figure 3", "after a reset backward settles elsewhere", "an order such as backward+backward@1000",
        curves.elsewhere,
    ),
    "oscillates": Claim(
        "Figure 3",
        "forward goes to and fro between the levels before and after a reset",
        "forward beside an order such as backward+backward@1000 that settles elsewhere",
        curves.oscillates,
    ),
    "windows": Claim(
        "Section 5",
        "backward in windows varies less than forward, at a cost that the window caps",
        "forward beside an order such as backward/100 or backward/100?train_loss",
        curves.windows,
    ),
    "bracket": Claim(
        "Theorem C.2, Corollary C.4",
        "forward and the brackets are nearer to backward than forward alone",
        "the orders forward, backward and bracket",
        operators.bracket_is_near,
    ),
    "regularized": Claim(
        "Appendix D.2.1",
        "the regularized large batch has a lower loss than large and small batches",
        "the presets fig14, fig16 or fig18",
        ask_variants=operators.beats,
    ),
    "stronger": Claim(
        "Appendix D.2.1", "the larger λ, the lower the loss", "the presets fig14, fig16 or fig18",
        ask_variants=operators.stronger_is_better,
    ),
    "loss-metric": Claim(
        "Appendix G", "mini-batches contract L(x) + L(y) in expectation", "a problem with a train_loss",
        maps.loss_metric,
    ),
}  # fmt: skip
"""Name → claim, in the order of the paper."""


def examine(
    store: Store,
    experiments: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    damaged: dict[str, str] | None = None,
) -> Iterator[Examined]:
    """Examine claims, by default all of them, in experiments of a store, by default in all, one row after the other.

    An experiment that turns out to be damaged is an error; if there is a table of those that are `damaged`, it is put
    down there, and the others are examined all the same.
    """
    known = list(store)
    variants = store.families()
    families = set(variants.values())
    chosen = list(experiments or known)
    for name in (name for name in chosen if name not in known and name not in families):
        raise NotFoundError(f"no experiment {name!r} in {store}; {choices(name, known)}")
    for name in (name for name in names or () if name not in CLAIMS):
        raise NotFoundError(f"no claim {name!r}; {choices(name, CLAIMS)}")
    single = [name for name in chosen if name in known]
    several = sorted({variants.get(name, name) for name in chosen} & families)
    for name in names or CLAIMS:
        claim, found = CLAIMS[name], False
        for where, finding in _findings(claim, store, single, several, damaged):
            found = True
            yield _row(name, where, finding)
        if not found:
            yield _row(name, "", Finding(OPEN, "", "", evidence=f"nothing here to examine: it needs {claim.needs}"))


def frame(found: Iterable[Examined]) -> pd.DataFrame:
    """Return the table as a data frame, a row a finding."""
    import pandas as pd

    return pd.DataFrame([vars(row) for row in found], columns=[field.name for field in fields(Examined)])


def claims(store: Store, experiments: Sequence[str] | None = None, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Examine claims, by default all, in experiments of a store, by default in all: a row a finding."""
    return frame(examine(store, experiments, names))


def _findings(
    claim: Claim, store: Store, single: Sequence[str], several: Sequence[str], damaged: dict[str, str] | None
) -> Iterator[tuple[str, Finding]]:
    asked = list[tuple[str, Callable[[str], Iterator[Finding]]]]()
    if (ask := claim.ask) is not None:
        asked += [(name, lambda name: ask(store[name])) for name in single]
    if (ask_variants := claim.ask_variants) is not None:
        asked += [(name, lambda name: ask_variants(store.variants(name))) for name in several]
    for where, findings in asked:
        if damaged is not None and where in damaged:
            continue
        with nullcontext() if damaged is None else unreadable_told(where, damaged):
            try:
                for finding in findings(where):
                    yield where, finding
            except _CANNOT as error:
                yield where, Finding(OPEN, "", "", evidence=str(error))


def _row(name: str, experiment: str, finding: Finding) -> Examined:
    claim = CLAIMS[name]
    return Examined(name, claim.source, claim.says, experiment, **{
        field.name: getattr(finding, field.name) for field in fields(Finding)
    })  # fmt: skip
