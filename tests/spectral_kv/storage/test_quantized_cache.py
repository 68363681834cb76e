import numpy as np
import pytest
import torch

from spectral_kv.storage import quantized_cache
from spectral_kv.storage.quantized_cache import QuantizedCacheStorage

OPTIONS = [
    pytest.param("quanto", 4, marks=pytest.mark.slow),  # compiles when it is first read
    pytest.param("quanto", 2, marks=pytest.mark.slow),
    ("hqq", 4),
    ("hqq", 2),
]
each_option = pytest.mark.parametrize("library, bits", OPTIONS)


def storage(library: str, bits: int, **settings) -> QuantizedCacheStorage:
    pytest.importorskip(quantized_cache.MODULES[library][-1])
    return QuantizedCacheStorage(library, bits, **settings)


def kept(tokens: int, heads: int = 2, dim: int = 64, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, 1, heads, tokens, dim), generator=generator).to(dtype)
    return keys, values


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm())


@each_option
def test_sinks_and_recent_window_stay_exact_and_the_rest_close(library, bits):
    keys, values = kept(200)
    stored = storage(library, bits, sinks=3, recent=20).store(keys, values, layer=1)
    assert stored.tokens == 200
    for loaded, x in zip(stored.load(), (keys, values), strict=True):
        assert loaded.dtype == x.dtype and loaded.shape == x.shape
        assert torch.equal(loaded[..., :3, :], x[..., :3, :]) and torch.equal(loaded[..., 180:, :], x[..., 180:, :])
        low, high = {4: (0.05, 0.12), 2: (0.3, 0.6)}[bits]
        assert low < distance(loaded[..., 3:180, :], x[..., 3:180, :]) < high


