"""How well next tokens are predicted, and how far two predictions are apart."""

from spectral_kv.xp import Array, namespace, wide


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, in at least single precision."""
    xp = namespace(logits)
    shifted = wide(logits)
    shifted = shifted - xp.max(shifted, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def negative_log_likelihood(logits: Array, targets: Array) -> Array:
    """Nats `[tokens]` that `logits` `[tokens, vocabulary]` give to the `targets` `[tokens]`."""
    xp = namespace(logits)
    return -xp.take_along_axis(log_softmax(logits), targets[:, None], axis=-1)[:, 0]


def kl_divergence(full: Array, compressed: Array) -> Array:
    """KL(full || compressed) in nats `[tokens]` of two sets of logits `[tokens, vocabulary]`."""
    xp = namespace(full)
    p, q = log_softmax(full), log_softmax(compressed)
    return xp.sum(xp.exp(p) * (p - q), axis=-1)


def top1_agreement(full: Array, compressed: Array) -> Array:
    """1 where both sets of logits `[tokens, vocabulary]` put the same token first, else 0; `[tokens]`."""
    xp = namespace(full)
    return xp.astype(xp.argmax(full, axis=-1) == xp.argmax(compressed, axis=-1), xp.float32)
