"""Problems and operators that engines are tried on: each has something that another has not."""

from __future__ import annotations

import torch
from torch import nn

from trajstore.errors import ConfigurationError
from trajstore.operators import ChecksBatches, Operator
from trajstore.operators.adam import Adam
from trajstore.operators.adamw import AdamW
from trajstore.operators.order_mean import OrderMean
from trajstore.operators.order_regularized import OrderRegularized
from trajstore.operators.schedules.cosine import Cosine
from trajstore.operators.schedules.inverse_sqrt import InverseSqrt
from trajstore.operators.schedules.step import Step
from trajstore.operators.sgd import SGD
from trajstore.operators.state import State
from trajstore.problems import DType, LiveProblem, Problem
from trajstore.problems._module import ModuleProblem
from trajstore.problems.images.shapes import Shapes
from trajstore.problems.least_squares import LeastSquares
from trajstore.problems.mlp import MLP
from trajstore.problems.quadratic import Quadratic
from trajstore.problems.regression import Regression
from trajstore.problems.two_constants import TwoConstants


def normed(dtype: DType = "float64", dropout: float = 0.2, bias: bool = False) -> ModuleProblem:
    """BatchNorm with running statistics, dropout, tied weights, a convolution.

    The norm takes a bias of the convolution out, so its gradient is mere rounding, which Adam scales.
    """

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 3, 3, bias=bias)
            self.norm = nn.BatchNorm1d(3)
            self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
            self.out = nn.Linear(12, 2)
            self.back = nn.Linear(2, 12)
            self.tied = nn.Linear(12, 2)
            self.tied.weight = self.out.weight

        def forward(self, x):
            hidden = self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1)
            return self.tied(torch.tanh(self.back(self.out(hidden))))

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 1, 6, generator=g, dtype=torch.float64), torch.randn(30, 2, generator=g, dtype=torch.float64)
    return ModuleProblem(Net, nn.functional.mse_loss, (x, y), (x[:9], y[:9]), batch_size=4, dtype=dtype)


PROBLEMS: dict[str, Problem] = {
    "regression": Regression(width=6, depth=2, points=15, batch_size=2, dtype="float64"),
    "quadratic": Quadratic((0.5, 1.0, 1.5), rotation_seed=1),
    "two-constants": TwoConstants(),
    "least-squares": LeastSquares(n=12, d=3, batch_size=2, sampling="shuffle"),
    "normed": normed(),
    "normed, no dropout": normed(dropout=0.0),
    "mlp": MLP(depth=1, width=12, batch_size=2, dtype="float64", images=Shapes(train=40, test=10, pixels=8)),
}
OPERATORS: list[Operator] = [
    SGD(0.05),
    SGD(0.02, momentum=0.9, dampening=0.1, weight_decay=0.01, schedule=InverseSqrt(warmup=5)),
    SGD(0.02, momentum=0.8, nesterov=True, schedule=Step(7), by="index"),
    Adam(0.01, schedule=Cosine(50, 5), by="index"),
    AdamW(0.01),
]
OF_PARTS: list[Operator] = [OrderMean(0.02), OrderRegularized(0.02)]


class Delayed:
    """Heavy ball that remembers the last parameters themselves, handed through from the state."""

    def memory(self, params):
        return {"previous": dict(params)}

    def apply(self, gradient, state, batch, index):
        gradients, buffers = gradient(state.params, state.buffers, batch)
        previous = state.memory["previous"]
        params = {n: p + 0.5 * (p - previous[n]) - 0.05 * gradients[n] for n, p in state.params.items()}
        return State(params, buffers, {"previous": state.params}, state.position + 1)


class _Handing:
    """A gradient step, and two slots of memory into which something is handed through."""

    def memory(self, params):
        return {"a": {n: torch.ones_like(p) for n, p in params.items()}, "b": {n: p * 2 for n, p in params.items()}}

    def apply(self, gradient, state, batch, index):
        gradients, buffers = gradient(state.params, state.buffers, batch)
        moved = {n: p - 0.05 * gradients[n] for n, p in state.params.items()}
        params, a, b = self.handed(moved, state.params, state.memory["a"], state.memory["b"])
        return State(params, buffers, {"a": a, "b": b}, state.position + 1)


class Swapping(_Handing):
    """Parameters and memory change places."""

    def handed(self, moved, before, a, b):
        return a, moved, before


class Rotating(_Handing):
    """Three change places in a circle."""

    def handed(self, moved, before, a, b):
        return b, moved, a


class Copying(_Handing):
    """It copies itself what it hands through, in ways that a compiler takes for nothing."""

    def handed(self, moved, before, a, b):
        return moved, {n: p.clone() for n, p in before.items()}, {n: (p * 1 + 0).reshape(p.shape) for n, p in a.items()}


class Turning(_Handing):
    """It hands through in another arrangement, and one number for all."""

    def handed(self, moved, before, a, b):
        spread = {n: p.flatten()[0].expand(p.shape) for n, p in before.items()}
        return moved, {n: p.flip(0) if p.ndim else p for n, p in before.items()}, spread


class Counting(_Handing):
    """It hands the position through, and a slot to itself."""

    def memory(self, params):
        return {"a": {n: torch.ones_like(p) for n, p in params.items()}, "at": {n: torch.tensor(0) for n in params}}

    def apply(self, gradient, state, batch, index):
        gradients, buffers = gradient(state.params, state.buffers, batch)
        params = {n: p - 0.05 * gradients[n] for n, p in state.params.items()}
        memory = {"a": state.memory["a"], "at": dict.fromkeys(params, state.position)}
        return State(params, buffers, memory, state.position + 1)


HANDING: list[Operator] = [Delayed(), Swapping(), Rotating(), Copying(), Turning(), Counting()]


_MISCOMPILED: dict[str, set[tuple[str, str]]] = {
    "2.9.": {("Copying", ""), ("Turning", "")},
    "2.11.": {("Adam", "normed")},
}
"""What a release of torch compiles wrongly, as (operator, problem or any): it is noticed, and computed eagerly."""


def miscompiled(operator: Operator, problem: str) -> bool:
    """Tell whether the release of torch that is here may compile an operator on a problem wrongly."""
    faults = {f for release, known in _MISCOMPILED.items() if torch.__version__.startswith(release) for f in known}
    name = type(operator).__name__
    return not faults.isdisjoint({(name, ""), (name, problem)})


def goes_with(operator: Operator, live: LiveProblem) -> bool:
    """Tell whether an operator can take the batches of a problem."""
    batches = live.batches(0)
    try:
        if isinstance(operator, ChecksBatches):
            operator.check(batches.batch_size, len(batches[1]) > 2)
    except ConfigurationError:
        return False
    return True
