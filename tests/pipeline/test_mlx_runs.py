"""The whole pipeline on MLX: the same numbers as on torch, and a sentence where it can't run."""

import os
import subprocess
import sys
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest

from pipeline import job
from pipeline.calibrate import calibrate
from pipeline.compare import compare
from pipeline.compare import show as table
from pipeline.job import prepare
from pipeline.run import Result, execute, loaded
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError
from pipeline.settings.folders import conf_dir
from pipeline.show.summary import show
from pipeline.stages.checkpoint import locate
from pipeline.stages.compress import compress
from pipeline.stages.prefill import FullRun
from pipeline.statistics import Estimate
from pipeline.store.search import show as side_by_side
from spectral_kv.calibration import QueryStatistics
from spectral_kv.compressor import Compressor, SharedScores, foresees, observed
from spectral_kv.xp import to_numpy

METHODS = ["fourier", "wavelet", "wavelet_fourier", "wavelet_tri", "tri", "turboquant"]
CONTROLS = [
    "knorm",
    "keydiff",
    "snapkv",
    "tova",
    "h2o",
    "observed_attention",
    "expected_attention",
    "oracle_mass",
    "oracle_value",
]
CONTROLS += ["full", "random", "streaming"]
# Python code after which MLX can't be found, as where it is not installed
WITHOUT_MLX = """
import sys
class Blind:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ("mlx", "mlx_lm") else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Blind(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def run_mlx(run):
    pytest.importorskip("mlx_lm")
    return lambda *overrides: run("backend=mlx", *overrides)


def difference(found: Result, expected: Result, metric: str) -> float:
    """Relative."""
    return abs(found.metrics[metric] - expected.metrics[metric]) / max(abs(expected.metrics[metric]), 1e-9)


@pytest.mark.parametrize("method", ["wavelet_tri", "turboquant"])
def test_a_run_on_mlx_finds_what_a_run_on_torch_finds(run, run_mlx, method):
    """With a cache in float32, so that nothing but the order of sums differs."""
    exact = [f"method={method}", "backend.cache_dtype=float32"]
    found, expected = run_mlx(*exact), run(*exact)
    counted = {"audit/prefill_peak_mb"}  # by MLX on any device, by torch on a GPU
    assert found.run_id != expected.run_id and found.metrics.keys() - counted == expected.metrics.keys() - counted
    for metric in ("aop/mean", "aop/projected_mean", "ppl/full", "ppl/comp", "ppl/kl"):
        assert difference(found, expected, metric) <= 1e-3, metric
    for metric in ("memory/bytes", "memory/ratio", "memory/tokens", "memory/mb_after_generation"):
        assert found.metrics[metric] == expected.metrics[metric]
    rows = [mlflow.load_table("rows.json", run_ids=[r.run_id]) for r in (found, expected)]
    names = [[name for name in table["metric"] if name not in counted] for table in rows]
    assert names[0] == names[1]


def test_what_mlflow_holds_of_a_run_on_mlx(run_mlx):
    run = mlflow.get_run(run_mlx("method=knorm").run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["backend.name"] == "mlx"
    assert {"version.mlx", "version.mlx-lm"} <= run.data.tags.keys()


def test_times_say_that_they_are_not_those_of_apple_silicon(run_mlx, run, monkeypatch, capsys):
    result = run_mlx("method=streaming")
    show(result)
    noted = "not representative of Apple silicon" in capsys.readouterr().out
    assert noted == (sys.platform != "darwin")
    assert ("Apple silicon" in mlflow.get_run(result.run_id).data.tags["timings"]) == noted
    show(run("method=streaming"))
    assert "Apple silicon" not in capsys.readouterr().out
    monkeypatch.setattr(job.sys, "platform", "darwin")
    assert run_mlx("method=streaming").timing_note is None


def test_every_phase_runs(run_mlx):
    result = run_mlx(
        "phase=all", "document.count=1", "method=snapkv", "method.window=16",
        "phase.drift.turns=2", "phase.drift.tokens=20", "phase.drift.positions=10",
        "phase.throughput.tokens=8", "phase.throughput.repeats=2", "storage=turboquant_4bit", "storage.recent=8",
        "budget.tokens=80",
    )  # fmt: skip
    for metric in ("drift/aop_last", "fidelity/key_error", "throughput/speedup", "match/tokens"):
        assert np.isfinite(result.metrics[metric]), metric
    assert result.metrics["throughput/compressed_peak_mb"] > 0
    assert result.metrics["fidelity/key_error"] > 0


@pytest.mark.parametrize(
    "phase, settings",
    [
        ("drift", ["phase.drift.turns=2", "phase.drift.tokens=20", "phase.drift.positions=10"]),
        ("retrieval", ["document=needles", "document.tokens=384", "document.continuation=60", "document.planted=1",
                       "document.questions=1"]),
    ],
)  # fmt: skip
def test_the_full_cache_stays_itself(small, phase, settings):
    pytest.importorskip("mlx_lm")
    own = [o for o in small if not o.startswith("phase.")]
    every = [*own, "backend=mlx", "method=full", "document.count=1", f"phase={phase}", *settings]
    metrics = execute(prepare(composed(every))).metrics
    if phase == "drift":
        assert metrics["drift/aop_last"] == metrics["drift/delta_nll_last"] == 0
    else:
        assert metrics["retrieval/recall"] == metrics["retrieval/full_recall"]


def test_calibration_finds_the_same_statistics(small, checkpoint, tmp_path):
    pytest.importorskip("mlx_lm")
    shape = locate(prepare(composed(small)).settings.model, tmp_path, 10, 1).shape
    settings = [*small, "document=pydoc", "document.count=1"]
    found, expected = (
        QueryStatistics.load(
            calibrate([*settings, f"backend={backend}"], tmp_path / f"{backend}.safetensors"),
            (shape.layers, shape.query_heads, shape.dim // 2),
        )
        for backend in ("mlx", "torch")
    )
    np.testing.assert_allclose(found.mu, expected.mu, atol=1e-4)
    np.testing.assert_allclose(found.modulus, expected.modulus, atol=1e-4)


def test_comparing_backends_prints_which_is_which(small, capsys):
    pytest.importorskip("mlx_lm")
    own = [o for o in small if not o.startswith("phase.")]
    settings = [
        *own,
        "phase=perturbation",
        "phase.perturbation.positions=8",
        "document.count=1",
        "backend=torch,mlx",
        "method=knorm",
    ]
    reference = ["method=streaming", "budget.tokens=60", "budget.recent=16"]
    compare(settings, ["backend=torch", *reference], gap=False)
    printed = capsys.readouterr().out
    assert "streaming-60-dense on torch" in printed
    header = next(line for line in printed.splitlines() if "storage" in line)
    assert "backend" in header and {"mlx", "torch"} <= set(printed.split())
    side_by_side([next(o for o in own if o.startswith("outputs=")), "method=knorm"], ["aop/mean"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "Knorm" in line]
    assert sorted(name for row in rows for name in row if name in ("mlx", "torch")) == ["mlx", "torch"]
    with pytest.raises(InputError, match=r"backend=torch,mlx has several values: say after --against"):
        compare(settings, reference, gap=False)


def test_one_backend_needs_no_column(capsys):
    about = {"title": "Knorm", "budget": 60, "storage": "dense", "allocation": "uniform", "refit": "none"}
    results = [SimpleNamespace(**about, backend="torch")] * 2
    table("differences", results, [{"aop/mean": Estimate(0.1, 0.0, 0.2)}] * 2)
    assert "backend" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "override, words",
    [
        ("backend.device=cuda", r"backend\.device=cuda is not known to backend=mlx: choose auto, cpu or gpu"),
        ("backend.fast_blas=perhaps", r"backend\.fast_blas=perhaps"),
        ("storage=hqq_4bit", r"storage=hqq_4bit holds torch tensors alone: choose storage=turboquant_4bit"),
    ],
)
def test_refuses_what_mlx_can_not_do(small, override, words):
    pytest.importorskip("mlx_lm")
    if "hqq" in override:
        pytest.importorskip("hqq")
    with pytest.raises(InputError, match=words):
        prepare(composed([*small, "backend=mlx", override]))


def test_torch_knows_no_device_called_gpu(small):
    with pytest.raises(InputError, match="not known to backend=torch: choose auto, cpu, cuda"):
        prepare(composed([*small, "backend.device=gpu"]))


def without_mlx(code: str, folder) -> list[str]:
    """What a process in which MLX can't be imported says on standard error."""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(conf_dir()), "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", WITHOUT_MLX + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr.strip().splitlines()


