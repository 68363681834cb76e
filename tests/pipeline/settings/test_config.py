from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pipeline.job import prepare
from pipeline.settings.compose import composed, spelled_out, sweep
from pipeline.settings.config import check, prefixed
from pipeline.settings.errors import InputError
from pipeline.settings.folders import conf_dir
from spectral_kv.storage.quantized_cache import MODULES

CONF = Path(conf_dir())


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def skip_without_its_packages(storage: str) -> None:
    library = yaml.safe_load((CONF / "storage" / f"{storage}.yaml").read_text()).get("library")
    if not all(find_spec(module) for module in MODULES.get(library, ())):
        pytest.skip(f"storage={storage} needs the optional packages")


@pytest.mark.parametrize("method", options("method"))
@pytest.mark.parametrize("storage", options("storage"))
def test_every_method_combines_with_every_storage(method, storage):
    skip_without_its_packages(storage)
    cfg = composed([f"method={method}"])
    cfg.storage = composed([f"storage={storage}"]).storage
    if method == "turboquant" and "turboquant" not in storage:  # its title would not be true
        with pytest.raises(InputError, match="choose storage=turboquant_4bit"):
            check(cfg)
        return
    settings = check(cfg)
    assert settings.method.name == cfg.method.name == method
    assert settings.storage_name == storage
    assert settings.method.scorer is None or callable(settings.method.scorer.score)


@pytest.mark.parametrize("group", ["document", "model", "backend", "phase"])
def test_every_option_composes_and_is_named_after_its_file(group):
    for option in options(group):
        cfg = composed([f"{group}={option}"])
        if "name" in cfg[group]:
            assert cfg[group].name == option
        if option != "file":  # needs a path
            check(cfg)


def test_a_storage_that_is_asked_for_is_the_method_s_own():
    for method, storage in (("turboquant", "dense"), ("tri", "turboquant_2bit")):
        cfg = composed([f"method={method}", f"storage={storage}"])
        assert cfg.storage == composed([f"storage={storage}"]).storage and cfg.method.name == method


@pytest.mark.parametrize("experiment", options("experiment"))
def test_the_first_and_the_last_job_of_every_experiment_are_checked(experiment):
    jobs = sweep(experiment, [])
    assert len(jobs) > 1
    for job in (jobs[0], jobs[-1]):
        check(composed(job))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes_to_checked_jobs(experiment):
    for job in sweep(experiment, []):
        check(composed(job))


def test_turboquant_packs_unless_told_otherwise():
    assert check(composed(["method=turboquant"])).storage.key_bits == 4
    assert check(composed(["method=turboquant", "storage=turboquant_2bit"])).storage.key_bits == 2


def test_a_number_for_a_budget_is_short_for_its_tokens():
    assert spelled_out(["budget=256,512", "budget=range(100,300)", "budget=default", "x=1"]) == [
        "budget.tokens=256,512",
        "budget.tokens=range(100,300)",
        "budget=default",
        "x=1",
    ]
    assert prepare(composed(["budget=300"])).budget.tokens == 300


def test_a_method_that_keeps_everything_has_no_budget():
    for method in ("full", "turboquant"):
        assert check(composed([f"method={method}", "budget=10"])).budget is None


def test_a_ratio_wins_over_tokens_and_counts_in_bytes_of_the_full_cache():
    assert prepare(composed(["budget.ratio=0.125", "document.tokens=2001"])).budget.tokens == 251
    packed = ["storage=turboquant_4bit", "storage.sinks=0", "storage.recent=0", "storage.center_keys=false"]
    assert prepare(composed(["budget.ratio=0.125", *packed])).budget.tokens == 512 * 256 // 68


@pytest.mark.parametrize(
    "storage", [name for name in options("storage") if "spectral" not in name and name != "pair_bits"]
)
def test_bytes_buy_as_many_tokens_as_the_storage_holds(storage):
    skip_without_its_packages(storage)
    job = prepare(composed(["budget.bytes=2097152", f"storage={storage}"]))
    shape = job.checkpoint.shape

    def held(tokens):
        return shape.layers * job.settings.storage.nbytes(tokens, shape.kv_heads, shape.dim, 2)

    assert held(job.budget.tokens) <= 2097152 < held(job.budget.tokens + 1)
    assert (job.budget.tokens == 512) == (storage == "dense")
    assert prepare(composed(["budget.bytes=1e12", f"storage={storage}"])).budget.tokens == 4096


