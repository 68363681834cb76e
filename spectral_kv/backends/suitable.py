"""Which models can be compressed: all layers attend to all tokens, and the rotation of keys can be undone."""

from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_kv.xp import float32, namespace

if TYPE_CHECKING:
    from spectral_kv.backends.base import Backend

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


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
    """Refuse rotations that `Rope` does not describe (interleaved, partial).

    In the first layer equal tokens have equal keys before rotation, so un-rotated keys must not depend on position.

    Raises
    ------
    ValueError
    """
    keys = float32(backend.prefill(np.full(8, 5), observe=1).keys[0])
    if 2 * len(backend.rope.inv_freq) == backend.shape.dim:
        xp = namespace(keys)
        unrotated = backend.rope.unrotate(keys, np.arange(8))
        if float(xp.sum((unrotated - unrotated[:, :1]) ** 2)) < 0.03**2 * float(xp.sum(unrotated**2)):
            return
    raise ValueError(f"{folder} rotates keys in another way than Llama and Qwen do; they can't be un-rotated")
