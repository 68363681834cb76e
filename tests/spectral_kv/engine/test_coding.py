"""The kernels of the transform coder: on a GPU, or through Triton's interpreter."""

import numpy as np
import pytest
import torch

from spectral_kv.codec.bases import Block, centred
from spectral_kv.codec.fixed_rate import FixedRate
from spectral_kv.quantization.rotation import haar
from spectral_kv.rope import Rope

HEADS, DIM, TOKENS = 2, 16, 75
ROPE = Rope(10_000.0 ** -(np.arange(DIM // 2) / DIM * 2), attention_scaling=1.3)


@pytest.fixture
def block() -> Block:
    rng, columns = np.random.default_rng(0), 2 * 2 * HEADS * DIM
    return Block(
        (0, 1),
        rng.normal(size=columns).astype(np.float32),
        rng.uniform(0.5, 2, size=columns).astype(np.float32),
        haar(columns, (1,)).astype(np.float16),
        np.geomspace(4, 1e-3, columns).astype(np.float32),
    )


@pytest.fixture
def coder(block) -> FixedRate:
    """Classes of 6 bits to 1, some of them wider than a tile."""
    return FixedRate(block, np.repeat([6, 5, 4, 3, 2, 1, 0], [8, 16, 24, 24, 24, 16, 16]))


def layers(device: str, dtype: torch.dtype, batch: int = 1) -> list[list[torch.Tensor]]:
    """Keys and values `[batch, heads, tokens, dim]` of two layers, of all sizes; values lie token by token."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-3, 3, TOKENS)[:, None]
    keys, values = (
        [torch.randn(batch, HEADS, TOKENS, DIM, generator=generator) * sizes for _ in range(2)] for _ in range(2)
    )
    values = [v.transpose(1, 2).contiguous().transpose(1, 2) for v in values]
    return [[x.to(dtype).to(device) for x in kind] for kind in (keys, values)]


@pytest.mark.parametrize(("dtype", "batch"), [(torch.bfloat16, 1), (torch.float32, 2)])
def test_codes_are_those_of_the_definition(device, coder, monkeypatch, dtype, batch):
    """Scales and codes but for what lies within rounding of an edge, however many tokens are coded at a time."""
    from spectral_kv.engine import coding

    monkeypatch.setattr(coding, "PART", 50)
    keys, values = layers(device, dtype, batch)
    some = [[x[..., 3:-2, :] for x in kind] for kind in (keys, values)]
    assert coding.suits(*some)
    positions = np.r_[5:20, 40 : 40 + TOKENS - 20]
    got = coding.encode(coder, *some, positions, ROPE)
    want = coder.encode_centred(centred(*some, positions, ROPE, coder.mean))
    assert got.packed.shape == want.packed.shape and got.gains.shape == want.gains.shape
    assert (got.gains == want.gains).float().mean() > 0.998
    assert (got.packed == want.packed).float().mean() > 0.998
    theirs, ours = coder.decode(want), coder.decode(got)
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_components_and_columns_are_products_but_for_what_halves_leave_out(device, block, monkeypatch, dtype):
    from spectral_kv.engine import coding

    monkeypatch.setattr(coding, "PART", 50)
    keys, values = ([x[0, :, 3:-2] for x in kind] for kind in layers(device, dtype))
    positions = np.r_[5:20, 40 : 40 + TOKENS - 20]
    found = torch.zeros(len(block.mean) + 8, TOKENS - 5, device=device)
    coding.analyse(block.analysis, block.mean, keys, values, ROPE.undoing(positions), found[4:-4])
    rows = centred(keys, values, positions, ROPE, block.mean, wide=True)
    wanted = torch.from_numpy(block.analysis).to(device).T @ rows.T
    assert ((found[4:-4] - wanted).norm(dim=0) < 3e-5 * wanted.norm(dim=0)).all()
    assert not found[:4].any() and not found[-4:].any()
    columns = coding.synthesise(found[4:-4], block.synthesis, block.mean)
    exact = (torch.from_numpy(x).to(device) for x in (block.mean, block.synthesis))
    wanted = next(exact) + found[4:-4].T @ next(exact)
    assert (columns - wanted).norm() < 3e-5 * wanted.norm()


def test_tensors_that_no_kernel_can_read(device):
    from spectral_kv.engine import coding

    keys, values = layers(device, torch.float32)
    assert coding.suits(keys, values)
    assert not coding.suits([k.double() for k in keys], [v.double() for v in values])
    assert not coding.suits([keys[0], keys[1].transpose(1, 2).contiguous().transpose(1, 2)], values), "other strides"
    assert not coding.suits([k[..., :12] for k in keys], [v[..., :12] for v in values])
    assert not coding.suits([k.flatten()[1:1025].view(1, 2, 32, 16) for k in keys], values), "not aligned"
