"""storage=spectral in runs: its bases are looked for, checked and counted beside the cache."""

import pytest

from pipeline.bases import bases
from pipeline.job import prepare
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError
from spectral_kv.codec.bases import Bases

SETTINGS = ["method=full", "storage=spectral", "storage.recent=8", "storage.flush=8", "storage.ratio=4"]


@pytest.fixture(scope="module")
def file(small_in, tmp_path_factory):
    """Bases of the small model."""
    folder = tmp_path_factory.mktemp("bases")
    return bases([*small_in(folder), "document=docstrings"], folder / "bases.safetensors", 2, 1.0)


def test_all_tokens_are_kept_at_the_ratio_and_bases_stand_beside_the_cache(run, file):
    metrics = run(*SETTINGS, f"storage.bases={file}").metrics
    assert metrics["memory/tokens"] == 200
    assert 4 <= metrics["memory/ratio"] < 4.2
    assert metrics["memory/bases_mb"] == Bases.load(file, (2, 2, 16)).nbytes / 1e6
    tighter = run(*SETTINGS, f"storage.bases={file}", "storage.ratio=7").metrics
    assert tighter["memory/bytes"] < metrics["memory/bytes"]
    assert 0 < metrics["ppl/kl"] < tighter["ppl/kl"] and metrics["aop/mean"] < tighter["aop/mean"]
    assert "memory/bases_mb" not in run("method=full").metrics


def test_a_cache_at_rest_is_measured_apart_from_what_lives(run, file):
    rest = ["storage=spectral_at_rest", "storage.recent=8", f"storage.bases={file}"]
    metrics = run("method=full", *rest, "storage.ratio=4").metrics
    assert metrics["memory/ratio"] == 1 and metrics["memory/tokens"] == 200
    assert metrics["memory/at_rest_ratio"] == pytest.approx(
        metrics["memory/full_mb"] / metrics["memory/at_rest_mb"], rel=1e-3
    )
    assert 3.9 < metrics["memory/at_rest_ratio"] < 4.1
    assert metrics["time/encode_mb_s"] > 0 and metrics["time/decode_mb_s"] > 0
    coarser = run("method=full", *rest, "storage.ratio=null", "storage.distortion=0.05").metrics
    finer = run("method=full", *rest, "storage.ratio=null", "storage.distortion=0.002").metrics
    assert finer["ppl/kl"] < coarser["ppl/kl"] and finer["memory/at_rest_mb"] > coarser["memory/at_rest_mb"]


def test_a_method_says_which_tokens_are_coded_finer(run, file):
    rest = ["storage=spectral_at_rest", "storage.recent=8", f"storage.bases={file}", "storage.ratio=6", "budget=60"]
    rest += ["budget.recent=8"]
    alike = run("method=full", *(o for o in rest if not o.startswith("budget"))).metrics
    weighed = run("method=snapkv", "method.window=16", *rest).metrics
    assert weighed["memory/tokens"] == 200  # none is evicted
    assert weighed["memory/at_rest_ratio"] == pytest.approx(alike["memory/at_rest_ratio"], rel=0.04)
    assert weighed["ppl/kl"] != alike["ppl/kl"]
    with pytest.raises(InputError, match="none of these is above 0: choose method=snapkv"):
        run("method=knorm", *rest)


def test_caches_that_keep_all_are_not_brought_back_to_a_budget():
    rest = ["storage=spectral_at_rest", "phase=[memory,drift]", "document.count=1"]
    prepare(composed(["method=snapkv", *rest, "phase.drift.policy=once"]))
    with pytest.raises(InputError, match="storage=spectral_at_rest keeps every token: choose method=full"):
        prepare(composed(["method=snapkv", *rest]))


def test_a_run_is_known_by_its_bases_wherever_they_lie(small, file, tmp_path):
    def identity(path) -> str:
        return prepare(composed([*small, *SETTINGS, f"storage.bases={path}"])).digest

    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    moved.write_bytes(file.read_bytes())
    whole = Bases.load(file, (2, 2, 16))
    whole.truncated(0.5).save(other)
    assert identity(file) == identity(moved) != identity(other)


def test_bases_are_not_tried_on_the_text_they_were_measured_on(small, file):
    with pytest.raises(InputError, match="also what the documents are cut from"):
        prepare(composed([*small, *SETTINGS, f"storage.bases={file}", "document=docstrings"]))


@pytest.mark.parametrize("key", ["model", "storage"])
def test_bases_that_are_wrong_are_named_by_the_key_that_gave_them(small, key, tmp_path):
    (tmp_path / "text").write_text("no bases")
    for name, said in (("nothing", rf"^{key}.bases=.*nothing is not a file"), ("text", rf"^{key}.bases: ")):
        given = f"{'+' if key == 'model' else ''}{key}.bases={tmp_path / name}"
        with pytest.raises(InputError, match=said):
            prepare(composed([*small, *SETTINGS, given]))


def test_the_reference_model_brings_its_bases():
    """Measured on at least 100,000 tokens that share no ten words in a row with what is evaluated on."""
    job = prepare(composed(["method=full", "storage=spectral", "document.count=1"]))
    shape = job.checkpoint.shape
    found = job.settings.storage.read((shape.layers, shape.kv_heads, shape.dim), job.checkpoint.hash)
    assert found.metadata["model"] == job.checkpoint.hash
    assert int(found.metadata["tokens"]) >= 100_000
    assert (found.metadata["text"], found.metadata["overlap"]) == ("mixed text", "0")
    assert found.nbytes <= 8e6


def test_other_models_say_how_bases_are_made(small):
    with pytest.raises(InputError, match=r"python -m pipeline.bases model=qwen2_5_0_5b.*storage.bases"):
        prepare(composed([*small, *SETTINGS]))
