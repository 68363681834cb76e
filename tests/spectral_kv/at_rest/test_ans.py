"""The entropy coder in array operations, and its kernels on a GPU or in Triton's interpreter."""

import threading

import numpy as np
import pytest
import torch

from spectral_kv.at_rest import ans
from spectral_kv.at_rest.entropy import CAP, WHOLE, WIDTH, Tables, entropy, histogram

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(rng, rows: int, streams: int, turns: int, lanes: int):
    """Numbers and contexts `[rows, streams, turns, lanes]`, some of which are not there, and tables."""
    contexts = rng.integers(0, 20, (rows, streams, turns, lanes)).astype(np.int8)
    numbers = np.rint(rng.laplace(size=contexts.shape) * 2.0 ** (contexts / 3 - 3)).clip(-CAP, CAP).astype(np.int16)
    met = histogram(numbers, contexts, 24)
    contexts[:, -1:, -1:, lanes // 3 :] = 24
    numbers[contexts == 24] = 0
    rows = torch.from_numpy(contexts.astype(np.int16) * WIDTH + CAP + numbers)
    return torch.from_numpy(numbers), torch.from_numpy(contexts), rows, Tables.of(met), met


@pytest.mark.parametrize("shape", [(90, 3, 2, 33), (1, 1, 1, 1), (7, 70, 3, 128), (0, 2, 1, 4)])
def test_what_is_read_is_what_was_written(rng, shape):
    numbers, contexts, rows, tables, _ = drawn(rng, *shape)
    words, counts, states = ans.encode(rows, tables)
    assert words.dtype == np.uint16 and counts.sum() == len(words) and states.shape == shape[1::2]
    decoder = ans.decoder(words, np.cumsum(counts) - counts, states, rows)
    parts = [decoder(part, tables) for part in contexts.split(40)]
    assert torch.equal(torch.cat(parts), numbers)
    assert (decoder.states == ans.LOW).all()  # where they began to be written


def test_threads_share_tables_that_are_made_once(rng, monkeypatch):
    numbers, contexts, rows, tables, _ = drawn(rng, 4, 90, 1, 128)
    words, counts, states = ans.encode(rows, tables)
    made = []
    place = Tables._at_places
    monkeypatch.setattr(Tables, "_at_places", lambda self, x: made.append(threading.current_thread()) or place(self, x))
    monkeypatch.setattr("spectral_kv.at_rest.threads.cores", lambda: 3)
    assert torch.equal(ans.Decoder(words, np.cumsum(counts) - counts, states)(contexts, tables), numbers)
    assert made == [threading.current_thread()] * 2


def test_words_are_those_of_the_definition(rng):
    """A lane after the other and a number after the other, in Python's whole numbers."""
    _, _, rows, tables, _ = drawn(rng, 30, 2, 2, 5)
    words, _, states = ans.encode(rows, tables)
    entries = tables.entries.astype(object)
    found = []
    for stream in range(2):
        state, written = [1 << 15] * 5, []
        for row in reversed(range(30)):
            for turn in reversed(range(2)):
                for lane in reversed(range(5)):
                    entry = entries[int(rows[row, stream, turn, lane])]
                    frequency, before = entry & 0xFFFF, entry >> 16
                    if state[lane] >= frequency << 19:
                        written.append(state[lane] & 0xFFFF)
                        state[lane] >>= 16
                    state[lane] = state[lane] // frequency * WHOLE + before + state[lane] % frequency
        found += reversed(written)
        assert state == states[stream].tolist()
    assert words.tolist() == found


def test_bytes_are_those_of_the_entropy(rng):
    _, contexts, rows, tables, met = drawn(rng, 3000, 1, 1, 16)
    words, _, _ = ans.encode(rows, tables)
    assert abs(8 * words.nbytes - entropy(met) * float((contexts < 24).float().mean())) < 0.01 * entropy(met)


def test_lanes_take_two_turns_at_least():
    assert ans.lanes_of(256) == (128, 2)
    assert ans.lanes_of(1) == (1, 1)
    for tokens in (7, 100, 255, 1000):
        lanes, turns = ans.lanes_of(tokens)
        assert lanes <= 128 and turns >= 2 and lanes * turns >= tokens


@pytest.mark.parametrize("shape", [(11, 2, 2, 20), (5, 2, 1, 1), (3, 1, 3, 130)])
def test_kernels_write_and_read_the_same_bytes(rng, shape):
    kernels = pytest.importorskip("spectral_kv.at_rest.ans_kernels", reason="needs Triton")
    numbers, contexts, rows, tables, _ = drawn(rng, *shape)
    ours = ans.encode(rows, tables)
    for one, other in zip(ours, kernels.encode(rows.to(DEVICE), tables), strict=True):
        np.testing.assert_array_equal(one, other)
    words, counts, states = ours
    decoder = kernels.Decoder(words, np.cumsum(counts) - counts, states, torch.device(DEVICE))
    parts = [decoder(part.to(DEVICE), tables).cpu() for part in contexts.split(4)]
    assert torch.equal(torch.cat(parts), numbers)


def test_tiles_and_streams_are_on_the_axis_that_has_room_for_them(rng, monkeypatch):
    """A GPU starts no more than 65535 programs along any axis but the first."""
    kernels = pytest.importorskip("spectral_kv.at_rest.ans_kernels", reason="needs Triton")
    grids = []

    class Started:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    for name in ("count_words", "gather_words"):
        monkeypatch.setattr(kernels, name, Started(getattr(kernels, name)))
    monkeypatch.setattr(kernels, "TILE", 8)
    _, _, rows, tables, _ = drawn(rng, 3, 2, 1, 8)
    for one, other in zip(ans.encode(rows, tables), kernels.encode(rows.to(DEVICE), tables), strict=True):
        np.testing.assert_array_equal(one, other)
    assert grids == [(6,)] * 2


def test_words_that_are_no_stream_are_read_to_their_end_and_alike(rng):
    """Whatever they say: zeros follow the last of them."""
    kernels = pytest.importorskip("spectral_kv.at_rest.ans_kernels", reason="needs Triton")
    _, contexts, _, tables, _ = drawn(rng, 24, 2, 1, 9)
    contexts.clamp_(max=19)
    states = rng.integers(ans.LOW, 2**31, (2, 9)).astype(np.int32)
    for count in (0, 1, 20):
        words, starts = rng.integers(0, 2**16, count).astype(np.uint16), np.array([0, count // 2])
        ours = ans.Decoder(words, starts, states)
        found = ours(contexts, tables)
        assert (ours.at > count).any()
        theirs = kernels.Decoder(words, starts, states, torch.device(DEVICE))
        assert torch.equal(theirs(contexts.to(DEVICE), tables).cpu(), found)


def test_a_kernel_counts(rng):
    kernels = pytest.importorskip("spectral_kv.at_rest.ans_kernels", reason="needs Triton")
    numbers = rng.integers(0, 50, 3000).astype(np.int16)
    found = kernels.counts(torch.from_numpy(numbers).to(DEVICE), 60, copies=3, block=256)
    np.testing.assert_array_equal(found, np.bincount(numbers, minlength=60))