def test_without_mlx_the_backend_explains_itself(tmp_path):
    code = """
sys.argv = ["pipeline", "backend=mlx", "method=knorm", "document.tokens=200", "budget.tokens=100"]
from pipeline.settings.cli import main
try:
    main()
except SystemExit as done:
    assert done.code == 2
"""
    said = without_mlx(code, tmp_path)
    assert len(said) == 1 and said[0].startswith("pipeline: backend=mlx can't be imported (No module named 'mlx")
    assert "pip install 'spectral-kv[mlx]'" in said[0]


@pytest.mark.slow
def test_without_mlx_the_rest_of_the_library_can_be_imported(tmp_path):
    code = """
import importlib, pkgutil, spectral_kv
for module in pkgutil.walk_packages(spectral_kv.__path__, "spectral_kv."):
    if ".mlx" not in module.name and ".engine." not in module.name:  # Triton is optional too
        importlib.import_module(module.name)
"""
    assert without_mlx(code, tmp_path) == []


def test_a_package_that_is_not_installed_is_named(small, monkeypatch):
    def version(name: str) -> str:
        if name == "mlx-lm":
            raise job.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(job, "version", version)
    with pytest.raises(InputError, match=r"no package mlx-lm\): pip install 'spectral-kv\[mlx\]'"):
        prepare(composed([*small, "backend=mlx"]))
    prepare(composed(small))


