"""The model without weights: its keys, values and queries are what their definitions say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.synthetic.backend import SyntheticBackend
from pipeline.synthetic.model import SyntheticModel
from spectral_kv.attention import attention_mass, attention_weights
from spectral_kv.calibration import Accumulator
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.selection import Budget, select
from spectral_kv.storage.dense import Dense
from spectral_kv.storage.turboquant import TurboQuantStorage

TOKENS = 1024
MODEL = SyntheticModel(context=1088, planted=1 / 32)
CLEAN = replace(MODEL, snr_db=np.inf)
TONE, CHIRP, BURST, DRIFT = range(4)


@pytest.fixture(scope="module")
def backend() -> SyntheticBackend:
    return SyntheticBackend(MODEL, device="cpu", cache_dtype="float32")


@pytest.fixture
def window(rng) -> np.ndarray:
    return rng.integers(32_768, size=TOKENS + 64)


def arrays(prefill) -> list[torch.Tensor]:
    return [*prefill.keys, *prefill.values, *prefill.queries]


def background(window: np.ndarray, layer: int, head: int = 0) -> np.ndarray:
    """Keys of a prompt without noise and without what was planted, `[tokens, dim]`."""
    tokens = window[:TOKENS]
    keys = CLEAN.keys(tokens, layer)[head].astype(float)
    positions, topics = CLEAN.planted_tokens(tokens)
    keys[positions] -= np.sqrt(CLEAN.dim) * CLEAN.directions(layer)[head, topics]
    return keys


def power(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in cycles a token, and the power at each over all channels."""
    return np.fft.rfftfreq(len(x)), (np.abs(np.fft.rfft(x, axis=0)) ** 2).sum(axis=1)


def test_equal_tokens_give_equal_arrays_and_others_other_ones(backend, window, rng):
    tokens, other = window[:TOKENS], rng.integers(32_768, size=TOKENS)
    again = SyntheticBackend(MODEL, device="cpu", cache_dtype="float32")
    first, same, different = (b.prefill(x, 16) for b, x in ((backend, tokens), (again, tokens), (backend, other)))
    for x, y, z in zip(arrays(first), arrays(same), arrays(different), strict=True):
        assert torch.equal(x, y)
        assert (x != z).float().mean() > 0.99
    other[:-1] = tokens[:-1]
    assert not np.array_equal(backend.planted(tokens), backend.planted(other))
    for keys in zip(*(backend.prefill(tokens, 0).keys[layer] for layer in range(4)), strict=True):  # by head
        assert len({float(x.sum()) for x in keys}) == 4  # no two layers alike
    shapes = {tuple(x.shape) for x in first.keys}, {tuple(x.shape) for x in first.queries}
    assert shapes == ({(2, TOKENS, 64)}, {(4, 16, 64)})


def test_cached_keys_are_the_signals_rotated(backend, window):
    tokens = window[:TOKENS]
    prefill = backend.prefill(tokens, 0)
    for layer, keys in enumerate(prefill.keys):
        unrotated = backend.rope.unrotate(keys, np.arange(TOKENS))
        np.testing.assert_allclose(unrotated, MODEL.keys(tokens, layer), atol=1e-4)
    packed = SyntheticBackend(MODEL, device="cpu").prefill(tokens, 1)
    assert {x.dtype for x in (*packed.keys, *packed.values)} == {torch.bfloat16}
    assert packed.queries[0].dtype == torch.float32


def test_a_tone_has_its_frequency_and_no_other(window):
    for head in range(2):
        frequencies, p = power(background(window, TONE, head))
        peak = frequencies[p.argmax()]
        assert abs(peak - MODEL.frequency(TONE, head)) <= 1 / TOKENS
        assert p[np.abs(frequencies - peak) < 0.01].sum() > 0.95 * p.sum()


def test_a_chirp_rises_from_a_quarter_of_its_frequency_to_four_times_it(window):
    x = background(window, CHIRP)
    base = MODEL.frequency(CHIRP, 0)
    eighths = [power(part) for part in np.split(x, 8)]
    centres = [np.average(frequencies, weights=p) for frequencies, p in eighths]
    assert np.all(np.diff(centres) > 0)
    assert abs(centres[-1] - base * (0.25 + 3.75 * 15 / 16)) < 0.01
    assert centres[0] < base


