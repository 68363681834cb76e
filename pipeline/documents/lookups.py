"""Planted facts, several needles and variable chains: text whose answer lies far back.

The same generic forms serve twice: mixed into the reference model's training text, so that it learns to
look things up, and planted in held-out text to measure retrieval. Names and values are drawn from a seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

ATTRIBUTES = ("pass key", "access code", "serial number", "magic number", "room number", "ticket number")
ADJECTIVES = (
    "amber ancient azure bitter bold brave bright broken calm clever cold copper crimson curious dark deep dusty "
    "eager early empty faint fierce frozen gentle giant golden green grey happy hidden hollow humble icy iron ivory "
    "late lazy light little lonely loud lucky mellow misty narrow noble old orange pale patient plain proud purple "
    "quick quiet rapid red royal rusty sharp shiny silent silver sleepy slow small soft solar stone strong sunny "
    "swift tall tiny velvet violet warm white wild wise wooden yellow young"
).split()
NOUNS = (
    "anchor apple arrow badger basket beacon bear bell boat bridge candle canyon castle cat cedar clock cloud comet "
    "crane crow desert dolphin dragon drum eagle engine falcon feather fern forest fox garden ghost glacier harbor "
    "hawk heron hill horse island jacket kettle kite ladder lake lantern lemon leopard lion lizard maple meadow "
    "mirror moon mountain needle oak ocean otter owl panther parrot pebble pilot pine planet pony rabbit raven ribbon "
    "river robin rocket salmon shadow shark ship sparrow spider star stork storm summit swan temple thunder tiger "
    "tower train tulip tunnel turtle valley village violin walrus whale willow window wolf zebra"
).split()
STATEMENTS = (
    "The {attribute} of the {name} is {value}.",
    "Remember this: the {attribute} of the {name} is {value}.",
    "Note that {value} is the {attribute} of the {name}.",
)


@dataclass(frozen=True)
class Lookup:
    """Sentences to plant, in order, and the question whose answer they hold.

    `lead + " " + answer + "."` is what a model that can look things up would write after `asked`.
    """

    statements: tuple[str, ...]
    asked: str
    lead: str
    answer: str

    @property
    def question(self) -> str:
        """All that comes before the answer, in plain text."""
        return f"{self.asked} {self.lead}"


def _digits(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def fact(rng: np.random.Generator, attribute: str | None = None) -> Lookup:
    """One fact: a five-digit number that belongs to a two-word name."""
    attribute = attribute or str(rng.choice(ATTRIBUTES))
    name = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    return _about(rng, attribute, name)


def _about(rng: np.random.Generator, attribute: str, name: str) -> Lookup:
    """A fact about an attribute of a name."""
    value = _digits(rng)
    statement = str(rng.choice(STATEMENTS)).format(attribute=attribute, name=name, value=value)
    return Lookup((statement,), f"What is the {attribute} of the {name}?", f"The {attribute} of the {name} is", value)


def facts(rng: np.random.Generator, count: int) -> list[Lookup]:
    """`count` facts about different attributes (there are six), so that none is a distractor for another."""
    return [fact(rng, str(attribute)) for attribute in rng.permutation(ATTRIBUTES)[:count]]


def needles(rng: np.random.Generator, count: int) -> list[Lookup]:
    """`count` facts about one attribute with distinct names: each is a distractor for the others."""
    attribute = str(rng.choice(ATTRIBUTES))
    found: dict[str, Lookup] = {}
    while len(found) < count:
        item = fact(rng, attribute)
        found.setdefault(item.question, item)
    return list(found.values())


def distractors(rng: np.random.Generator, count: int, near: int = 3) -> list[Lookup]:
    """`count` facts about one attribute, and `near` others for each that differ from it in one word of the name."""
    found = needles(rng, count)
    names = {item.question for item in found}
    others: list[Lookup] = []
    for item in found:
        attribute, name = item.asked.removeprefix("What is the ").removesuffix("?").split(" of the ")
        adjective, noun = name.split(" ")
        wanted = len(others) + near
        while len(others) < wanted:
            alike = f"{adjective} {rng.choice(NOUNS)}" if rng.random() < 0.5 else f"{rng.choice(ADJECTIVES)} {noun}"
            other = _about(rng, attribute, alike)
            if other.question not in names:
                names.add(other.question)
                others.append(other)
    return found + others


def several_values(rng: np.random.Generator, count: int, values: int = 2) -> list[Lookup]:
    """`count` names that have one attribute several times; the answer lists the values in the order of the text."""
    found = []
    for item in facts(rng, count):
        asked = item.asked.replace("What is the", "What are the").replace(" of the", "s of the", 1)
        lead = item.lead.replace(" of the", "s of the", 1).removesuffix(" is") + " are"
        numbers: list[str] = []
        while len(numbers) < values:
            numbers.append(n) if (n := _digits(rng)) not in numbers else None
        statements = tuple(f"{item.lead} {n}." for n in numbers)
        found.append(Lookup(statements, asked, lead, " and ".join(numbers)))
    return found


def several_questions(rng: np.random.Generator, count: int, asked: int = 2) -> list[Lookup]:
    """`count` groups of facts that are asked for at once; the answer gives their values in that order."""
    found = []
    for _ in range(count):
        group = needles(rng, asked)
        questions = " ".join(item.asked for item in group)
        rest = "".join(f". {item.lead} {item.answer}" for item in group[1:])
        statements = tuple(item.statements[0] for item in group)
        found.append(Lookup(statements, questions, group[0].lead, group[0].answer + rest))
    return found


def chain(rng: np.random.Generator, hops: int) -> Lookup:
    """A value handed from variable to variable; the answer lists all variables that hold it, in order."""
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(rng.choice(letters, 3))
        if name not in names:
            names.append(name)
    value = _digits(rng)
    statements = [f"The value {value} is stored in VAR {names[0]}."]
    statements += [f"VAR {old} is copied to VAR {new}." for old, new in pairwise(names)]
    return Lookup(tuple(statements), f"Which variables hold the value {value}?", "They are VAR", ", VAR ".join(names))


def chains(rng: np.random.Generator, count: int, hops: int = 2) -> list[Lookup]:
    """`count` chains that share neither value nor variable: each is a distractor for the others."""
    found: list[Lookup] = []
    seen: set[str] = set()
    while len(found) < count:
        item = chain(rng, hops)
        names = {item.question, *item.answer.split(", VAR ")}
        if seen.isdisjoint(names):
            found.append(item)
            seen |= names
    return found


def spliced(text: np.ndarray, pieces: Sequence[np.ndarray], places: Sequence[int]) -> np.ndarray:
    """Token ids `[tokens]` of `text` with every piece inserted before the token at its place; places ascend."""
    parts, last = [], 0
    for place, piece in zip(places, pieces, strict=True):
        parts += [text[last:place], piece]
        last = place
    return np.concatenate([*parts, text[last:]])
