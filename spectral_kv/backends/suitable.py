"""Which models can be compressed: all layers attend to all tokens, and the rotation of keys can be undone."""

from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_kv.rope import Rope
from spectral_kv.xp import Array, float32, namespace

if TYPE_CHECKING:
    from spectral_kv.backends.base import Backend

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
EQUAL = 64  # tokens; the slower half of the frequencies hardly turns within fewer
SPREAD = 0.1  # rounding to 16 bits reaches 0.02, a layer that does not rotate 0.5 and more


def attends_to_all(config: Any, folder: str) -> None:
    """Refuse a checkpoint whose configuration has sliding windows.

    Raises
    ------
    ValueError
    """
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if sliding or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
        raise ValueError(f"{folder} has layers that do not attend to all tokens; such models can't be compressed here")


def depends_on_length(kind: str, folder: str) -> None:
    """Refuse a type of RoPE whose frequencies change with the prompt.

    Raises
    ------
    ValueError
    """
    if kind in LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"{folder} uses RoPE type {kind}, whose frequencies change with the prompt; cached keys can't be un-rotated"
        )


def can_be_unrotated(backend: "Backend", folder: str) -> None:
    """Refuse rotations that `Rope` does not describe (interleaved, partial), and layers that do not rotate.

    A text of equal tokens looks the same from all of them: attention averages equal values, so in every layer keys
    before rotation are equal, and un-rotated keys must not depend on position.

    Raises
    ------
    ValueError
    """
    if 2 * len(backend.rope.inv_freq) == backend.shape.dim:
        wrong = [layer for layer, keys in enumerate(_equal_keys(backend)) if _spread(backend.rope, keys) > SPREAD]
        if not wrong:
            return
        if wrong[0] > 0:
            raise ValueError(
                f"layer {wrong[0]} of {folder} rotates keys in another way than its first layer, or not at all; "
                "such models can't be compressed here"
            )
    raise ValueError(f"{folder} rotates keys in another way than Llama and Qwen do; they can't be un-rotated")


def _equal_keys(backend: "Backend") -> list[Array]:
    """Keys of a text of equal tokens, one array a layer."""
    return [float32(keys) for keys in backend.prefill(np.full(EQUAL, 5), observe=0).keys]


def _spread(rope: Rope, keys: Array) -> float:
    """How far un-rotated keys `[kv_heads, tokens, dim]` are from the first of them, as a share of their length."""
    xp = namespace(keys)
    unrotated = rope.unrotate(keys, np.arange(keys.shape[1]))
    return float(xp.sum((unrotated - unrotated[:, :1]) ** 2) / xp.sum(unrotated**2)) ** 0.5