@pytest.fixture(scope="module")
def reference_runs(tmp_path_factory):
    """Settings for the embedded model at 1024 tokens, cached in float32."""
    pytest.importorskip("mlx_lm")
    folder = tmp_path_factory.mktemp("reference")
    return [
        f"outputs={folder}", "document.tokens=1024", "document.count=2", "budget=256", "backend.cache_dtype=float32",
        "phase.memory.generated=8",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, *CONTROLS])
def test_the_reference_model_keeps_the_same_tokens(reference_runs, method):
    """But for tokens whose scores are equal up to rounding, as those of equal tokens are in the first layer."""
    kept = []
    for name in ("mlx", "torch"):
        ready = prepare(composed([*reference_runs, f"backend={name}", f"method={method}"]))
        _, backend = loaded(ready.settings, ready.checkpoint)
        scorer = ready.settings.method.scorer
        compressor = Compressor(backend, scorer, ready.budget, ready.settings.storage, ready.statistics)
        full = FullRun(backend, ready.windows[0], 1024, observed(scorer, 1024))
        kept.append(compress(compressor, full, SharedScores(), 0).kept)
    if scorer is None:
        assert kept == [None, None]
        return
    future = full.extended(scorer.horizon).queries if foresees(scorer) else None
    scores = compressor.scores(full.prefill, 0, full.queries(observed(scorer, 1024)), future)
    middle = ready.budget.evictable(1024)
    for own, *chosen in zip(map(to_numpy, scores), *(map(to_numpy, k) for k in kept), strict=True):
        for head, *rows in zip(own, *chosen, strict=True):
            one, other = (set(row.tolist()) for row in rows)
            assert len(one) == len(other) == 256 and len(one & other) >= 0.99 * 256
            differing = head[list(one ^ other)]
            assert differing.size == 0 or np.ptp(differing) <= 1e-5 * np.ptp(head[middle])


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, *CONTROLS])
def test_the_reference_model_has_the_same_metrics(reference_runs, method):
    found, expected = (
        execute(prepare(composed([*reference_runs, f"backend={name}", f"method={method}"])))
        for name in ("mlx", "torch")
    )
    assert difference(found, expected, "aop/mean") <= 1e-3
    assert difference(found, expected, "ppl/comp") <= 1e-3
    if method == "turboquant":  # its rise is 0.002, and a channel between two codes may go either way
        assert abs(found.metrics["ppl/nd"] - expected.metrics["ppl/nd"]) <= 1e-3
    else:
        assert difference(found, expected, "ppl/nd") <= 1e-3
