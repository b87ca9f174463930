"""A user's problem and module, of which the golden stores hold digests: what stands here stays, to the letter."""

from __future__ import annotations

import torch
from torch import nn

import trajstore as ts


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))


def problem(points: int = 6) -> ts.ModuleProblem:
    x = torch.linspace(-1, 1, points)[:, None]
    return ts.ModuleProblem(module, nn.functional.mse_loss, (x, x**2), metrics={"off": nn.functional.l1_loss})
