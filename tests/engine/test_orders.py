"""Order labels ⇄ legs ⇄ chains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajstore.engine.orders import Leg, Order
from trajstore.errors import OrderError


@st.composite
def orders(draw: st.DrawFn) -> Order:
    legs: list[Leg] = []
    start = 0
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["forward", "backward"]))
        if legs and legs[-1].kind == "forward":
            kind = "backward"
        window = draw(st.none() | st.integers(1, 50)) if kind == "backward" else None
        metric = draw(st.none() | st.sampled_from(["train_loss", "train_accuracy"])) if window else None
        legs.append(Leg(kind, start, window, metric))
        start += draw(st.integers(1, 1000))
    return Order(tuple(legs))


@given(orders())
def test_printing_and_parsing_are_inverse(order: Order):
    assert Order.parse(str(order)) == order


@pytest.mark.parametrize(
    "label",
    [
        "forward",
        "backward",
        "backward+backward@1000",
        "forward+backward@1000",
        "backward/100",
        "backward/100?train_loss",
        "forward+backward/10?train_loss@1000",
    ],
)
def test_the_labels_of_the_documentation_survive(label: str):
    assert str(Order.parse(label)) == label


@pytest.mark.parametrize(
    ("label", "part", "character", "hint"),
    [
        ("bakward", "'bakward'", 1, "did you mean 'backward'"),
        ("", "''", 1, "'forward', 'backward' or 'bracket'"),
        ("backward+backwrd@10", "'backwrd'", 10, "did you mean 'backward'"),
        ("backward+backward", "'backward'", 10, "needs its start step"),
        ("backward@5", "'backward@5'", 1, "first leg starts at step 0"),
        ("backward+forward@7+backward@7", "'backward@7'", 20, "after step 7"),
        ("forward+forward@10", "'forward@10'", 9, "changes nothing"),
        ("forward/10", "'forward/10'", 1, "only legs that restart have windows"),
        ("backward/0", "'0'", 10, "whole number from 1"),
        ("backward/ten", "'ten'", 10, "whole number from 1"),
        ("backward/-5", "'-5'", 10, "whole number from 1"),
        ("backward+backward@1e3", "'1e3'", 19, "whole number from 1"),
        ("backward/10?test_loss", "'test_loss'", 13, "training metric only"),
        ("backward/10?", "''", 13, "training metric only"),
        ("backward@", "''", 10, "whole number from 1"),
    ],
)
def test_an_error_points_at_the_offending_part(label: str, part: str, character: int, hint: str):
    with pytest.raises(OrderError) as caught:
        Order.parse(label)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{part} at character {character}:" in message
    assert hint in message


def test_a_metric_needs_a_window_and_has_to_be_a_loss():
    with pytest.raises(OrderError, match="a metric follows a window, as in 'backward/100"):
        Order.parse("backward?train_loss")
    with pytest.raises(OrderError, match="a reset depends on a loss that has fallen, and 'train_accuracy' is none"):
        Order.parse("backward/5?train_accuracy").check(20, ["train_loss", "train_accuracy"])


def test_chains_are_the_definition():
    assert list(Leg("forward").chain(4)) == [1, 2, 3, 4]
    assert list(Leg("backward").chain(4)) == [4, 3, 2, 1]
    assert list(Leg("backward", start=10).chain(13)) == [13, 12, 11]
    assert list(Leg("forward", start=10).chain(13)) == [11, 12, 13]
    assert list(Leg("backward", start=10).chain(10)) == []


def test_windows_turn_until_the_next_leg_starts():
    assert list(Order.parse("backward/4").turns(13)) == [4, 8, 12]
    assert list(Order.parse("backward/4+backward@6").turns(13)) == [4, 6]
    assert list(Order.parse("forward+backward/3@6").turns(13)) == [6, 9, 12]
    assert list(Order.parse("backward").turns(13)) == []


def test_an_order_must_fit_the_experiment():
    with pytest.raises(OrderError, match="starts at step 20, but the last step is 20"):
        Order.parse("backward+backward@20").check(20, [])
    with pytest.raises(OrderError, match="did you mean 'train_loss'"):
        Order.parse("backward/5?train_los").check(20, ["train_loss", "test_loss"])
    Order.parse("backward+backward@19").check(20, [])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("forward", "backward", 0),
        ("forward", "bracket", 0),
        ("forward", "forward+backward@40", 40),
        ("backward", "backward+backward@40", 40),
        ("backward/20", "backward", 20),
        ("backward/20", "backward/20?train_loss", 20),
        ("backward/20", "backward/10", 10),
        ("backward+backward/20@40", "backward+backward@40", 60),
        ("backward+backward@40", "backward+forward@40", 40),
        ("backward", "backward/200", 100),
        ("backward", "backward", 100),
    ],
)
def test_until_where_two_orders_are_one(one, other, same):
    assert Order.parse(one).same_until(Order.parse(other), 100) == same
    assert Order.parse(other).same_until(Order.parse(one), 100) == same