def test_bursts_are_short_packets_at_four_times_the_frequency_of_a_head(window):
    x, base = background(window, BURST), MODEL.frequency(BURST, 0)
    frequencies, _ = power(x)
    spectrum = np.fft.rfft(x, axis=0)
    spectrum[np.abs(frequencies - 4 * base) > 0.03] = 0
    energy = np.sort((np.fft.irfft(spectrum, axis=0) ** 2).sum(axis=1))[::-1]
    assert energy[: TOKENS // 3].sum() > 0.8 * energy.sum()  # a tone would have a third of it there
    assert 0.3 < (np.abs(spectrum) ** 2).sum() / (np.abs(np.fft.rfft(x, axis=0)) ** 2).sum() < 0.7


def test_a_drift_is_slow_and_goes_away(window):
    x = background(window, DRIFT)
    frequencies, p = power(x)
    assert p[frequencies < 0.02].sum() > 0.95 * p.sum()
    distance = [np.linalg.norm(x[lag:] - x[:-lag], axis=1).mean() for lag in (1, 16, 256)]
    assert distance[0] * 2.5 < distance[1] and distance[1] * 2.5 < distance[2]  # with the root of the time


@pytest.mark.parametrize("layer", [TONE, CHIRP, BURST, DRIFT])
def test_backgrounds_have_mean_square_1_and_noise_the_stated_part_of_it(window, layer):
    tokens = window[:TOKENS]
    assert np.mean(background(window, layer) ** 2) == pytest.approx(1, abs=1e-5)
    for decibel, square in ((0.0, 1.0), (10.0, 0.1), (20.0, 0.01)):
        noise = replace(MODEL, snr_db=decibel).keys(tokens, layer) - CLEAN.keys(tokens, layer)
        assert np.mean(noise**2) == pytest.approx(square, rel=0.03)


def test_planted_tokens_change_abruptly_and_their_values_are_long(backend, window):
    tokens = window[:TOKENS]
    planted, topics = MODEL.planted_tokens(tokens)
    assert len(planted) == TOKENS // 32 == len(set(planted.tolist())) and np.bincount(topics).tolist() == [16, 16]
    assert np.array_equal(backend.planted(tokens), np.sort(planted))
    others = np.delete(np.arange(TOKENS), planted)
    for layer in range(4):
        change = replace(MODEL, deviation=2.0).keys(tokens, layer) - MODEL.keys(tokens, layer)
        assert np.all(change[:, others] == 0)
        np.testing.assert_allclose(np.linalg.norm(change[:, planted], axis=-1), 8.0, rtol=1e-4)
        length = np.linalg.norm(MODEL.values(tokens, layer), axis=-1)
        assert 2.5 < length[:, planted].mean() / length[:, others].mean() < 3.5


def on_planted(backend, window: np.ndarray) -> np.ndarray:
    """Attention of the continuation on the planted tokens, `[layers, kv_heads]`."""
    prefill = backend.prefill(window[:TOKENS], 0)
    queries = backend.extend(backend.compress(prefill, None, Dense()), window[TOKENS:]).queries
    masses = [
        attention_mass(attention_weights(q, k, backend.scaling), 2) for q, k in zip(queries, prefill.keys, strict=True)
    ]
    return np.stack([mass[:, backend.planted(window[:TOKENS])].sum(dim=1).numpy() for mass in masses])


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_the_continuation_attends_to_planted_tokens_as_much_as_stated(rng, share):
    backend = SyntheticBackend(replace(MODEL, share=share), device="cpu")
    masses = np.stack([on_planted(backend, rng.integers(32_768, size=TOKENS + 64)) for _ in range(4)])
    assert masses.mean() == pytest.approx(share, abs=0.05)
    assert masses.mean(axis=(0, 2)) == pytest.approx(np.full(4, share), abs=0.1)  # on every background


def test_the_prompt_looks_at_half_of_the_planted_tokens(backend, rng):
    asked_for = set()
    for _ in range(6):
        tokens = rng.integers(32_768, size=TOKENS)
        prefill = backend.prefill(tokens, 32)
        planted, topics = MODEL.planted_tokens(tokens)
        asked = MODEL.asked(tokens)
        asked_for.add(asked)
        masses = [
            attention_mass(attention_weights(q, k, backend.scaling, causal=True), 2).numpy()
            for q, k in zip(prefill.queries, prefill.keys, strict=True)
        ]
        by_topic = [np.mean([mass[:, planted[topics == topic]].sum(axis=1) for mass in masses]) for topic in range(2)]
        assert by_topic[asked] > 0.4 and by_topic[1 - asked] < 0.05
    assert asked_for == {0, 1}


def test_queries_do_not_depend_on_how_many_are_asked_for_or_on_what_was_evicted(backend, window):
    tokens, fed = window[:TOKENS], window[TOKENS:]
    few, many = backend.prefill(tokens, 5).queries, backend.prefill(tokens, 40).queries
    assert all(torch.allclose(x, y[:, -5:]) for x, y in zip(few, many, strict=True))
    assert backend.prefill(tokens, 0).queries[0].shape == (4, 0, 64)

    prefill = backend.prefill(tokens, 0)
    whole = backend.extend(backend.compress(prefill, None, Dense()), fed)
    small = backend.compress(prefill, [torch.arange(0, TOKENS, 9).repeat(2, 1)] * 4, TurboQuantStorage(4, 4, flush=16))
    first, second = backend.extend(small, fed[:20]), backend.extend(small, fed[20:])
    for at_once, x, y in zip(whole.queries, first.queries, second.queries, strict=True):
        assert torch.allclose(at_once, torch.cat([x, y], dim=1))
    held = backend.contents(small)
    assert small.position == TOKENS + 64 and held.keys[0].shape == (2, len(range(0, TOKENS, 9)) + 64, 64)
    assert held.positions[3][:, -1].tolist() == [TOKENS + 63] * 2
    assert whole.logits.numel() == prefill.logits.numel() == 0


def test_statistics_are_those_of_the_queries_of_many_prompts(backend, rng):
    tokens, positions = rng.integers(32_768, size=800), np.arange(800)
    sums = Accumulator(4, 4, 32)
    length = MODEL.query_length(positions).mean()
    for topic in range(2):
        for layer, queries in enumerate(MODEL.queries(tokens, positions, [topic]) / length):
            sums.add(layer, queries)
    measured, stated = sums.statistics(), MODEL.statistics()
    np.testing.assert_allclose(stated.mu, measured.mu, atol=0.02)
    np.testing.assert_allclose(stated.modulus, measured.modulus, atol=0.02)
    assert np.abs(stated.mu).max() > 0.3
    certain = replace(MODEL, query_noise=0.0).statistics()
    assert np.all(certain.modulus >= np.abs(certain.mu) - 1e-12) and np.all(
        certain.modulus[..., : MODEL.slow_bands[0]] == 0
    )


@pytest.mark.parametrize("scorer", [Fourier(), Wavelet()])
def test_a_spectral_scorer_finds_all_planted_tokens_in_a_tone_without_noise(scorer, window):
    backend = SyntheticBackend(CLEAN, device="cpu", cache_dtype="float32")
    prefill = backend.prefill(window[:TOKENS], 0)
    budget = Budget(200, sinks=4, recent=16)
    middle = budget.evictable(TOKENS)
    view = LayerView(prefill.keys[TONE], prefill.values[TONE], backend.rope, np.arange(TOKENS), middle, scaling=1)
    planted = backend.planted(window[:TOKENS])
    planted = planted[(planted >= middle.start) & (planted < middle.stop)]
    for head in select(scorer.score(view), budget).numpy():
        assert np.isin(planted, head).all()
    smooth = replace(scorer, sign="smoothness", norm_weight=0.0)
    assert not np.isin(planted, select(smooth.score(view), budget).numpy()).any()


def test_nothing_is_predicted(backend, window):
    cache = backend.compress(backend.prefill(window[:TOKENS], 0), None, Dense())
    with pytest.raises(NotImplementedError, match="predicts no tokens"):
        backend.generate(cache, 1, 1)


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"layers": 0}, "model.layers=0"),
        ({"query_heads": 3}, "model.query_heads=3 must be a multiple of model.kv_heads=2"),
        ({"dim": 31}, "model.dim=31 must be even"),
        ({"dim": 8}, "model.context=8192 is too long .* lower the first"),
        ({"planted": 0.0}, "model.planted=0.0"),
        ({"share": 0.01}, "model.share=0.01 must lie between model.planted=0.015625 and 1"),
        ({"deviation": 0.0}, "model.deviation=0.0"),
        ({"query_noise": -1.0}, "model.query_noise=-1.0"),
        ({"snr_db": float("nan")}, "model.snr_db=nan"),
    ],
)
def test_impossible_models_are_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        SyntheticModel(**parameters)
