"""A trained model on several backends: the same tokens kept, the same numbers within rounding.

Skipped where its weights are not: `python -m pipeline.fetch smollm2` brings them.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.job import prepare
from pipeline.run import loaded, measure
from pipeline.settings.compose import composed
from pipeline.settings.config import model_settings
from pipeline.statistics import aggregate

pytestmark = pytest.mark.slow

SHORT = [
    "model=smollm2", "document=book", "document.tokens=1024", "document.continuation=128", "document.count=2",
    "budget.tokens=256", "phase=[perturbation,perplexity,kept]", "phase.perplexity.tokens=128", "backend.dtype=float32",
    "phase.perturbation.positions=64", "phase.kept.width=1", "phase.kept.documents=2", "prefill_cache_gb=0",
]  # fmt: skip
METRICS = {"aop/mean": 5e-5, "ppl/nd": 1e-3, "ppl/kl": 1e-3, "kept/depth": 1e-3}


@pytest.fixture(autouse=True)
def weights():
    file = Path(model_settings(composed(["model=smollm2"])).path).expanduser()
    if not file.is_file():
        pytest.skip(f"{file} is not there: python -m pipeline.fetch smollm2")


def measured(folder: Path, *overrides: str) -> tuple[dict[str, float], pd.Series]:
    """Metrics, and in how many of a layer's KV heads, as a share, a token is kept."""
    rows = measure(prepare(composed([*SHORT, f"outputs={folder}", *overrides]))).rows
    kept = rows[rows["metric"] == "kept/share"].set_index(["document", "layer", "position"])["value"].astype(float)
    return {name: value.mean for name, value in aggregate(rows).items()}, kept


def disagree(one: pd.Series, other: pd.Series) -> float:
    """Share of kept tokens that lie elsewhere."""
    assert len(one) == 2 * 30 * 1024 and one.sum() == pytest.approx(2 * 30 * 256)
    return float((one - other).abs().sum() / 2 / one.sum())


@pytest.mark.parametrize("method", ["snapkv", "wavelet_tri"])
def test_cuda_and_cpu_agree_in_four_digits_of_the_perturbation(method, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    cuda, here = measured(tmp_path, f"method={method}", "backend.device=cuda")
    cpu, there = measured(tmp_path, f"method={method}", "backend.device=cpu")
    print({name: (cuda[name], cpu[name]) for name in METRICS} | {"kept elsewhere": disagree(here, there)})
    assert disagree(here, there) < 2e-3
    assert cpu["aop/mean"] > 0.01
    for name, tolerance in METRICS.items():
        assert cuda[name] == pytest.approx(cpu[name], abs=tolerance), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_joined_blocks_of_a_trained_model_are_taken_and_say_what_its_modules_say(dtype, tmp_path):
    """In 16 bits tokens may differ where the two best are level."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from spectral_kv.engine.forward import Blocks
    from spectral_kv.storage.dense import Dense

    job = prepare(
        composed([*SHORT, f"outputs={tmp_path}", "backend.device=cuda", f"backend.dtype={dtype}", "document.count=1"])
    )
    _, backend = loaded(job.settings, job.checkpoint)
    prefill = backend.prefill(job.windows[0][:1024], 1)
    ours, theirs = (backend.compress(prefill, None, Dense()) for _ in range(2))
    token = int(prefill.logits.argmax())
    said, differ = backend.generate(ours, token, 64), []
    for i, following in enumerate(said):
        logits = backend.extend(theirs, np.array([token])).logits[0].float()
        if following != int(logits.argmax()):
            assert dtype != "float32" and logits.max() - logits[following] < 0.05 * logits.std()
            differ.append(i)
        token = following
    print(f"{dtype}: tokens {differ} of {len(said)} differ")
    assert isinstance(backend.engine.forward(), Blocks)


@pytest.mark.parametrize("method", ["snapkv", "wavelet_tri"])
def test_mlx_and_torch_agree_within_a_thousandth(method, tmp_path):
    if find_spec("mlx_lm") is None:
        pytest.skip("needs spectral-kv[mlx]")
    torch_cpu, here = measured(tmp_path, f"method={method}", "backend.device=cpu")
    mlx, there = measured(
        tmp_path, f"method={method}", "backend=mlx", "backend.device=cpu", "backend.fast_blas=true"
    )  # fmt: skip
    print({name: (mlx[name], torch_cpu[name]) for name in METRICS} | {"kept elsewhere": disagree(here, there)})
    assert disagree(here, there) < 2e-3
    for name in METRICS:
        assert mlx[name] == pytest.approx(torch_cpu[name], abs=1e-3), name
