from itertools import pairwise

import numpy as np
import pytest
import torch

from spectral_kv.quantization.codebook import codebook
from spectral_kv.quantization.packing import unpack
from spectral_kv.quantization.rotation import ROTATIONS
from spectral_kv.quantization.turboquant import PackedVectors, TurboQuant
from tests.spectral_kv.quantization.test_codebook import DISTORTION

BITS = (1, 2, 3, 4)
PLAIN = {  # relative squared error of unit vectors
    64: {1: 0.35840, 2: 0.11455, 3: 0.03344, 4: 0.009171},
    128: {1: 0.36089, 2: 0.11601, 3: 0.03398, 4: 0.009325},
}
CHUNKS = (1, 63, 7, 64, 100, 2, 63)


def gaussian(*shape, seed=99):
    """Seeded apart from the rotations: data drawn like the rotation would not be random to it."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def decoded(quantizer, x):
    return quantizer.decode(quantizer.encode(x))


def relative_error(quantizer, x):
    return (((decoded(quantizer, x) - x) ** 2).sum(-1) / (x**2).sum(-1)).mean()


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 128])
def test_error_of_gaussian_vectors_is_the_published_one(bits, dim, rotation):
    x = torch.from_numpy(gaussian(1, 20_000, dim))
    error = relative_error(TurboQuant(bits, (0,), "plain", False, rotation), x)
    assert error == pytest.approx(PLAIN[dim][bits], rel=0.015)


@pytest.mark.parametrize("bits", BITS)
def test_haar_makes_even_a_single_channel_gaussian(bits):
    one_hot = np.eye(64, dtype=np.float32)[None]
    errors = [relative_error(TurboQuant(bits, (seed,), "plain", False), one_hot) for seed in range(200)]
    assert np.mean(errors) == pytest.approx(PLAIN[64][bits], rel=0.05)


@pytest.mark.parametrize("bits, error", [(1, 0.0409), (2, 0.2605), (3, 0.0595), (4, 0.0033)])
@pytest.mark.parametrize("dim", [64, 128])
def test_hadamard_gives_a_single_channel_the_error_of_one_centroid(bits, error, dim):
    one_hot = np.eye(dim, dtype=np.float32)[None]
    nearest = np.abs(codebook(bits)[0] - 1).min()  # every rotated channel is plus or minus one
    assert nearest**2 == pytest.approx(error, rel=0.01)
    measured = relative_error(TurboQuant(bits, (0,), "plain", False, "hadamard"), one_hot)
    assert measured == pytest.approx(nearest**2, rel=0.01)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("bits", BITS)
def test_corrections_keep_the_norm_or_the_inner_product(bits, rotation):
    x = torch.from_numpy(gaussian(2, 2000, 128))
    plain, renorm, unbiased = (
        decoded(TurboQuant(bits, (0,), correction, False, rotation), x)
        for correction in ("plain", "renorm", "unbiased")
    )
    square = (x * x).sum(-1)
    assert ((plain * x).sum(-1) / square).mean() == pytest.approx(1 - DISTORTION[bits], abs=0.005)
    torch.testing.assert_close(renorm.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    torch.testing.assert_close((unbiased * x).sum(-1), square, rtol=1e-3, atol=0)
    assert ((renorm * x).sum(-1) / square).mean() < 1 - DISTORTION[bits] / 4  # renorm alone still shrinks


def test_unbiased_vectors_average_to_the_truth_over_rotations():
    x = torch.from_numpy(gaussian(1, 5, 64))
    estimates = [decoded(TurboQuant(2, (seed,), "unbiased", False), x) for seed in range(300)]
    error = (torch.stack(estimates).mean(0) - x).norm() / x.norm()
    assert error < 0.05  # a single rotation is off by 0.36


def test_codes_are_invariant_to_scale_and_the_scalar_is_not():
    x = gaussian(1, 50, 64)
    quantizer = TurboQuant(4, (0,), "renorm", center=False)
    one, eight, ten = (quantizer.encode(factor * x) for factor in (1, 8, 10))
    np.testing.assert_array_equal(one.codes, eight.codes)
    np.testing.assert_array_equal(8 * one.scale, eight.scale)
    assert (unpack(one.codes, 4) != unpack(ten.codes, 4)).mean() < 1e-3  # ten times is rounded, eight times is not
    np.testing.assert_allclose(10 * one.scale, ten.scale, rtol=2e-3)


@pytest.mark.parametrize("correction", ["plain", "renorm", "unbiased"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_zero_and_huge_vectors(correction, rotation):
    quantizer = TurboQuant(4, (0,), correction, False, rotation)
    x = torch.zeros((1, 2, 64), dtype=torch.bfloat16)
    x[0, 1, 7] = 1e4
    kept = decoded(quantizer, x)
    assert (kept[0, 0] == 0).all()
    assert (kept[0, 1] - x[0, 1]).norm() < 0.2e4


def test_a_zero_vector_comes_back_as_the_mean():
    x = np.concatenate([np.full((1, 1, 64), 3.0), np.full((1, 1, 64), 1.0), np.full((1, 2, 64), 2.0)], axis=1)
    kept = decoded(TurboQuant(4, (0,), "renorm", center=True), x.astype(np.float32))
    np.testing.assert_array_equal(kept[0, 2:], 2.0)


@pytest.mark.parametrize("center", [False, True])
def test_batch_rows_and_heads_are_independent(make, center):
    x = gaussian(3, 2, 40, 64)
    quantizer = TurboQuant(3, (4,), "unbiased", center)
    together = quantizer.encode(make(x))
    for row in range(3):
        for head in range(2):
            alone = quantizer.encode(make(x[row, head : head + 1]))
            np.testing.assert_array_equal(np.asarray(together.codes)[row, head], np.asarray(alone.codes)[0])
            np.testing.assert_array_equal(np.asarray(together.scale)[row, head], np.asarray(alone.scale)[0])


def on_the_thresholds(tokens, dim, rotation):
    """Vectors whose rotated channels lie on thresholds, but for a half that brings the norm to `sqrt(dim)`."""
    rng = np.random.default_rng(99)
    y = np.concatenate([rng.choice(codebook(4)[1], (2, tokens, dim // 2)), rng.normal(size=(2, tokens, dim // 2))], -1)
    known, rest = (y[..., half] for half in (slice(dim // 2), slice(dim // 2, dim)))
    rest *= np.sqrt((dim - (known**2).sum(-1, keepdims=True)).clip(1) / (rest**2).sum(-1, keepdims=True))
    return (y @ rotation.astype(float)).astype(np.float32)


@pytest.mark.parametrize("data", ["offset", "on thresholds"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("dim", [64, 128])
def test_pieces_have_the_bits_of_the_whole(make, data, rotation, dim):
    """Sums in a matrix product are rounded differently for 1, 63 and 300 rows; a channel near a threshold shows it."""
    seed, tokens = (3,), sum(CHUNKS)
    centered = data == "offset"
    x = gaussian(2, tokens, dim) + 5 if centered else on_the_thresholds(tokens, dim, ROTATIONS[rotation](dim, seed))
    quantizer = TurboQuant(4, seed, "renorm", centered, rotation)
    ends = np.cumsum(CHUNKS)
    packed = quantizer.encode(make(x[:, : ends[0]]))
    mean = packed.mean
    whole = quantizer.encode(make(x), mean)
    for start, stop in pairwise(ends):
        packed = packed.append(quantizer.encode(make(x[:, start:stop]), mean))
        np.testing.assert_array_equal(np.asarray(packed.codes), np.asarray(whole.codes)[:, :stop])
        np.testing.assert_array_equal(np.asarray(packed.scale), np.asarray(whole.scale)[:, :stop])
    np.testing.assert_array_equal(np.asarray(quantizer.decode(packed)), np.asarray(quantizer.decode(whole)))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("center", [False, True])
def test_vectors_are_the_centroids_of_their_codes_scaled_and_turned_back(make, bits, dim, center):
    quantizer = TurboQuant(bits, (7,), "renorm", center)
    packed = quantizer.encode(make(gaussian(2, 50, dim)))
    centroids = codebook(bits)[0].astype(float)[np.asarray(unpack(packed.codes, bits))]
    expected = np.asarray(packed.scale)[..., None] * centroids @ ROTATIONS["haar"](dim, (7,)).astype(float)
    expected += np.asarray(packed.mean) if center else 0.0
    np.testing.assert_allclose(np.asarray(quantizer.decode(packed)), expected, atol=5e-6)


def test_packing_again_what_was_packed_gives_the_same_codes():
    quantizer = TurboQuant(4, (3,), "renorm", center=True)
    packed = quantizer.encode(gaussian(2, 500, 64) + 5)
    again = packed
    for _ in range(6):
        again = quantizer.encode(quantizer.decode(again), packed.mean)
    np.testing.assert_array_equal(again.codes, packed.codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 128])
def test_bytes_are_those_of_codes_scalars_and_mean(make, bits, dim):
    x = make(gaussian(2, 50, dim))
    assert TurboQuant(bits, (0,), "plain", center=False).encode(x).nbytes == 2 * 50 * (dim * bits // 8 + 2)
    assert TurboQuant(bits, (0,), "plain", center=True).encode(x).nbytes == 2 * 50 * (dim * bits // 8 + 2) + 2 * dim * 2


@pytest.mark.parametrize("center", [False, True])
def test_taken_tokens_are_those_of_each_head(make, center):
    quantizer = TurboQuant(3, (0,), "renorm", center)
    packed = quantizer.encode(make(gaussian(2, 30, 64)))
    chosen = np.array([[0, 4, 5], [1, 2, 29]])
    whole, taken = (np.asarray(quantizer.decode(p)) for p in (packed, packed.take(make(chosen))))
    for head in range(2):
        np.testing.assert_allclose(taken[head], whole[head, chosen[head]], rtol=1e-5, atol=1e-6)
    assert packed.take(make(chosen[:, :0])).scale.shape == (2, 0)


def test_appending_refuses_another_mean():
    centered, bare = (TurboQuant(3, (0,), "renorm", center) for center in (True, False))
    first, second = (centered.encode(gaussian(2, 30, 64, seed=seed)) for seed in (1, 2))
    for other in (second, bare.encode(gaussian(2, 30, 64))):
        with pytest.raises(ValueError, match=r"encode later tokens with mean=first\.mean"):
            first.append(other)
    same = PackedVectors(second.codes, second.scale, first.mean.copy())
    assert first.append(same).scale.shape == (2, 60)


def attention(queries, keys):
    return torch.softmax(queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5, dim=-1)


def divergence(p, q):
    return (p * (p / q).log()).sum(-1).mean()


def test_centring_does_not_change_attention_and_rescues_offset_keys():
    keys = torch.from_numpy(gaussian(1, 1000, 64))
    keys[:, :, :3] += 60.0  # what a large bias of the key projection does
    queries = torch.from_numpy(gaussian(1, 40, 64, seed=98))
    exact = attention(queries, keys)
    for mean in (keys.mean(dim=1, keepdim=True), torch.from_numpy(gaussian(1, 1, 64, seed=97))):
        torch.testing.assert_close(attention(queries, keys - mean), exact, atol=1e-5, rtol=1e-3)
    plain, centred = (
        divergence(exact, attention(queries, decoded(TurboQuant(3, (0,), "renorm", center), keys)))
        for center in (False, True)
    )
    assert centred < plain / 5


def test_a_given_mean_is_used_and_kept_in_half_precision(make):
    x = gaussian(2, 50, 64)
    mean = gaussian(2, 1, 64, seed=98)
    centred = TurboQuant(4, (0,), "renorm", center=True).encode(make(x), make(mean))
    bare = TurboQuant(4, (0,), "renorm", center=False).encode(make(x - mean.astype(np.float16).astype(np.float32)))
    np.testing.assert_array_equal(np.asarray(centred.mean), mean.astype(np.float16))
    np.testing.assert_array_equal(np.asarray(centred.codes), np.asarray(bare.codes))


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("bits", BITS)
def test_the_same_codes_from_every_kind_of_array(make, bits, rotation):
    x = gaussian(2, 1000, 64)
    quantizer = TurboQuant(bits, (5,), "unbiased", True, rotation)
    reference, packed = quantizer.encode(x), quantizer.encode(make(x))
    codes, expected = np.asarray(unpack(packed.codes, bits)), unpack(reference.codes, bits)
    assert (codes != expected).mean() < 1e-4  # a coordinate may sit on a threshold
    same = (codes == expected).all(axis=-1)  # a code that differs changes the correction of its vector
    np.testing.assert_allclose(np.asarray(packed.scale)[same], reference.scale[same], rtol=2e-3)
    close = np.isclose(np.asarray(quantizer.decode(packed)), quantizer.decode(reference), rtol=2e-3, atol=2e-3)
    assert close.mean() > 0.99  # a code that differs moves every channel of its vector


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"correction": "ls"}, {"rotation": "givens"}])
def test_unknown_settings_are_refused_with_what_is_known(wrong):
    settings = {"bits": 4, "seed": (0,), "correction": "plain", "center": False} | wrong
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value} is not known: choose "):
        TurboQuant(**settings)


def test_a_mean_without_centring_and_centring_without_tokens_are_refused():
    with pytest.raises(ValueError, match="set center=True"):
        TurboQuant(4, (0,), "plain", center=False).encode(gaussian(1, 3, 64), gaussian(1, 1, 64))
    with pytest.raises(ValueError, match="give mean"):
        TurboQuant(4, (0,), "plain", center=True).encode(gaussian(1, 0, 64))
