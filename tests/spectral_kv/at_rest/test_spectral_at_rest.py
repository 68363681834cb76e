import numpy as np
import pytest
import torch

from spectral_kv.at_rest.content import AtRest
from spectral_kv.at_rest.storage import SpectralAtRest
from spectral_kv.storage.dense import Dense, DenseTokens

SHAPE = (2, 2, 16)  # layers, kv_heads, dim


@pytest.fixture(scope="module")
def prefill(backend):
    return backend.prefill(np.random.default_rng(0).integers(2, 8000, size=1500), 1)


def written(backend, prefill, storage) -> AtRest:
    return storage.encode(prefill.keys, prefill.values, np.arange(1500), backend.rope)


def read(backend, prefill, storage, content, *span):
    return storage.decode(content, SHAPE, backend.rope, prefill.keys[0], *span)


def error(prefill, pairs) -> float:
    found = [
        (x - y, y)
        for pair, *own in zip(pairs, prefill.keys, prefill.values, strict=True)
        for x, y in zip(pair, own, strict=True)
    ]
    return float(np.mean([(d**2).mean() / (y**2).mean() for d, y in found]))


@pytest.mark.parametrize("ratio", [2, 5, 9])
def test_a_ratio_is_met_by_all_that_is_written(backend, prefill, bases_path, ratio):
    content = written(backend, prefill, SpectralAtRest(bases_path, ratio, recent=20)).to_bytes()
    in_16_bits = 1500 * 2 * 2 * 2 * 16 * 2
    assert abs(in_16_bits / len(content) / ratio - 1) < 0.02


def test_errors_grow_with_the_ratio_and_ends_stay_as_they_are(backend, prefill, bases_path):
    errors = []
    for ratio in (4, 8):
        storage = SpectralAtRest(bases_path, ratio, recent=20)
        pairs = read(backend, prefill, storage, written(backend, prefill, storage))
        for pair, *own in zip(pairs, prefill.keys, prefill.values, strict=True):
            for x, y in zip(pair, own, strict=True):
                assert x.shape == y.shape and x.dtype == y.dtype
                assert torch.equal(x[:, :4], y[:, :4]) and torch.equal(x[:, -20:], y[:, -20:])
        errors.append(error(prefill, pairs))
    assert 0 < errors[0] < 0.1 and 2 * errors[0] < errors[1] < 0.5


def test_a_distortion_is_met_and_a_step_is_taken(backend, prefill, bases_path):
    losses = []
    for distortion in (0.05, 0.2):
        storage = SpectralAtRest(bases_path, None, distortion=distortion, recent=20)
        content = written(backend, prefill, storage)
        weights = storage.read(SHAPE).blocks[0].weights
        lost = 0.0
        for index, pair in enumerate(read(backend, prefill, storage, content)):
            for kind, (x, y) in enumerate(zip(pair, (prefill.keys[index], prefill.values[index]), strict=True)):
                at = (2 * kind + index) * 32
                own = weights[at : at + 32].reshape(
                    2, 1, 16
                )  # alike in both channels of a pair: rotations keep the sum
                lost += float((((x - y).numpy() * own) ** 2).sum())
        losses.append(lost / 40)  # predictions that the bases were measured by
    np.testing.assert_allclose(losses, [0.05, 0.2], rtol=0.1)
    step = content.header["step"]
    again = written(backend, prefill, SpectralAtRest(bases_path, None, step, recent=20))
    assert again.to_bytes() == content.to_bytes()


def test_some_tokens_are_read_alone(backend, prefill, bases_path):
    storage = SpectralAtRest(bases_path, 8, recent=20, chunk=100, along=None)
    content = written(backend, prefill, storage)
    whole = read(backend, prefill, storage, content)
    for span in ((0, 3), (2, 5), (350, 420), (1400, 1490), (1485, 1500)):
        for pair, some in zip(whole, read(backend, prefill, storage, content, *span), strict=True):
            for x, y in zip(pair, some, strict=True):
                torch.testing.assert_close(x[:, slice(*span)], y, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="are not among the 1500"):
        read(backend, prefill, storage, content, 1400, 1600)


def test_positions_of_chosen_tokens_are_kept(backend, prefill, bases_path):
    positions = np.r_[0:10, 400:1500]
    keys, values = ([x[:, positions] for x in part] for part in (prefill.keys, prefill.values))
    storage = SpectralAtRest(bases_path, None, 1e-4, recent=20)
    content = storage.encode(keys, values, positions, backend.rope)
    for (x, _), y in zip(storage.decode(content, SHAPE, backend.rope, keys[0]), keys, strict=True):
        assert ((x - y) ** 2).mean() < 0.01 * (y**2).mean()


def test_bytes_give_the_same_cache(backend, prefill, bases_path):
    storage = SpectralAtRest(bases_path, 8)
    content = written(backend, prefill, storage).to_bytes()
    assert content == written(backend, prefill, storage).to_bytes()
    once, again = (read(backend, prefill, storage, AtRest.from_bytes(content)) for _ in range(2))
    assert all(torch.equal(x, y) for a, b in zip(once, again, strict=True) for x, y in zip(a, b, strict=True))


