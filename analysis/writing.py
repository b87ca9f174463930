"""Numbers as a person reads them: as many digits as their uncertainty tells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["interval", "number"]

_EXACT = 1e-9
"""An interval as narrow as that, relative to its ends, has no width that could be shown."""
_WIDE = 100
"""Ends so many times apart are each written with two digits: the width tells nothing of the lower one."""
_TOGETHER = "\N{NO-BREAK SPACE}"


def interval(value: float, low: float, high: float) -> str:
    """Write a number with two digits of its interval's width, or of its own, so that no line breaks in it.

    >>> print(interval(0.94987, 0.9491, 0.9507), interval(12.34, 8.1, 17.3), interval(294.1, np.nan, np.nan), sep="; ")
    0.9499 [0.9491, 0.9507]; 12.3 [8.1, 17.3]; 290
    >>> print(interval(1.000089, 1.000041, 1.000137), interval(9e-5, 4.1e-5, 1e-3), interval(2e7, 1e7, 4e7), sep="; ")
    1.000089 [1.000041, 1.000137]; 9e-5 [4.1e-5, 1e-3]; 2e7 [1e7, 4e7]
    >>> print(interval(0.25, 0.25, 0.25), interval(39.96, 0.00023, 10240), sep="; ")
    0.25 [0.25, 0.25]; 40 [0.00023, 1e4]

    Of an interval that is open to a side, there is the end that is known:

    >>> print(interval(5e15, 3.1e14, np.inf), interval(2e-16, -np.inf, 4e-15), sep="; ")
    at least 3.1e14; at most 4e-15
    """
    if high == np.inf and np.isfinite(low):
        return f"at least{_TOGETHER}{number(low)}"
    if low == -np.inf and np.isfinite(high):
        return f"at most{_TOGETHER}{number(high)}"
    if not np.isfinite([low, high]).all():
        return number(value)
    if high - low <= _EXACT * max(abs(low), abs(high)):
        return _with_interval(value, low, high, lambda x: number(x, 4))
    if high > _WIDE * low > 0:
        return _with_interval(value, low, high, number)
    decimals, largest = int(1 - np.floor(np.log10(high - low))), max(abs(value), abs(low), abs(high))
    if largest < 1e4 and (decimals <= 4 or largest >= 0.01):
        return _with_interval(value, low, high, lambda x: f"{x:.{min(max(decimals, 0), 12)}f}")
    digits = int(np.clip(np.floor(np.log10(largest)) + decimals, 2, 12))
    return _with_interval(value, low, high, lambda x: _scientific(x, digits))


def _with_interval(value: float, low: float, high: float, write: Callable[[float], str]) -> str:
    return f"{write(value)}{_TOGETHER}[{write(low)},{_TOGETHER}{write(high)}]"


def number(value: float, digits: int = 2) -> str:
    """Write a number with two digits, or more.

    >>> number(294.1), number(0.00123), number(3.6e19), number(-1e-7), number(0.12345, 4)
    ('290', '0.0012', '3.6e19', '-1e-7', '0.1235')
    """
    short = f"{value:.{digits}g}"
    if "e" not in short or 1e-4 <= abs(value) < 1e4:
        return f"{float(short):.12g}"
    return _scientific(value, digits)


def _scientific(value: float, digits: int) -> str:
    """Write a number as a mantissa of so many digits and a power of ten."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
