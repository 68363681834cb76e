"""The kernels of the pass over keys: on a GPU, or through Triton's interpreter."""

import numpy as np
import pytest
import torch

from spectral_kv.engine.banded import plan
from spectral_kv.rope import Rope
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.wavelet import Wavelet

TOKENS = 1100


@pytest.fixture
def keys(rng, device):
    """Two layers of rotated keys, `[kv_heads, tokens, dim]`."""
    return [torch.from_numpy(rng.normal(size=(2, TOKENS, 32))).float().to(device) for _ in range(2)]


@pytest.mark.parametrize("scorer", [Wavelet(), Fourier()], ids=["wavelet", "fourier"])
def test_deviations_and_norms_of_all_layers(keys, scorer):
    from spectral_kv.engine.scoring import deviations

    rope = Rope(10_000.0 ** -(np.arange(16) / 16), attention_scaling=1.3)
    got, norms = (x.cpu() for x in deviations(plan(scorer, TOKENS), keys, rope))
    for layer, k in enumerate(keys):
        x = rope.unrotate(k.double().cpu(), np.arange(TOKENS))
        rows = slice(2 * layer, 2 * layer + 2)
        want = scorer.spectral(x.float())
        assert (got[rows] - want).norm() < 2e-4 * want.norm()
        torch.testing.assert_close(norms[rows], x.norm(dim=-1).float(), rtol=1e-5, atol=1e-5)


def test_kept_rows_of_all_layers(rng, keys):
    from spectral_kv.engine.scoring import kept_rows

    values = [torch.randn_like(k) for k in keys]
    kept = torch.from_numpy(np.sort(rng.permuted(np.tile(np.arange(TOKENS), (4, 1)), axis=1)[:, :70])).view(2, 2, 70)
    got = kept_rows(keys, values, kept.to(keys[0].device))
    for out, source in zip(got, (keys, values), strict=True):
        want = torch.stack(source).cpu().gather(2, kept[..., None].expand(-1, -1, -1, 32))
        torch.testing.assert_close(out.cpu(), want, rtol=0, atol=0)
