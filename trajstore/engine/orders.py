"""Orders: how operators compose into the iterate at step n, as labels, legs and chains.

A label is a list of legs joined by ``+``. A leg is a kind (``forward``, ``backward``, or ``bracket``, which is near
backward for small learning rates and linear in n where data are finite), where it starts
(``@1000``; the first leg starts at 0), and, but for forward legs, a window: ``/100`` begins a new leg every 100
steps, ``/100?train_loss`` only where that metric is lower than it was where the present leg started.

>>> order = Order.parse("forward+backward/100@1000")
>>> [str(leg) for leg in order.legs]
['forward', 'backward/100@1000']
>>> str(order)
'forward+backward/100@1000'
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from trajstore.errors import OrderError, choices

__all__ = ["KINDS", "Kind", "Leg", "Order"]

Kind = Literal["forward", "backward", "bracket"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_LEG = re.compile(r"(?P<kind>[^/@?]*)(?:/(?P<window>[^@?]*)(?:\?(?P<metric>[^@]*))?)?(?:@(?P<start>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Leg:
    """One stretch of an order with its own start step, and the state there as its start state."""

    kind: Kind
    start: int = 0
    window: int | None = None
    metric: str | None = None

    def __str__(self) -> str:
        window = "" if self.window is None else f"/{self.window}"
        metric = "" if self.metric is None else f"?{self.metric}"
        return f"{self.kind}{window}{metric}" + (f"@{self.start}" if self.start else "")

    def chain(self, n: int) -> range:
        """Return the operator indices behind the iterate at step n, first applied first; near it, for a bracket leg."""
        return range(self.start + 1, n + 1) if self.kind == "forward" else range(n, self.start, -1)

    def applications(self, wanted: Sequence[int], last: int) -> int:
        """Count the operator applications for the wanted steps, all above step `last` where forward stands."""
        if self.kind == "forward":
            return max(wanted, default=last) - last
        if self.kind == "bracket":  # a step, a gradient and two products with Hessians, each as much as two gradients
            return 6 * (max(wanted, default=last) - last)
        return sum(n - self.start for n in wanted)


@dataclass(frozen=True)
class Order:
    """Legs in the order of their starts, the first at 0."""

    legs: tuple[Leg, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.legs))

    @classmethod
    def parse(cls, label: str) -> Order:
        """Read a label; an error points at the part that offends."""
        legs: list[Leg] = []
        at = 0
        for part in label.split("+"):
            leg = _parse_leg(label, part, at)
            if not legs and leg.start:
                raise _wrong(label, at, part, "the first leg starts at step 0, so leave '@' out")
            if legs and not leg.start:
                raise _wrong(label, at, part, "a later leg needs its start step, as in 'forward+backward@1000'")
            if legs and leg.start <= legs[-1].start:
                raise _wrong(label, at, part, f"it must start after step {legs[-1].start}, where the leg before starts")
            if legs and leg.kind == "forward" == legs[-1].kind:
                raise _wrong(label, at, part, "forward after forward changes nothing; leave it out")
            legs.append(leg)
            at += len(part) + 1
        return cls(tuple(legs))

    def turns(self, steps: int) -> dict[int, Leg]:
        """Return where new legs begin, or may begin (those with a metric), up to a last step."""
        turns: dict[int, Leg] = {}
        for k, leg in enumerate(self.legs):
            end = self.legs[k + 1].start if k + 1 < len(self.legs) else steps
            if leg.window:
                starts = range(leg.start + leg.window, end, leg.window)
                turns |= {a: Leg(leg.kind, a, leg.window, leg.metric) for a in starts}
            if leg.start:
                turns[leg.start] = Leg(leg.kind, leg.start, leg.window)  # a written start is unconditional
        return {a: turns[a] for a in sorted(turns) if a < steps}

    def same_until(self, other: Order, steps: int) -> int:
        """Return the step up to which another order has the same iterates by definition.

        >>> Order.parse("forward").same_until(Order.parse("forward+backward@1000"), 2000)
        1000
        """
        one, two = ({0: Leg(order.legs[0].kind)} | order.turns(steps) for order in (self, other))
        kinds = [{start: (leg.kind, leg.metric) for start, leg in legs.items()} for legs in (one, two)]
        return min((start for start in one | two if kinds[0].get(start) != kinds[1].get(start)), default=steps)

    @property
    def metrics(self) -> frozenset[str]:
        """Metrics on which the legs depend."""
        return frozenset(leg.metric for leg in self.legs if leg.metric)

    def check(self, steps: int, metrics: Sequence[str]) -> None:
        """Refuse what parses but does not fit an experiment."""
        for leg in self.legs:
            if leg.start >= steps and leg.start:
                raise OrderError(
                    f"order {str(self)!r}: leg {str(leg)!r} starts at step {leg.start}, but the last step is {steps}"
                )
            if leg.metric is not None and leg.metric not in metrics:
                known = [m for m in metrics if m.startswith("train_") and m.endswith("loss")]
                raise OrderError(
                    f"order {str(self)!r}: no metric {leg.metric!r} to decide on; {choices(leg.metric, known)}"
                )
            if leg.metric is not None and not leg.metric.endswith("loss"):
                raise OrderError(
                    f"order {str(self)!r}: a reset depends on a loss that has fallen, and {leg.metric!r} is none; use "
                    "'?train_loss'"
                )


def _parse_leg(label: str, part: str, at: int) -> Leg:
    match = _LEG.fullmatch(part)
    if match is None:
        raise _wrong(label, at, part, "a metric follows a window, as in 'backward/100?train_loss'")
    kind = next((k for k in KINDS if k == match["kind"]), None)
    if kind is None:
        hint = choices(match["kind"], KINDS) if match["kind"] else "a leg is 'forward', 'backward' or 'bracket'"
        raise _wrong(label, at, match["kind"] or part, hint)
    if kind == "forward" and match["window"] is not None:
        raise _wrong(label, at, part, "only legs that restart have windows; a forward leg would continue unchanged")
    if match["metric"] is not None and not re.fullmatch(r"train_\w+", match["metric"]):
        where = at + match.start("metric")
        raise _wrong(label, where, match["metric"], "a reset may depend on a training metric only, as in '?train_loss'")
    start = _number(label, at, match, "start", "a start step")
    return Leg(kind, start or 0, _number(label, at, match, "window", "a window"), match["metric"])


def _number(label: str, at: int, match: re.Match[str], group: str, what: str) -> int | None:
    text = match[group]
    if text is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise _wrong(label, at + match.start(group), text, f"{what} is a whole number from 1 on")
    return int(text)


def _wrong(label: str, at: int, part: str, hint: str) -> OrderError:
    return OrderError(f"order {label!r}: {part!r} at character {at + 1}: {hint}")
