from itertools import pairwise

import pytest
import torch

from spectral_kv.storage.base import Stored
from spectral_kv.storage.dense import Dense, DenseTokens
from spectral_kv.storage.turboquant import TurboQuantStorage
from spectral_kv.storage.windowed import WindowedTokens
from spectral_kv.xp import rows


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


def test_keys_keep_their_norm():
    keys, values = (x.float() for x in kept(300))
    loaded, _ = TurboQuantStorage(2, 2, center_keys=False, sinks=0, recent=0).store(keys, values, layer=0).load()
    torch.testing.assert_close(loaded.norm(dim=-1), keys.norm(dim=-1), rtol=2e-3, atol=0)


def test_values_keep_their_share_in_what_they_are_summed_to():
    keys, values = (x.float() for x in kept(300))
    _, loaded = TurboQuantStorage(2, 2, sinks=0, recent=0).store(keys, values, layer=0).load()
    torch.testing.assert_close((loaded * values).sum(-1), (values * values).sum(-1), rtol=2e-3, atol=0)


def test_keys_and_values_rotate_differently():
    """Or the errors of both would be those of the same directions."""
    keys, _ = kept(50)
    coded = TurboQuantStorage(center_keys=False, sinks=0, recent=0).store(keys, keys, layer=0).coded
    assert (coded.keys.codes != coded.values.codes).float().mean() > 0.5


def test_refuses_other_bits():
    with pytest.raises(ValueError, match="2, 3 or 4"):
        TurboQuantStorage(key_bits=5)


BITS = [(2, 2), (3, 3), (4, 4), (4, 2)]
STORAGES = [Dense(), *(TurboQuantStorage(k, v) for k, v in BITS), TurboQuantStorage(center_keys=False)]
TOKENS = [1, 3, 4, 100, 132, 133, 512]  # 132 = 4 sinks + 128 recent stay exact


def tensors(stored: Stored) -> list[torch.Tensor]:
    """Every tensor that a stored layer holds."""
    if isinstance(stored, DenseTokens):
        return [stored.keys, stored.values]
    pair = () if stored.coded is None else (stored.coded.keys, stored.coded.values)
    packed = [x for p in pair for x in (p.codes, p.scale, p.mean) if x is not None]
    return [*stored.first, *packed, *stored.recent]


def codes(stored: WindowedTokens) -> list[torch.Tensor]:
    """Codes and scales `[..., tokens, bytes]` of keys and values."""
    return [x for p in (stored.coded.keys, stored.coded.values) for x in (p.codes, p.scale[..., None])]


def fed(stored: Stored, keys: torch.Tensor, values: torch.Tensor, start: int, step: int) -> Stored:
    """With the tokens from `start` on appended, `step` at a time."""
    for at in range(start, keys.shape[-2], step):
        stored = stored.append(keys[..., at : at + step, :], values[..., at : at + step, :])
    return stored


