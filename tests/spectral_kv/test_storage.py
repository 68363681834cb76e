import pytest
import torch

from spectral_kv.storage.dense import Dense
from spectral_kv.storage.turboquant import TurboQuantStorage


def kept(tokens: int, heads: int = 2, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, heads, tokens, dim), generator=generator).to(torch.bfloat16)
    return keys, values


def test_512_dense_tokens_of_the_published_model_are_its_published_bytes():
    stored = [Dense().store(*kept(512), layer) for layer in range(24)]
    assert sum(s.nbytes for s in stored) == 6_291_456
    assert 4096 * stored[0].nbytes * 24 / 512 == pytest.approx(50.33e6, rel=1e-4)


@pytest.mark.parametrize("bits, vector", [(4, 34), (3, 26), (2, 18)])
def test_a_packed_vector_takes_its_codes_and_one_scalar(bits, vector):
    storage = TurboQuantStorage(key_bits=bits, value_bits=bits, sinks=0, recent=0, center_keys=False)
    assert storage.store(*kept(100), layer=0).nbytes == 2 * 2 * 100 * vector
    centred = TurboQuantStorage(key_bits=bits, value_bits=bits, sinks=0, recent=0).store(*kept(100), layer=0)
    assert centred.nbytes == 2 * 2 * 100 * vector + 2 * 64 * 2  # and the mean key of every head


def test_sinks_and_recent_window_stay_exact_and_the_rest_close():
    keys, values = kept(200)
    storage = TurboQuantStorage(sinks=3, recent=20)
    stored = storage.store(keys, values, layer=1)
    assert stored.tokens == 200
    for loaded, x in zip(stored.load(), (keys, values), strict=True):
        assert loaded.dtype == x.dtype and loaded.shape == x.shape
        assert torch.equal(loaded[:, :3], x[:, :3]) and torch.equal(loaded[:, 180:], x[:, 180:])
        error = (loaded.float() - x.float()).norm(dim=-1) / x.float().norm(dim=-1)
        assert 0.05 < error[:, 3:180].mean() < 0.15


@pytest.mark.parametrize("tokens", [2, 23, 24])
def test_fewer_tokens_than_the_exact_ones(tokens):
    keys, values = kept(tokens)
    stored = TurboQuantStorage(sinks=3, recent=20).store(keys, values, layer=0)
    assert torch.equal(stored.load()[0][:, :3], keys[:, :3])
    assert stored.tokens == stored.load()[1].shape[1] == tokens


def test_layers_rotate_differently():
    keys, values = kept(50)
    storage = TurboQuantStorage(sinks=0, recent=0)
    first, second = (storage.store(keys, values, layer).load()[0] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_refuses_other_bits():
    with pytest.raises(ValueError, match="2, 3 or 4"):
        TurboQuantStorage(key_bits=5)
