"""What is timed beside each other: the same calls take the same time, whichever of them comes first."""

import pytest

from hf_sparse_attention.benchmark import timing


class Card:
    """A clock, and calls that take as long as the card is slow when they run."""

    def __init__(self, monkeypatch, slowness):
        self.now, self.slowness, self.ran = 100.0, slowness, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, milliseconds):
        def run():
            self.ran.append(name)
            self.now += milliseconds / 1000 * self.slowness(self.now - 100.0)

        return run


def test_a_card_that_starts_slowly_is_warm_when_it_is_timed(monkeypatch):
    """Twice as slow for 40 ms: of 21 runs of a millisecond most would count."""
    card = Card(monkeypatch, lambda seconds: 2.0 if seconds < 0.04 else 1.0)
    assert timing.median(card.call("first", 1.0), 21, "cpu") == pytest.approx(1.0)
    assert len(card.ran) > 21 + 20
    cold = Card(monkeypatch, lambda seconds: 2.0 if seconds < 0.04 else 1.0)
    assert timing.medians({"first": cold.call("first", 1.0)}, 11, "cpu", warm_up=0)["first"] == pytest.approx(2.0)
    assert len(cold.ran) == 2 + 11


@pytest.mark.parametrize("order", [("plain", "bounded", "slow"), ("slow", "bounded", "plain")])
def test_rounds_share_what_changes_on_the_way(order, monkeypatch):
    """A card that slows down to twice the time: one call after the other would differ by half."""
    card = Card(monkeypatch, lambda seconds: min(1.0 + seconds, 2.0))
    times = timing.medians({name: card.call(name, 20.0 if name == "slow" else 10.0) for name in order}, 25, "cpu")
    assert times["bounded"] == pytest.approx(times["plain"], rel=0.05)
    assert times["slow"] == pytest.approx(2 * times["plain"], rel=0.05)
    assert [card.ran.count(name) for name in order] == [card.ran.count("plain")] * 3


def test_what_raises_is_not_timed(monkeypatch):
    card = Card(monkeypatch, lambda seconds: 1.0)
    with pytest.raises(ZeroDivisionError):
        timing.medians({"fine": card.call("fine", 1.0), "wrong": lambda: 1 / 0}, 5, "cpu")
    assert card.ran == ["fine"]
