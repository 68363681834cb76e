"""How well next tokens are predicted, and how far two predictions are apart."""

from spectral_kv.xp import Array, namespace, wide


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, in at least single precision."""
    xp = namespace(logits)
    shifted = wide(logits)
    shifted = shifted - xp.max(shifted, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def negative_log_likelihood(log_probabilities: Array, targets: Array) -> Array:
    """Nats `[tokens]` that `log_probabilities` `[tokens, vocabulary]` give to the `targets` `[tokens]`."""
    xp = namespace(log_probabilities)
    return -xp.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]


def kl_divergence(full: Array, compressed: Array) -> Array:
    """KL(full || compressed) in nats `[tokens]` of two sets of log-probabilities `[tokens, vocabulary]`."""
    xp = namespace(full)
    return xp.sum(xp.exp(full) * (full - compressed), axis=-1)


def top1_agreement(full: Array, compressed: Array) -> Array:
    """1 where both sets of (log-)probabilities `[tokens, vocabulary]` put the same token first, else 0; `[tokens]`."""
    xp = namespace(full)
    return xp.astype(xp.argmax(full, axis=-1) == xp.argmax(compressed, axis=-1), xp.float32)