@each_option
@pytest.mark.parametrize("dim, group_size", [(64, 64), (128, 64), (128, 128), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_formula_gives_the_bytes_that_live_for_every_number_of_tokens(library, bits, dim, group_size, dtype):
    held = storage(library, bits, group_size=group_size, sinks=2, recent=3)
    for heads in (1, 3):
        for tokens in (1, 5, 6, 7, 8, 9, 12, 30):
            keys, values = kept(tokens, heads, dim, dtype)
            stored = held.store(keys, values, layer=0)
            assert stored.nbytes == held.nbytes(tokens, heads, dim, dtype.itemsize)
            coded = () if stored.coded is None else stored.coded.pairs
            live = [x for pair in coded for piece in pair for x in quantized_cache._tensors(piece.held)]
            live += [*stored.first, *stored.recent]
            assert stored.nbytes == sum(x.untyped_storage().nbytes() for x in live)
            assert distance(stored.load()[0], keys) < {4: 0.12, 2: 0.6}[bits]


@pytest.mark.parametrize("library", ["quanto", "hqq"])
@pytest.mark.parametrize("bits, group", [(4, 32 + 4), (2, 16 + 4)])
def test_64_channels_take_their_codes_a_scale_and_a_zero_point(library, bits, group):
    held = storage(library, bits, sinks=0, recent=0)
    assert held.store(*kept(100), layer=0).nbytes == held.nbytes(100, 2, 64, 2) == 2 * 2 * 100 * group


@each_option
def test_a_token_does_not_change_the_groups_of_another(library, bits):
    """Groups lie within a token, so a huge one costs the others nothing."""
    keys, values = kept(40)
    keys[..., 7, :] *= 1000
    loaded = storage(library, bits, sinks=0, recent=0).store(keys, values, layer=0).load()[0]
    others = [t for t in range(40) if t != 7]
    assert distance(loaded[..., others, :], keys[..., others, :]) < {4: 0.12, 2: 0.6}[bits]


@each_option
def test_fed_tokens_are_quantised_in_chunks_once_they_have_left_the_window(library, bits):
    held = storage(library, bits, sinks=2, recent=8, flush=4)
    keys, values = kept(60)
    first = stored = held.store(keys[..., :30, :], values[..., :30, :], layer=0)
    before = first.load()[0]
    for t in range(30, 60):
        stored = stored.append(keys[..., t : t + 1, :], values[..., t : t + 1, :])
        exact = stored.recent[0].shape[-2]
        assert 8 <= exact <= 12 and stored.tokens == t + 1
        assert torch.equal(stored.load()[1][..., t + 1 - exact :, :], values[..., t + 1 - exact : t + 1, :])
    assert [piece.shape[-2] for piece, _ in stored.coded.pairs] == [20, *[4] * 7]
    assert torch.equal(stored.load()[0][..., :22, :], before[..., :22, :])  # never quantised again
    assert distance(stored.load()[0], keys) < {4: 0.12, 2: 0.6}[bits]
    assert first.tokens == 30 and torch.equal(first.load()[0], before)


@each_option
def test_taken_rows_keep_their_heads_their_order_and_the_layout(library, bits):
    held = storage(library, bits, sinks=2, recent=5)
    keys, values = kept(50)
    stored = held.store(keys, values, layer=0)
    chosen = torch.stack([torch.arange(0, 50, 2), torch.arange(25, 50)])[None]
    taken = stored.take(chosen)
    assert taken.tokens == 25 and taken.nbytes == held.nbytes(25, 2, 64, 2) and stored.tokens == 50
    for now, then, x in zip(taken.load(), stored.load(), (keys, values), strict=True):
        then, x = (y.take_along_dim(chosen[..., None], dim=-2) for y in (then, x))
        assert torch.equal(now[..., :2, :], then[..., :2, :]) and torch.equal(now[..., -5:, :], then[..., -5:, :])
        assert distance(now, then) < 0.5 * distance(then, x)  # quantising again costs less than the first time
    assert taken.append(keys[..., :1, :], values[..., :1, :]).tokens == 26


@each_option
@pytest.mark.parametrize("tokens", [2, 23, 24])
def test_fewer_tokens_than_the_exact_ones(library, bits, tokens):
    keys, values = kept(tokens)
    stored = storage(library, bits, sinks=3, recent=20).store(keys, values, layer=0)
    assert torch.equal(stored.load()[0][..., :3, :], keys[..., :3, :])
    assert stored.tokens == stored.load()[1].shape[-2] == tokens
    assert (stored.coded is not None) == (tokens > 23)


@pytest.mark.parametrize("library", ["quanto", "hqq"])
def test_refuses_groups_that_straddle_tokens_and_names_one_that_fits(library):
    held = storage(library, 4)
    for use in (lambda: held.nbytes(300, 2, 96, 2), lambda: held.store(*kept(300, dim=96), layer=0)):
        with pytest.raises(ValueError, match=r"group_size=64 .* dimension 96: set group_size=32"):
            use()


def test_refuses_other_arrays():
    x = np.zeros((2, 300, 64), np.float32)
    with pytest.raises(ValueError, match=r"hqq at 4 bits holds torch tensors, not numpy\.ndarray"):
        storage("hqq", 4).store(x, x, layer=0)


@pytest.mark.parametrize("library, missing", [("quanto", "optimum"), ("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, library, missing):
    def only_others(name):
        assert name == missing or name == "optimum" != missing  # a submodule of what is missing can't be looked for
        return None if name == missing else object()

    monkeypatch.setattr(quantized_cache, "find_spec", only_others)
    with pytest.raises(ValueError, match=rf"{library} at 2 bits needs .* pip install 'spectral-kv\[quantized\]'"):
        QuantizedCacheStorage(library, 2)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"library": "gptq"}, "choose quanto or hqq"),
        ({"bits": 3}, "bits=3"),
        ({"group_size": 1}, "group_size=1"),
        ({"recent": -1}, "recent=-1"),
        ({"flush": 0}, "flush=0"),
    ],
)
def test_refuses_impossible_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        QuantizedCacheStorage(**settings)
