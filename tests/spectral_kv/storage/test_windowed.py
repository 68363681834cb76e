"""The windowed store under every codec: what is exact, what is coded, and that it does not matter how tokens came."""

import pytest
import torch

from spectral_kv.storage.quantized_cache import MODULES, QuantizedCacheStorage
from spectral_kv.storage.turboquant import TurboQuantStorage
from spectral_kv.storage.windowed import WindowedTokens

STORAGES = {
    "4bit": lambda **w: TurboQuantStorage(**w),
    "2bit": lambda **w: TurboQuantStorage(2, 2, **w),
    "3bit-hadamard": lambda **w: TurboQuantStorage(3, 3, center_keys=False, rotation="hadamard", **w),
    "hqq": lambda **w: QuantizedCacheStorage("hqq", 4, **w),
}


def storage(name: str, **window):
    if name in MODULES:
        pytest.importorskip(MODULES[name][-1])
    return STORAGES[name](**window)


def fed(stored: WindowedTokens, keys: torch.Tensor, values: torch.Tensor, start: int, step: int) -> WindowedTokens:
    for at in range(start, keys.shape[-2], step):
        stored = stored.append(keys[..., at : at + step, :], values[..., at : at + step, :])
    return stored


def drawn(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that drift, so that their mean depends on which of them it is taken over."""
    keys, values = torch.randn((2, 1, 2, tokens, 64), generator=torch.Generator().manual_seed(0))
    return (keys + torch.linspace(0, 8, tokens)[:, None]).to(torch.bfloat16), values.to(torch.bfloat16)


@pytest.mark.parametrize("start", [0, 10, 60, 300], ids="{} tokens stored".format)
@pytest.mark.parametrize("name", STORAGES)
def test_results_do_not_depend_on_how_tokens_were_fed(name, start):
    """Also where nothing was coded when the first token was fed: what is measured on the first chunk stays the same."""
    keys, values = drawn(start + 256 + 45)
    s = storage(name, sinks=3, recent=100, flush=32)
    first = s.store(keys[..., :start, :], values[..., :start, :], layer=1)
    one, seven, many = (fed(first, keys, values, start, step) for step in (1, 7, 256))
    sinks = min(3, start)
    stored = max(0, start - sinks - 100)
    coded = stored + (start + 301 - sinks - 100 - stored) // 32 * 32
    for grown in (one, seven, many):
        assert (grown.tokens, grown.coded.tokens, grown.nbytes) == (start + 301, coded, one.nbytes)
        assert 100 <= grown.recent[0].shape[-2] < 132
        for ours, theirs, x in zip(grown.load(), one.load(), (keys, values), strict=True):
            assert torch.equal(ours, theirs)
            assert torch.equal(ours[..., -100:, :], x[..., -100:, :])
            assert not torch.equal(ours[..., -136:-100, :], x[..., -136:-100, :])


def test_many_tokens_at_once_leave_no_more_exact_than_the_window_and_a_chunk():
    keys, values = drawn(600)
    stored = TurboQuantStorage(sinks=4, recent=128, flush=64).store(keys[..., :200, :], values[..., :200, :], layer=0)
    grown = stored.append(keys[..., 200:, :], values[..., 200:, :])
    assert grown.recent[0].shape[-2] == 128 + 400 % 64
    assert grown.coded.tokens == 68 + 400 // 64 * 64