def chosen(tokens: int, count: int, heads: int = 2) -> torch.Tensor:
    """Ascending random rows `[heads, count]`."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(tokens, generator=generator)[:count].sort().values for _ in range(heads)])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_the_formula_gives_the_measured_bytes(storage, dtype, tokens):
    keys, values = (x.to(dtype) for x in kept(tokens, heads=3))
    stored = storage.store(keys, values, layer=0)
    assert storage.nbytes(tokens, 3, 64, dtype.itemsize) == stored.nbytes
    assert stored.nbytes == sum(x.numel() * x.element_size() for x in tensors(stored))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_no_tensor_keeps_a_larger_one_alive(storage):
    """A slice would: what is held is what was allocated, after storing, growing and choosing."""
    keys, values = kept(400)
    stored = storage.store(keys[:, :300].clone(), values[:, :300].clone(), layer=0)
    grown = fed(stored, keys, values, 300, 1)
    for state in (stored, grown, grown.take(chosen(400, 350)), grown.take(chosen(400, 20))):
        assert [x.untyped_storage().nbytes() for x in tensors(state)] == [x.nbytes for x in tensors(state)]
        assert sum(x.nbytes for x in tensors(state)) == state.nbytes


@pytest.mark.parametrize("step", [1, 7, 16, 40, 400])
@pytest.mark.parametrize("bits", BITS)
def test_tokens_packed_in_pieces_have_the_codes_of_tokens_packed_at_once(bits, step):
    """Without the mean of the first packing, which a store of everything would take over all tokens."""
    keys, values = kept(501)
    storage = TurboQuantStorage(*bits, sinks=3, recent=20, flush=16, center_keys=False)
    grown = fed(storage.store(keys[:, :100], values[:, :100], 0), keys[:, :500], values[:, :500], 100, step)
    grown = grown.append(keys[:, 500:], values[:, 500:])
    at_once = storage.store(keys, values, 0)
    count = codes(grown)[0].shape[-2]
    assert count == 77 + 400 // 16 * 16  # packed by the store, and by flushes
    for ours, theirs in zip(codes(grown), codes(at_once), strict=True):
        assert torch.equal(ours, theirs[:, :count])
    assert [x.shape[-2] for x in (*grown.first, *grown.recent)] == [3, 3, 21, 21]
    for part, x in zip(grown.recent, (keys, values), strict=True):
        assert torch.equal(part, x[:, 480:])


def test_how_tokens_are_fed_does_not_matter_with_a_frozen_mean():
    keys, values = kept(501)
    storage = TurboQuantStorage(sinks=3, recent=20, flush=16)
    start = storage.store(keys[:, :100], values[:, :100], 0)
    one_by_one, at_once = (
        fed(start, keys[:, :500], values[:, :500], 100, step).append(keys[:, 500:], values[:, 500:])
        for step in (1, 400)
    )
    for ours, theirs in zip(tensors(one_by_one), tensors(at_once), strict=True):
        assert torch.equal(ours, theirs)
    frozen = start.coded.keys.mean
    assert torch.equal(frozen, keys[:, 3:80].float().mean(dim=1, keepdim=True).half())
    assert torch.equal(one_by_one.coded.keys.mean, frozen)


def test_codes_of_old_tokens_never_change():
    keys, values = kept(300)
    keys[:, 100:] += 3  # the mean of later keys is another one
    storage = TurboQuantStorage(sinks=3, recent=20, flush=16)
    states = [storage.store(keys[:, :60], values[:, :60], 0)]
    for at in range(60, 300):
        states.append(states[-1].append(keys[:, at : at + 1], values[:, at : at + 1]))
    sizes = [codes(state)[0].shape[-2] for state in states]
    assert len(set(sizes)) - 1 >= 6  # flushes
    assert {after - before for before, after in pairwise(sizes)} == {0, 16}
    for before, after, size in zip(states, states[1:], sizes, strict=False):
        for old, new in zip(codes(before), codes(after), strict=True):
            assert torch.equal(new[:, :size], old)
        assert torch.equal(after.coded.keys.mean, before.coded.keys.mean)


def test_new_tokens_stay_exact_in_their_order():
    keys, values = kept(300)
    storage = TurboQuantStorage(sinks=3, recent=20, flush=16)
    stored = storage.store(keys[:, :60], values[:, :60], 0)
    for at in range(60, 300):
        stored = stored.append(keys[:, at : at + 1], values[:, at : at + 1])
        assert stored.tokens == at + 1
        for loaded, x in zip(stored.load(), (keys, values), strict=True):
            assert loaded.dtype == x.dtype and loaded.shape == (2, at + 1, 64)
            assert torch.equal(loaded[:, :3], x[:, :3]) and torch.equal(loaded[:, at - 19 :], x[:, at - 19 : at + 1])
        assert 20 <= stored.recent[0].shape[1] <= 20 + 16
    error = (stored.load()[0].float() - keys.float()).norm(dim=-1) / keys.float().norm(dim=-1)
    assert 0.05 < error[:, 3:264].mean() < 0.15


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_growing_and_choosing_leave_the_original_as_it_was(storage):
    keys, values = kept(300)
    stored = storage.store(keys[:, :200].clone(), values[:, :200].clone(), 0)
    before = [x.clone() for x in tensors(stored)]
    fed(stored, keys, values, 200, 50)
    stored.take(chosen(200, 50))
    assert all(torch.equal(x, y) for x, y in zip(tensors(stored), before, strict=True))


def test_dense_grows_and_chooses_exactly():
    keys, values = kept(300)
    grown = fed(Dense().store(keys[:, :200], values[:, :200], 0), keys, values, 200, 33)
    picked = chosen(300, 90)
    assert grown.tokens == 300 and grown.take(picked).tokens == 90
    for whole, part, x in zip(grown.load(), grown.take(picked).load(), (keys, values), strict=True):
        assert torch.equal(whole, x)
        for head in range(2):
            assert torch.equal(part[head], x[head, picked[head]])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rotation", ["haar", "hadamard"])
def test_choosing_keeps_the_codes_of_what_stays_packed(bits, rotation):
    keys, values = kept(300)
    storage = TurboQuantStorage(*bits, sinks=3, recent=20, flush=16, rotation=rotation)
    stored = fed(storage.store(keys[:, :189], values[:, :189], 0), keys, values, 189, 1)
    packed = codes(stored)[0].shape[-2]
    assert (packed, stored.recent[0].shape[1]) == (262, 35)
    sinks, recent = (torch.arange(*span).expand(2, -1) for span in ((0, 5), (260, 300)))
    picked = torch.cat([sinks, 5 + chosen(255, 105), recent], dim=1)
    taken = stored.take(picked)
    middle = picked[:, 3:-20]
    still = (middle >= 3) & (middle < 3 + packed)
    assert still.sum() > 200 and (~still).sum() >= 30  # tokens that stay packed, and exact ones that become so
    for ours, old in zip(codes(taken), codes(stored), strict=True):
        assert ours.shape[1] == 150 - 23
        assert torch.equal(ours[still], rows(old, (middle - 3).clip(0, packed - 1))[still])
    for loaded, whole, x in zip(taken.load(), stored.load(), (keys, values), strict=True):
        expected = rows(whole, picked)
        error = (loaded.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
        assert error[:, 3:-20][still].max() == 0
        lost = (loaded.float() - rows(x, picked).float()).norm(dim=-1) / rows(x, picked).float().norm(dim=-1)
        assert 0.05 < lost[:, 3:-20][~still].mean() < 0.45  # 2 bits lose 0.34 of a vector, wrong codes more than all
        assert torch.equal(loaded[:, :3], x[:, :3]) and torch.equal(loaded[:, -20:], x[:, 280:])
    assert torch.equal(taken.coded.keys.mean, stored.coded.keys.mean)
    assert taken.nbytes == storage.nbytes(150, 2, 64, 2)


@pytest.mark.parametrize("bits", BITS)
def test_choosing_again_and_again_does_not_wear_packed_tokens_out(bits):
    """Scalars that round to their neighbour at every choice would shrink a vector by a thousandth each time."""
    keys, values = kept(300)
    storage = TurboQuantStorage(*bits, sinks=3, recent=20)
    stored = taken = storage.store(keys, values, 0)
    for _ in range(5):
        taken = taken.take(torch.arange(300).expand(2, 300))
    for ours, old in zip(tensors(taken), tensors(stored), strict=True):
        assert torch.equal(ours, old)


def test_a_choice_that_fits_in_the_exact_windows_and_grows_again():
    keys, values = kept(300)
    storage = TurboQuantStorage(sinks=3, recent=20, flush=16)
    stored = storage.store(keys[:, :200], values[:, :200], 0)
    picked = torch.tensor([0, 1, 2, *range(190, 200)]).expand(2, 13)
    taken = stored.take(picked)
    assert torch.equal(taken.load()[0], keys[:, picked[0]])
    grown = fed(taken, keys, values, 200, 1)
    assert grown.tokens == grown.load()[1].shape[1] == 113
    assert torch.equal(grown.coded.keys.mean, stored.coded.keys.mean)  # what was packed first still sets it
    error = (grown.load()[0][:, 3:].float() - keys[:, 190:].float()).norm(dim=-1) / keys[:, 190:].float().norm(dim=-1)
    assert error.mean() < 0.15 and (error[:, -20:] == 0).all()


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_batch_is_its_sequences_side_by_side(storage):
    keys, values = (x.reshape(3, 2, 200, 64) for x in kept(200, heads=6))
    picked = chosen(200, 150, heads=6).reshape(3, 2, 150)

    def grown(at: slice | int) -> Stored:
        stored = storage.store(keys[at, :, :140].clone(), values[at, :, :140].clone(), 0)
        return fed(stored, keys[at], values[at], 140, 1).take(picked[at])

    batch, single = grown(slice(0, 3)), [grown(i) for i in range(3)]
    assert batch.tokens == 150
    assert batch.nbytes == sum(x.nbytes for x in single)
    for ours, *theirs in zip(tensors(batch), *(tensors(x) for x in single), strict=True):
        assert torch.equal(ours, torch.stack(theirs))
    assert batch.load()[0].shape == (3, 2, 150, 64)