def test_a_sweep_is_the_product_of_its_commas_first_key_outermost():
    jobs = sweep("paper", ["method=tri,full", "budget.tokens=100,200"])
    assert [job[1:] for job in jobs] == [
        [f"method={m}", f"budget.tokens={b}"] for m in ("tri", "full") for b in (100, 200)
    ]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method=wavelet", "method.levels=abc"], ["method.levels=abc"]),
        (["method=wavelet", "+method.levles=3"], ["method.levles", "did you mean levels?"]),
        (["method=wavelet", "method.mode=zero"], ["method.mode=zero", "symmetric"]),
        (["method=full", "+method.levels=3"], ["method.levels", "keeps every token"]),
        (["method._target_=nowhere.Nothing"], ["nowhere.Nothing", "imported"]),
        (["budget=0"], ["budget.tokens=0", "at least 69"]),
        (["budget=68"], ["budget.tokens=68", "at least 69"]),
        (["budget.ratio=1.5"], ["budget.ratio=1.5"]),
        (["budget.ratio=0.01"], ["budget.ratio=0.01", "41 tokens of 4096", "at least 69"]),
        (["budget.bytes=1000"], ["budget.bytes=1000", "0 tokens of 4096", "at least 69"]),
        (["budget.bytes=1e6", "budget.ratio=0.1"], ["budget.ratio=0.1", "budget.bytes", "one of them"]),
        (["budget.selection=per_layer"], ["budget.selection=per_layer", "per_head"]),
        (["method=snapkv", "method.kernel=4"], ["method.kernel=4", "odd"]),
        (["method=h2o", "method.window=0"], ["method.window=0"]),
        (
            ["method=expected_attention", "method.horizon=0"],
            ["method.horizon=0", "method.sinks=4 and method.epsilon=0.0"],
        ),
        (["method=snapkv", "document.tokens=64"], ["method.window=64", "document.tokens=64"]),
        (["storage=turboquant_4bit", "storage.rotation=dft"], ["storage.rotation=dft", "hadamard"]),
        (["storage=turboquant_4bit", "storage.flush=0"], ["storage.flush=0"]),
        (["budget.tokens=null"], ["budget.tokens"]),
        (["document.tokens=3"], ["document.tokens=3", "at least 16"]),
        (["document=file"], ["document.path"]),
        (["document=file", "document.path=/does/not/exist"], ["/does/not/exist"]),
        (["phase.perplexity.tokens=700"], ["phase.perplexity", "700", "document.continuation=640"]),
        (["phase=[]"], ["phase=[]"]),
        (["storage=turboquant_4bit", "storage.key_bits=7"], ["storage.key_bits=7"]),
        (["model.bos=maybe"], ["model.bos=maybe"]),
        (["force=maybe"], ["force=maybe"]),
        (["seed=abc"], ["seed=abc"]),
        (["outputs=null"], ["outputs"]),
        (["phase.perplexity.tokens=1"], ["phase.perplexity.tokens=1", "at least 2"]),
        (["phase.perturbation.positions=-5"], ["phase.perturbation.positions=-5", "at least 1"]),
        (["phase.memory.generated=0"], ["phase.memory.generated=0", "at least 1"]),
        (["backend._target_=nowhere.Bar"], ["backend._target_=nowhere.Bar"]),
        (["method=wavelet_fourier", "method.alpha=7"], ["method.alpha=7"]),
        (["method=wavelet_fourier", "method.cutoff=-1"], ["method.cutoff=-1"]),
        (["method=tri", "method.largest_offset=0"], ["method.largest_offset=0"]),
        (["method=wavelet_tri", "method.tri_weight=2"], ["method.tri_weight=2"]),
        (["backend.device=tpu"], ["backend.device=tpu", "cuda"]),
        (["backend.chunk=0"], ["backend.chunk=0", "at least 1, or null"]),
        (["backend.cache_dtype=auto"], ["backend.cache_dtype=auto", "bfloat16"]),
    ],
)
def test_refusals_name_the_key_and_the_remedy(overrides, words):
    with pytest.raises(InputError) as refusal:
        prepare(composed(overrides))
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_bare_parameters_of_a_message_get_the_prefix_of_their_group():
    names = ("window", "size", "group_size")
    assert prefixed("window=0 must be at least 1", "method", names) == "method.window=0 must be at least 1"
    assert prefixed("group_size=3 or (size=4)", "storage", names) == "storage.group_size=3 or (storage.size=4)"
    assert prefixed("method.window=0, subwindow=1", "method", names) == "method.window=0, subwindow=1"
    assert prefixed("nothing=1", "method", ()) == "nothing=1"


def test_every_setting_has_a_comment_or_a_telling_name():
    """Numbers an experimenter may vary carry their meaning beside them."""
    silent = {
        "name",
        "title",
        "_target_",
        "seed",
        "value_bits",
        "recency_weight",
        "norm_weight",
        "id",
        "revision",
        "split",
        "column",
        "subset",
    }
    for path in CONF.glob("*/*.yaml"):
        if path.parent.name == "experiment":
            continue
        text = path.read_text()
        content = yaml.safe_load(text)
        content = content.get("method", content)
        for key, value in content.items():
            if key in silent or key == "defaults" or isinstance(value, dict) or value is None:
                continue
            line = next(x for x in text.splitlines() if x.strip().startswith(f"{key}:"))
            assert "#" in line or "${" in line, f"{path}: {key}"


@pytest.mark.parametrize(
    "storage, title",
    [
        ([], "TurboQuant-4bit"),
        (["storage=turboquant_2bit"], "TurboQuant-2bit"),
        (["storage.value_bits=2"], "TurboQuant-4+2bit"),
    ],
)
def test_turboquant_is_called_by_what_it_stores(storage, title):
    assert check(composed(["method=turboquant", *storage])).method.title == title


def test_a_pattern_stands_for_the_options_that_fit_it():
    methods = {job[0] for job in sweep(None, ["method=glob(wavelet_*)"])}
    assert methods == {"method=wavelet_fourier", "method=wavelet_tri"}


def test_a_database_with_settings_of_its_own_is_the_file(tmp_path):
    from pipeline.store.tracking import TrackingConfig, database

    uri = f"sqlite:///{tmp_path}/q.db?timeout=30"
    assert database(TrackingConfig(uri, "e"), tmp_path) == tmp_path / "q.db"