def test_a_cache_that_was_at_rest_goes_on(backend, prefill, bases_path):
    fed = np.arange(10, 20)
    full = backend.extend(backend.compress(prefill, None, Dense()), fed).logits
    logits = []
    for step in (1e-4, 1e-2):
        cache = backend.compress(prefill, None, SpectralAtRest(bases_path, None, step))
        assert isinstance(cache.layers[0].stored, DenseTokens) and cache.position == 1500
        assert cache.nbytes == SpectralAtRest(bases_path).nbytes_together(1500, *SHAPE, 4)
        logits.append(backend.extend(cache, fed).logits)
    near, far = ((x - full).norm() for x in logits)
    assert near < 0.2 * far


def test_smaller_groups_follow_from_larger_ones(backend, prefill, bases_path):
    """In one basis for both layers is all that is known of either."""
    pair, single = SpectralAtRest(bases_path, 6).read(SHAPE), SpectralAtRest(bases_path, 6, layers=1).read(SHAPE)
    assert [block.layers for block in single.blocks] == [(0,), (1,)]
    for block in single.blocks:
        covariance = lambda b: (b.basis.astype(float) * b.variances) @ b.basis.T.astype(float)  # noqa: E731
        at = np.r_[0:32, 64:96] + 32 * block.layers[0]
        expected = covariance(pair.blocks[0])[np.ix_(at, at)]
        np.testing.assert_allclose(covariance(block), expected, atol=2e-3 * np.abs(expected).max())
        np.testing.assert_array_equal(block.mean, pair.blocks[0].mean[at])
    with pytest.raises(ValueError, match="groups of 1, 1 layers, which can't be cut"):
        single.regrouped(2)
    errors = [
        error(prefill, read(backend, prefill, s, written(backend, prefill, s)))
        for s in (SpectralAtRest(bases_path, 8), SpectralAtRest(bases_path, 8, layers=1))
    ]
    assert errors[0] != errors[1] and max(errors) < 0.6


