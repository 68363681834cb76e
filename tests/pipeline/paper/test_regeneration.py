"""The command on the small checkpoint: what it measures, what it doesn't, and what becomes of an interruption."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from pipeline.paper import sections
from pipeline.paper.__main__ import main, regenerate
from pipeline.paper.sections import applicable, brief, plan, titles, usual
from pipeline.settings.errors import InputError

SWEPT = ["method=wavelet,streaming", "budget.tokens=60,100"]


def tables(outputs: Path) -> dict[str, pd.DataFrame]:
    """The tables by name, without the ids of runs."""
    paths = sorted((outputs / "paper" / "tables").glob("*.csv"))
    return {path.stem: pd.read_csv(path).drop(columns="run_id") for path in paths}


@pytest.fixture
def settings(small) -> list[str]:
    """Short documents, as many as the experiments ask for."""
    return [o for o in small if not o.startswith(("document.count", "budget.tokens"))]


def test_measures_what_is_missing_and_nothing_twice(settings, tmp_path, monkeypatch, capsys):
    import mlflow

    def printed(*more: str) -> str:
        monkeypatch.setattr("sys.argv", ["pipeline.paper", *settings, *SWEPT, "--sections", "budgets", *more])
        main()
        return capsys.readouterr().out

    assert "4 configurations measured, 0 were there already" in printed()
    first = tables(tmp_path / "outputs")
    text = (tmp_path / "outputs" / "paper" / "paper.md").read_text()
    assert set(first) == {"budgets_aop_mean", "budgets_ppl_kl", "budgets_ppl_nd"}
    assert "0 configurations measured, 4 were there already" in printed()
    assert (tmp_path / "outputs" / "paper" / "paper.md").read_text() == text
    run = mlflow.search_runs(experiment_names=["spectral-kv"], output_format="list")[0]
    mlflow.delete_run(run.info.run_id)
    again = printed()
    assert "1 configurations measured, 3 were there already" in again
    assert f"1/1 budgets: {run.data.tags['title']} {run.data.params['budget.tokens']}, dense" in again
    for name, table in tables(tmp_path / "outputs").items():
        pd.testing.assert_frame_equal(table, first[name])
    assert "4 configurations measured, 0 were there already" in printed("--refresh")


def test_a_text_with_fewer_windows_than_the_experiment_asks_for_gives_all_it_has(settings, tmp_path):
    """A tokenizer with longer tokens cuts fewer windows; a section of 20 stands on 16 and more."""
    text, memory = tmp_path / "text.txt", tmp_path / "compositions.json"
    ours = [o for o in settings if not o.startswith(("document=", "document.tokens=", "document.continuation="))]
    ours += ["document=file", f"document.path={text}", "document.tokens=100", "document.continuation=60"]
    # what refers to the number of windows follows it
    narrow = ["method=random,streaming", "budget.tokens=80", "phase.perturbation.positions=${document.count}"]
    for windows in (17, 15):
        text.write_text("word " * 160 * windows)
        given = [*ours, *narrow, "model.bos=false"]
        if windows == 17:
            (section,) = plan(["baselines"], given, memory)
            assert section.asked == 17 and "document.count=17" in section.narrowed
            assert [len(job.windows) for job in section.jobs] == [17, 17] and len(section.choices) == 2
            assert [job.settings.phases["perturbation"].positions for job in section.jobs] == [17, 17]
            assert plan(["baselines"], given, memory)[0].narrowed == section.narrowed  # remembered
            with pytest.raises(InputError, match=r"document\.count=18 windows"):  # what was asked for by name
                plan(["baselines"], [*given, "document.count=18"], memory)
        else:
            with pytest.raises(InputError, match=r"document\.count=20 windows .* 15 windows"):
                plan(["baselines"], given, memory)


@pytest.mark.parametrize("tokens", ["100,120", "120,100"])
def test_of_several_lengths_the_one_with_the_fewest_windows_decides(settings, tmp_path, tokens):
    text, memory = tmp_path / "text.txt", tmp_path / "compositions.json"
    ours = [o for o in settings if not o.startswith(("document=", "document.tokens=", "document.continuation="))]
    ours += ["document=file", f"document.path={text}", f"document.tokens={tokens}", "document.continuation=60"]
    given = [*ours, "method=random", "budget.tokens=80", "model.bos=false"]
    text.write_text("word " * 160 * 18)  # 18 windows of 160 tokens, 16 of 180
    (section,) = plan(["baselines"], given, memory)
    assert section.asked == 16 and [len(job.windows) for job in section.jobs] == [16, 16]
    text.write_text("word " * 160 * 17)  # 17 and 15
    with pytest.raises(InputError, match=r"document\.count=20 windows of document\.tokens=120 .* 15 windows"):
        plan(["baselines"], given, memory)


@pytest.mark.slow
def test_processes_that_share_the_work_find_the_same(small_in, tmp_path, capsys):
    """And speeds, which share nothing, are timed in the end."""
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        own = [o for o in small_in(folder) if not o.startswith(("document.count", "budget.tokens"))]
        timed = ["phase.throughput.tokens=2", "phase.throughput.repeats=1"]
        regenerate(["budgets", "speed"], [*own, *SWEPT, *timed], processes=processes)
        printed = capsys.readouterr().out
        assert "8 configurations measured, 0 were there already" in printed
        lines = [line for line in printed.splitlines() if "/8 " in line]
        assert [" speed: " in line for line in lines[-4:]] == [True] * 4 or processes == 1
        found.append(tables(folder / "outputs"))
    for name in ("budgets_aop_mean", "budgets_ppl_kl"):
        pd.testing.assert_frame_equal(found[0][name], found[1][name], rtol=1e-4)


def test_sections_share_runs(settings, tmp_path, capsys):
    """WaveletKV at 60 tokens of which the last 16 are kept anyway is in `budgets` and in `recent`."""
    regenerate(["budgets"], [*settings, "method=wavelet", "budget.tokens=60"])
    capsys.readouterr()
    regenerate(["recent"], [*settings, "method=wavelet", "budget.recent=16,32", "budget.tokens=60"])
    assert "1 configurations measured, 1 were there already" in capsys.readouterr().out


@pytest.mark.slow
def test_variants_stand_beside_their_default(settings, tmp_path):
    regenerate(["ablation"], [*settings, "variant=wavelet_default,wavelet_haar", "budget.tokens=60"])
    table = tables(tmp_path / "outputs")["ablation_wavelet"].set_index("variant")
    assert table["aop/mean_difference"].isna().to_dict() == {"default": True, "haar": False}
    change = table.loc["haar", "aop/mean"] - table.loc["default", "aop/mean"]
    assert table.loc["haar", "aop/mean_difference"] == pytest.approx(change)


def test_a_section_takes_the_settings_that_it_has():
    given = ["model=qwen2_5_0_5b", "model.path=/x", "document=file", "document.path=/y", "budget=300", "outputs=/z"]
    assert applicable("budgets", given) == [*given[:4], "budget.tokens=300", "outputs=/z"]
    assert applicable("retrieval", given) == [*given[:2], "budget.tokens=300", "outputs=/z"]
    assert applicable("synthetic", given) == ["budget.tokens=300", "outputs=/z"]
    added = ["model=smollm2", "+model.bases=/x"]
    assert applicable("codec", added) == added and applicable("synthetic", added) == []


def test_refuses_what_no_section_can_use(settings, tmp_path):
    memory = tmp_path / "compositions.json"
    with pytest.raises(InputError, match=r"no_such.*not known: choose among paper, speed"):
        plan(["no_such"], settings, memory)
    with pytest.raises(InputError, match=r"document\.path=/x means nothing to the sections retrieval"):
        plan(["retrieval"], ["document.path=/x"], memory)


def test_every_section_is_an_experiment_with_tables():
    from pipeline.paper.figures import FIGURES
    from pipeline.paper.tables import TABLES
    from pipeline.settings.compose import sweep

    assert list(titles()) == list(TABLES)
    assert {section for _, section, _ in FIGURES.values()} <= set(titles())
    for name in titles():
        assert len(sweep(name, [])) > 2


def test_sections_are_parts_of_experiments_unless_all_is_asked_for():
    assert brief("paper", []) == []
    assert brief("seeds", []) == ["document.count=8", "method=random"]
    method, storage = brief("equal_bytes", ["budget=100"])
    assert method.startswith("method=full,") and storage == "storage=dense,turboquant_4bit,turboquant_2bit"
    assert brief("equal_bytes", ["method=tri"]) == [storage]  # what is given goes first


@pytest.mark.slow
def test_a_part_of_an_experiment_says_so_and_is_left_with_full(settings, tmp_path, capsys):
    given = [*settings, "method=streaming", "document.tokens=1100", "document.count=1"]
    regenerate(["budgets"], given)
    text = (tmp_path / "outputs" / "paper" / "paper.md").read_text()
    assert "experiment=budgets budget.tokens=128,512,1024" in text and "that the model and the text allow" in text
    memory = tmp_path / "compositions.json"
    assert len(plan(["budgets"], given, memory)[0].jobs) == 3
    with pytest.raises(InputError, match=r"budget\.tokens=2048"):  # the whole goes further than these prompts
        plan(["budgets"], given, memory, True)


def test_what_was_composed_is_remembered_until_a_configuration_changes(settings, tmp_path, monkeypatch):
    memory = tmp_path / "compositions.json"
    (first,) = plan(["budgets"], [*settings, *SWEPT], memory)
    composed = []
    monkeypatch.setattr(sections, "composed", lambda overrides: composed.append(overrides))
    (second,) = plan(["budgets"], [*settings, *SWEPT], memory)
    assert [job.digest for job in second.jobs] == [job.digest for job in first.jobs] and not composed
    assert second.choices == first.choices
    assert first.choices[1] == {"method": "wavelet", "budget.tokens": "100"}
    monkeypatch.undo()
    monkeypatch.setattr(sections, "_conf_hash", lambda: "another")
    calls = []
    empty = {"asked": 8, "taken": [], "narrowed": [], "jobs": []}
    monkeypatch.setattr(sections, "_composed", lambda *a: calls.append(a) or empty)
    with pytest.raises(InputError):  # the stand-in takes no override
        plan(["budgets"], settings, memory)
    assert calls


def test_another_way_of_composing_is_not_taken_for_the_remembered_one(tmp_path, monkeypatch):
    (tmp_path / "settings").mkdir()
    source = tmp_path / "settings" / "compose.py"
    monkeypatch.setattr(sections, "PACKAGE", tmp_path)
    source.write_text("one")
    first = sections._conf_hash()
    assert sections._conf_hash() == first
    source.write_text("another")
    assert sections._conf_hash() != first


@pytest.mark.slow
def test_sections_composed_by_several_processes_are_the_same(settings, tmp_path):
    memories = [tmp_path / "one.json", tmp_path / "three.json"]
    for processes, memory in zip((1, 3), memories, strict=True):
        found = plan(["seeds", "budgets", "recent"], [*settings, "budget.tokens=60"], memory, processes=processes)
        assert [section.experiment for section in found] == ["seeds", "budgets", "recent"]
    assert memories[0].read_text() == memories[1].read_text()


@pytest.mark.slow
def test_killed_five_times_it_continues_and_ends_with_the_same_tables(small_in, tmp_path):
    names = ["budgets", "multiturn", "synthetic"]
    general = ["method=wavelet,tri,streaming", "budget.tokens=60", "phase.drift.tokens=8", "phase.drift.positions=4"]

    def command(folder: Path) -> list[str]:
        settings = [o for o in small_in(folder) if not o.startswith(("document.count", "budget.tokens"))]
        return [
            sys.executable, "-m", "pipeline.paper", "--sections", ",".join(names), *settings, *general,
        ]  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    start = time.monotonic()
    subprocess.run(command(whole), check=True, capture_output=True)
    longest = time.monotonic() - start
    rng, again, stopped = random.Random(0), command(killed), 0
    for attempt in range(5):
        process = subprocess.Popen(again, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            process.wait(timeout=rng.uniform(0.3, 0.9) * longest)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL if attempt % 2 else signal.SIGTERM)
            process.wait()
            stopped += 1
    assert stopped > 0
    done = subprocess.run(again, check=True, capture_output=True, text=True)
    assert "were there already" in done.stdout
    expected, found = tables(whole / "outputs"), tables(killed / "outputs")
    assert set(expected) == set(found) and len(expected) == 5
    for name in expected:
        pd.testing.assert_frame_equal(expected[name], found[name])


@pytest.mark.slow
def test_rivals_and_refits_stand_beside_what_they_change(settings, tmp_path):
    small = [*settings, "budget.tokens=60"]
    regenerate(["rivals"], [*small, "method=streaming,knorm", "budget.allocation=uniform,global"])
    found = tables(tmp_path / "outputs")
    assert found["rivals"]["kept/gone_everywhere"].between(0.1, 0.8).all() and len(found["rivals"]) == 4
    assert found["allocations"]["allocation"].tolist() == ["global", "global"]
    change = found["allocations"].set_index("method").loc["Knorm", "aop/mean_difference"]
    both = found["rivals"].set_index(["method", "allocation"])["aop/mean"]
    assert change == pytest.approx(both["Knorm", "global"] - both["Knorm", "uniform"])
    regenerate(["refit"], [*small, "method=random", "refit=none,bias"])
    table = tables(tmp_path / "outputs")["refit"].set_index("refit")
    assert table.loc["bias", "memory/mb"] > table.loc["none", "memory/mb"]
    assert table.loc["bias", "aop/mean_difference"] == pytest.approx(
        table.loc["bias", "aop/mean"] - table.loc["none", "aop/mean"]
    )


def test_sections_apart_are_left_to_the_whole_document():
    assert not {"rivals", "refit"} & set(usual(False)) and {"rivals", "refit"} <= set(usual(True))


def test_what_may_change_outside_of_the_configuration_is_not_remembered():
    def written(of):
        return sections._written_out(OmegaConf.create({"a": of, "b": 1}))

    assert written("${b}") == ({"a": 1, "b": 1}, True)
    for unresolved in ("${oc.env:HOME}", "${b}/${oc.env:HOME}", "${nothing}"):
        assert written(unresolved) == ({"a": unresolved, "b": 1}, False)
