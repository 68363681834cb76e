"""The step of components that meets a ratio or a squared error: on some tokens first, then on all."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spectral_kv.at_rest.entropy import Tables
from spectral_kv.at_rest.rounding import CONTEXTS, Components

SEARCHED = 512  # tokens of which bits are counted while a step is looked for
CLOSE = 0.015  # of the logarithm to base 2 of what is met, where the search ends
FINE = 2 * np.pi * np.e  # squares of the step that a variance is, where a number takes no bits if steps were fine
ROUGH = 0.1  # likewise, where another search goes on
SPARSE = 0.2  # the same, where it takes half of them as most are rounded to 0: where to look first, within a tenth
MISSED = np.log2(1.02)  # what is left by then and is not good enough
TURNS = 12  # at most


def few(components: Components) -> Components:
    """Some of the tokens."""
    return components.every(components.tokens // SEARCHED | 1)


@dataclass(frozen=True)
class Goal:
    """What codes shall meet: bits of all tokens, the squared error of a token, or a step itself."""

    bits: float | None = None
    error: float | None = None
    step: float | None = None
    asked: str = ""


class Search:
    """For the step by which components meet a goal.

    Parameters
    ----------
    components : Components
    goal : Goal
    about : float, optional
        A step to begin with.
    """

    def __init__(self, components: Components, goal: Goal, about: float | None = None):
        self.components, self.goal = components, goal
        self._about = None if about is None else float(np.log2(about))
        self.few = few(components)
        self._close = np.inf

    def _beyond(self, some: Components, logarithm: float) -> float:
        """How far above the goal a step is, by the logarithm that is to be 0."""
        step, goal = float(np.float32(2.0**logarithm)), self.goal
        rounded = some.rounded(step)
        if goal.error is not None:
            return 0.5 * np.log2(max(rounded.distortion(some.values, step), 1e-30) / goal.error)
        tables = 8 * (Tables.of(rounded.frequencies).nbytes + 2 * CONTEXTS) * some.tokens
        tokens = self.components.tokens
        return np.log2(goal.bits * some.tokens / max(tokens * rounded.bits + tables, 1.0))

    def _expected(self, logarithm: float) -> float:
        """The same by the sizes of components alone."""
        deviations, goal = self.components.deviations, self.goal
        relative = (deviations / 2.0**logarithm) ** 2
        if goal.error is not None:
            return 0.5 * np.log2(max((deviations**2 / (1 + 6 * relative)).sum(), 1e-30) / goal.error)
        bits = 0.5 * np.log2(1 + FINE * relative) * relative / (relative + SPARSE)
        return np.log2(goal.bits / max(self.components.tokens * bits.sum(), 1.0))

    def near(self, close: float = CLOSE / 2) -> float:
        """A step that nearly meets the goal, as some tokens say."""
        if self.goal.step is not None:
            return self.goal.step
        if self._about is None:
            about = 0.5 * np.log2(float((self.components.deviations**2).mean()) + 1e-24)
            self._about, _ = root(self._expected, about, CLOSE)
        if close < self._close:
            self._about, _ = root(lambda at: self._beyond(self.few, at), self._about, close)
            self._close = close
        return float(np.float32(2.0**self._about))

    def step(self) -> float:
        """The one that meets the goal.

        Raises
        ------
        ValueError
            If none does.
        """
        near = self.near()
        if self.goal.step is not None:
            return near
        found, off = root(lambda at: self._beyond(self.components, at), self._about, CLOSE)
        if self.goal.bits is not None and off > MISSED:
            raise ValueError(f"{self.goal.asked} can't be met within 2 %, no step does: choose another, or give a step")
        return float(np.float32(2.0**found))


def root(function: Callable[[float], float], at: float, close: float) -> tuple[float, float]:
    """Where a rising function of about unit slope is within `close` of zero, and how far it is there.

    By the secant method, or the middle of what is known to lie on either side where that would leave it.
    """
    value, slope, below, above = function(at), 0.8, -np.inf, np.inf
    for _ in range(TURNS):
        if abs(value) < close:
            break
        below, above = (at, above) if value < 0 else (below, at)
        new = at + float(np.clip(-value / slope, -2, 2))
        if not below < new < above:
            new = (below + above) / 2
        other = function(new)
        slope = float(np.clip((other - value) / (new - at), 0.3, 3.0))
        at, value = new, other
    return at, abs(value)
