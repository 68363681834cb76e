"""`spectral_kv.cache(storage="spectral")`: groups of layers are coded in common while a prompt runs layer by layer."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import spectral_kv
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.storage.spectral import SpectralStorage
from tests.spectral_kv.coded_qwen import qwen, text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three layers in groups of two and one, with bases in the model's folder."""
    return qwen(tmp_path_factory.mktemp("model"), 3)


def fed(model, cache, *parts, mask=None):
    """Logits of the last token after parts that are fed one after the other."""
    with torch.no_grad():
        for ids in parts:
            positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
            mask = None
    return logits


def small(bits=3.0) -> SpectralStorage:
    return SpectralStorage(ratio=None, bits=bits, recent=20, flush=8)


def test_bases_lie_in_groups_of_layers(model):
    folder = model.config._name_or_path
    found = spectral_kv.storage.spectral.Bases.load(f"{folder}/bases.safetensors", (3, 2, 16))
    assert [block.layers for block in found.blocks] == [(0, 1), (2,)]


def test_a_prompt_is_held_as_the_pipeline_holds_it(model):
    ids = text(150)
    cache = spectral_kv.cache(model, "full", storage=small())
    fed(model, cache, ids)
    backend = TorchBackend.wrap(model)
    theirs = backend.compress(backend.prefill(ids[0].numpy(), 1), None, cache.compressor.storage)
    assert cache.nbytes == theirs.nbytes < 150 * 3 * 2 * 2 * 16 * 2
    for a, b in zip(cache.layers, theirs.layers, strict=True):
        for pair in zip(a.sequences[0].stored.load(), b.stored.load(), strict=True):
            torch.testing.assert_close(*pair)


def test_a_row_of_a_batch_is_the_sequence_alone(model):
    ids = text(90, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    more = [text(1, seed, batch=2) for seed in range(12)]
    cache = spectral_kv.cache(model, "full", storage=small())
    together = fed(model, cache, ids, mask=mask)
    for step, ids_of_step in enumerate(more):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        together = fed(model, cache, ids_of_step, mask=mask)
        assert cache.held == 91 + step
    for row, start in enumerate((0, 30)):
        alone = fed(model, spectral_kv.cache(model, "full", storage=small()), ids[row : row + 1, start:],
                    *(x[row : row + 1] for x in more))  # fmt: skip
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_sequences_that_part_do_not_touch_one_another(model):
    """As beams do: both go on from one, layer by layer in turn."""
    ids = text(60)
    beams = spectral_kv.cache(model, "full", storage=small())
    fed(model, beams, ids)
    beams.batch_select_indices(torch.tensor([0, 0]))
    steps = [text(1, seed, batch=2) for seed in range(10)]
    parted = fed(model, beams, *steps)
    for row in range(2):
        alone = spectral_kv.cache(model, "full", storage=small())
        torch.testing.assert_close(
            parted[row], fed(model, alone, ids, *(x[row : row + 1] for x in steps))[0], atol=1e-4, rtol=1e-4
        )


def test_more_bits_come_closer_to_the_plain_cache(model):
    def last(cache):
        ids = text(100)
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3)
        return fed(model, cache, text(1, 7))

    exact, near, far = (last(c) for c in (DynamicCache(), *(
        spectral_kv.cache(model, "full", storage=small(bits)) for bits in (5.5, 1.5))))  # fmt: skip
    assert (near - exact).norm() < 0.3 * (far - exact).norm()


def test_short_prompts_are_coded_once_they_are_longer(model):
    cache = spectral_kv.cache(model, "full", storage=small())
    fed(model, cache, text(10), text(40, 1), *(text(1, seed) for seed in range(9)))
    group = cache.layers[0].sequences[0].stored.group
    assert (group.coded, cache.held) == (32, 59)


def test_the_ratio_is_that_of_the_tokens_in_codes(model):
    sizes = []
    for tokens in (200, 328):
        cache = spectral_kv.cache(model, "full", storage=SpectralStorage(ratio=4, recent=16))
        fed(model, cache, text(tokens))
        sizes.append(cache.nbytes)
    assert 4 <= 128 * 3 * 2 * 2 * 16 * 2 / (sizes[1] - sizes[0]) < 4.4


@pytest.mark.parametrize("storage", ["spectral", small()])
def test_a_saved_cache_continues_bit_for_bit(model, tmp_path, storage):
    ids = text(130, batch=2)
    cache = spectral_kv.cache(model, "full", storage=storage)
    fed(model, cache, ids, text(3, 5, batch=2))
    cache.save(tmp_path / "cache", tokens=ids)
    own = {} if isinstance(storage, str) else {"storage": storage}
    again = spectral_kv.load(tmp_path / "cache", model, tokens=ids, **own)
    assert again.nbytes == cache.nbytes and again.position == cache.position == 133
    for seed in range(12):
        more = text(1, seed, batch=2)
        assert torch.equal(fed(model, cache, more), fed(model, again, more))


def test_what_can_not_be_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="SpectralStorage keeps every token, and wavelet evicts: choose method=full"):
        spectral_kv.cache(model, storage="spectral")
    with pytest.raises(ValueError, match=r"is not there: save spectral_kv\.bases"):
        spectral_kv.cache(model, "full", storage=SpectralStorage(str(tmp_path / "none")))
    with pytest.raises(ValueError, match="the shortest has 10"):
        spectral_kv.bases(model, [text(10)[0].numpy()])
    cache = spectral_kv.cache(model, "full", storage="spectral")
    fed(model, cache, text(130))
    cache.save(tmp_path / "cache")
    file = tmp_path / "own.safetensors"
    (Path(model.config._name_or_path) / "bases.safetensors").rename(file)
    with pytest.raises(ValueError, match=r"is not there: save spectral_kv\.bases"):
        spectral_kv.load(tmp_path / "cache", model)
    spectral_kv.bases(model, [text(200, 9)[0].numpy()], layers=2).save(
        Path(model.config._name_or_path) / "bases.safetensors"
    )
    with pytest.raises(ValueError, match="written with other bases"):
        spectral_kv.load(tmp_path / "cache", model)
    file.rename(Path(model.config._name_or_path) / "bases.safetensors")
    assert spectral_kv.load(tmp_path / "cache", model).nbytes == cache.nbytes
