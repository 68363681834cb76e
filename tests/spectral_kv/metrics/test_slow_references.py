"""Every metric of one query against plain loops in double precision, written from the definitions alone."""

import math

import numpy as np
import pytest
import torch

from spectral_kv.attention import attention_log_mass, attention_output
from spectral_kv.metrics.perturbation import attention_output_perturbation
from spectral_kv.metrics.prediction import kl_divergence, log_softmax, negative_log_likelihood, top1_agreement
from spectral_kv.metrics.recovered_mass import recovered_mass

HEADS, KV_HEADS, POSITIONS, TOKENS, DIM, SCALING = 4, 2, 3, 11, 6, 0.4
makers = pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


def weights_of(query, keys) -> list[float]:
    exponentials = [math.exp(SCALING * sum(q * k for q, k in zip(query, key, strict=True))) for key in keys]
    return [e / sum(exponentials) for e in exponentials]


def output_of(query, keys, values) -> list[float]:
    weights = weights_of(query, keys)
    return [sum(w * v[d] for w, v in zip(weights, values, strict=True)) for d in range(DIM)]


@pytest.fixture
def attention(rng):
    queries = rng.normal(size=(HEADS, POSITIONS, DIM))
    keys, values = rng.normal(size=(2, KV_HEADS, TOKENS, DIM))
    kept = np.sort(np.stack([rng.permutation(TOKENS)[:5] for _ in range(KV_HEADS)]), axis=1)
    return queries, keys, values, kept


@makers
def test_perturbation(make, attention):
    queries, keys, values, kept = attention
    ours = [np.take_along_axis(x, kept[..., None], axis=1) for x in (keys, values)]
    outputs = [attention_output(make(queries), make(k), make(v), SCALING) for k, v in (ours, (keys, values))]
    found = np.asarray(attention_output_perturbation(*outputs))
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        for position in range(POSITIONS):
            query = queries[head, position]
            full = output_of(query, keys[group], values[group])
            part = output_of(query, keys[group][kept[group]], values[group][kept[group]])
            moved = math.sqrt(sum((a - b) ** 2 for a, b in zip(part, full, strict=True)))
            expected = moved / math.sqrt(sum(b**2 for b in full))
            assert found[head, position] == pytest.approx(expected, rel=1e-6)


@makers
def test_recovered_mass(make, attention):
    queries, keys, _, kept = attention
    ours = np.take_along_axis(keys, kept[..., None], axis=1)
    found = np.asarray(recovered_mass(*(attention_log_mass(make(queries), make(k), SCALING) for k in (ours, keys))))
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        for position in range(POSITIONS):
            weights = weights_of(queries[head, position], keys[group])
            assert found[head, position] == pytest.approx(sum(weights[t] for t in kept[group]), rel=1e-6)


@makers
def test_prediction(make, rng):
    full, other = 3 * rng.normal(size=(2, 20, 9))
    targets = rng.integers(0, 9, size=20)
    ours, theirs = (log_softmax(make(x)) for x in (full, other))
    nll = np.asarray(negative_log_likelihood(ours, make(targets)))
    kl = np.asarray(kl_divergence(ours, theirs))
    top1 = np.asarray(top1_agreement(make(full), make(other)))
    for i in range(20):
        p, q = ([math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in (full[i], other[i]))
        assert nll[i] == pytest.approx(-math.log(p[targets[i]]), rel=1e-6)
        assert kl[i] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-6)
        assert top1[i] == (p.index(max(p)) == q.index(max(q)))
