import numpy as np
import pytest
import torch

from spectral_kv.at_rest.rounding import Components
from spectral_kv.at_rest.step_search import Goal, Search, root


def test_a_root_is_found():
    found, off = root(lambda x: 0.7 * x + 0.1 * np.tanh(x) - 2, 9.0, 1e-6)
    assert found == pytest.approx(2.7156, abs=1e-3) and off < 1e-6
    found, off = root(lambda x: -1.0 if x < 3.2 else 0.4, 0.0, 1e-6)
    assert found == pytest.approx(3.2, abs=0.1) and off >= 0.4  # jumps over what is wanted


def test_a_step_meets_bits_or_an_error_and_is_near_before_all_tokens_are_looked_at():
    y = np.random.default_rng(0).normal(size=(40, 3000)) * np.geomspace(1, 1e-2, 40)[:, None]
    components = Components(torch.from_numpy(y.astype(np.float32)), np.zeros(40, dtype=int))
    search = Search(components, Goal(error=0.4))
    step = search.step()
    assert search.components.rounded(step).distortion(components.values, step) == pytest.approx(0.4, rel=0.05)
    assert search.near() == pytest.approx(step, rel=0.1)
    search = Search(components, Goal(bits=3000 * 30))
    assert search.components.rounded(search.step()).bits == pytest.approx(3000 * 30, rel=0.05)
    assert Search(components, Goal(bits=3000 * 30), search.near()).step() == pytest.approx(search.step(), rel=0.02)
    rough = Search(components, Goal(bits=3000 * 30))
    assert rough.near(0.3) == pytest.approx(search.near(), rel=0.4) and rough.near() == pytest.approx(
        search.near(), rel=0.02
    )
    assert Search(components, Goal(step=0.25)).step() == 0.25