def test_a_transform_along_tokens_is_used_where_it_pays(backend, prefill, bases_path):
    """Tokens that are held for a while are smooth; tokens of very different sizes are not."""
    sizes = torch.from_numpy(np.random.default_rng(2).lognormal(0, 1.5, (1500, 1)).astype(np.float32))
    rough = [[x * sizes for x in part] for part in (prefill.keys, prefill.values)]
    smooth = [
        [x[:, np.arange(1500) // 16 * 16] if kind else backend.rope.rotate(
            backend.rope.unrotate(x, np.arange(1500))[:, np.arange(1500) // 16 * 16], np.arange(1500))
         for x in part]
        for kind, part in enumerate((prefill.keys, prefill.values))
    ]  # fmt: skip
    plain, along = (SpectralAtRest(bases_path, None, 2e-3, recent=20, **a) for a in ({"along": None}, {}))
    assert "along" not in along.encode(*rough, np.arange(1500), backend.rope).header
    held, less = (s.encode(*smooth, np.arange(1500), backend.rope) for s in (plain, along))
    assert less.header["along"] == 64
    assert len(less.to_bytes()) < 0.8 * len(held.to_bytes())
    whole = along.decode(less, SHAPE, backend.rope, prefill.keys[0])
    for (k, v), a, b in zip(whole, *smooth, strict=True):
        assert ((k - a) ** 2).mean() < 0.05 * (a**2).mean() and ((v - b) ** 2).mean() < 0.05 * (b**2).mean()
    for span in ((290, 1480), (259, 261), (1470, 1490), (0, 5)):
        part_of_it = along.decode(less, SHAPE, backend.rope, prefill.keys[0], *span)
        for (k, _), (some, _) in zip(whole, part_of_it, strict=True):
            torch.testing.assert_close(some, k[:, slice(*span)], atol=1e-4, rtol=1e-4)


def test_ratios_are_met_and_weights_count_with_a_transform_along_tokens(backend, prefill, bases_path):
    held = [x[:, np.arange(1500) // 16 * 16] for x in prefill.values]
    storage, positions = SpectralAtRest(bases_path, 8, recent=20), np.arange(1500)
    importance = np.ones(1500)
    importance[320:640] = 8
    errors = []
    for own in (storage, storage.weighing(importance)):
        content = own.encode(held, held, positions, backend.rope)
        assert content.header["along"] == 64
        assert abs(1500 * 2 * 2 * 2 * 16 * 2 / len(content.to_bytes()) / 8 - 1) < 0.02
        (_, v), _ = storage.decode(content, SHAPE, backend.rope, held[0])
        lost = (v - held[0]) ** 2
        errors.append([float(lost[:, part].mean()) for part in (slice(320, 640), slice(700, 1400))])
    assert errors[1][0] < 0.7 * errors[0][0] and errors[1][1] > errors[0][1]


def test_fewer_tokens_than_a_block_are_not_transformed_along_them(backend, prefill, bases_path):
    keys, values = ([x[:, :100] for x in part] for part in (prefill.keys, prefill.values))
    content = SpectralAtRest(bases_path, None, 1e-4).encode(keys, values, np.arange(100), backend.rope)
    assert content.header["coded"] == 32 and "along" not in content.header


def test_tokens_that_matter_are_coded_finer_at_the_same_bytes(backend, prefill, bases_path):
    importance = np.ones(1500)
    importance[300:600] = 8
    plain = SpectralAtRest(bases_path, 8, recent=20)
    sizes, errors = [], []
    for storage in (plain, plain.weighing(importance)):
        content = written(backend, prefill, storage)
        sizes.append(len(content.to_bytes()))
        pairs = read(backend, prefill, plain, content)  # bytes say themselves how they are to be read
        some = read(backend, prefill, plain, content, 500, 700)
        torch.testing.assert_close(some[1][1], pairs[1][1][:, 500:700], atol=1e-4, rtol=1e-4)
        squares = [(x - y) ** 2 for pair, v in zip(pairs, prefill.values, strict=True) for x, y in [(pair[1], v)]]
        errors.append([float(np.mean([s[:, part].mean() for s in squares])) for part in (
            slice(300, 600), slice(700, 1400))])  # fmt: skip
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]
    assert errors[1][0] < 0.5 * errors[0][0] and errors[1][1] > 1.05 * errors[0][1]
    assert plain.importance is None


@pytest.mark.parametrize("importance", [np.zeros(1500), np.full(1500, -1.0), np.full(1500, np.nan), np.ones((2, 1500))])
def test_importance_that_says_nothing_is_refused(importance):
    with pytest.raises(ValueError, match="importance must be one number a token"):
        SpectralAtRest("bases.safetensors").weighing(importance)


def test_keys_that_a_gradient_is_asked_of_are_written_alike(backend, prefill, bases_path):
    storage, positions = SpectralAtRest(bases_path, 8), np.arange(1500)
    keys = [k.clone().requires_grad_() * 1.0 for k in prefill.keys]
    content = storage.encode(keys, prefill.values, positions, backend.rope).to_bytes()
    assert content == written(backend, prefill, storage).to_bytes()


def test_nothing_need_be_exact(backend, prefill, bases_path):
    storage = SpectralAtRest(bases_path, 8, sinks=0, recent=0)
    content = written(backend, prefill, storage)
    assert 0 < error(prefill, read(backend, prefill, storage, AtRest.from_bytes(content.to_bytes()))) < 0.5


def test_mlx_writes_and_reads_the_same(backend, prefill, bases_path):
    """Numbers differ only where a product that was rounded in another order falls to the other side."""
    mx = pytest.importorskip("mlx.core")
    keys, values = ([mx.array(x.numpy()) for x in part] for part in (prefill.keys, prefill.values))
    storage = SpectralAtRest(bases_path, 8)
    ours = written(backend, prefill, storage)
    theirs = storage.encode(keys, values, np.arange(1500), backend.rope)
    assert abs(len(ours.to_bytes()) - len(theirs.to_bytes())) < 0.01 * len(ours.to_bytes())
    for a, b in zip(
        read(backend, prefill, storage, ours), storage.decode(ours, SHAPE, backend.rope, keys[0]), strict=True
    ):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x.numpy(), np.array(y), atol=1e-4)
    errors = [
        error(prefill, [[torch.from_numpy(np.array(x)) for x in pair] for pair in pairs])
        for pairs in (
            read(backend, prefill, storage, ours),
            storage.decode(theirs, SHAPE, backend.rope, keys[0]),
        )
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_short_prompts_stay_as_they_are(backend, bases_path):
    prefill = backend.prefill(np.arange(5, 55), 1)
    storage = SpectralAtRest(bases_path, None, distortion=0.01)
    content = storage.encode(prefill.keys, prefill.values, np.arange(50), backend.rope)
    for pair, *own in zip(read(backend, prefill, storage, content), prefill.keys, prefill.values, strict=True):
        assert torch.equal(pair[0], own[0]) and torch.equal(pair[1], own[1])


def test_other_bases_are_refused(backend, prefill, bases_path, tmp_path):
    content = written(backend, prefill, SpectralAtRest(bases_path, 8))
    SpectralAtRest(bases_path).read(SHAPE).truncated(0.9).save(tmp_path / "other")
    with pytest.raises(ValueError, match="other bases"):
        read(backend, prefill, SpectralAtRest(str(tmp_path / "other")), content)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"step": 1}, "give one of them"),
        ({"ratio": None}, "give one of them"),
        ({"ratio": 0.5}, "above 1"),
        ({"ratio": None, "step": 0}, "step=0 must be above 0"),
        ({"chunk": 0}, "chunk=0"),
        ({"layers": 0}, "layers=0"),
        ({"along": 48}, "along=48 must divide chunk=256"),
        ({"recent": -1}, "negative"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SpectralAtRest("bases.safetensors", **settings)


def test_targets_that_can_not_be_met_are_refused(backend, prefill, bases_path):
    with pytest.raises(ValueError, match="ratio=40 can't be met"):
        written(backend, prefill, SpectralAtRest(bases_path, 40))
    with pytest.raises(ValueError, match="losing all coded tokens"):
        written(backend, prefill, SpectralAtRest(bases_path, None, distortion=1e9))
