"""Whether two texts say the same thing in the same words."""

import re

SHINGLE = 10  # words


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of ten words of a text, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9_]+", text.lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
