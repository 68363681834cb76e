"""Methods, allocations and refits as finished runs have them: paired differences and Holm, as Markdown and as CSV.

    python -m pipeline experiment=rivals document.count=16 document.continuation=257
    python -m pipeline experiment=rivals document=needles 'phase=[retrieval]' document.task=single document.count=16
    python -m pipeline experiment=refit document.count=16 document.continuation=257
    python benchmarks/rivals.py outputs --out docs/results/rivals_h100

Nothing is measured: what the store lacks is not in the tables. Several stores may be named by a pattern, as
'/data/runs_*'; further arguments choose runs by their settings, as those of `python -m pipeline.compare --runs` do.
Differences are means over documents, paired, with 95 % intervals: to StreamingLLM's uniform budget, of an allocation to
the same method's uniform budget, and of a refit to the same tokens without one. Holm goes over all tests of one kind of
difference on one model, of prediction (AOP, ND-PPL, KL) and of recall each. That a difference is within its margin
(pipeline/paper/margins.yaml) is tested beside it by two one-sided tests, with a Holm of their own. Tasks of which the
full cache finds fewer than 60 % are left out of the tables, not of the CSV.
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd

from pipeline.paper.finished import FinishedRun
from pipeline.paper.recency import RECENCY, margins
from pipeline.phases.retrieval import LEAST_FULL_RECALL
from pipeline.show.summary import spread
from pipeline.statistics import LEVEL, Estimate, differences, equivalence, estimate, holm, p_value
from pipeline.store.search import chosen

PREDICTION = {"aop/mean": ("AOP", "{:.3f}"), "ppl/nd": ("ND-PPL", "{:.3f}"), "ppl/kl": ("KL, nats", "{:.3f}")}
RECALL = {"retrieval/recall": ("recall", "{:.2f}")}
FURTHER = {  # no test, no difference
    "kept/gone_everywhere": ("gone", "{:.2f}"),
    "time/compress_s": ("seconds of compression", "{:.3f}"),
    "time/repetition_prefills": ("second pass, in prefills", "{:.1f}"),
    "memory/mb": ("MB", "{:.3f}"),
}
ALLOCATIONS = ("uniform", "layer", "head", "global")
REFITS = ("none", "bias", "bias_values")


@dataclass(frozen=True)
class Setting:
    """What a run is of: runs on the same `place` have the same documents and may be compared."""

    place: tuple  # model, hash of the documents
    method: str
    kernel: str  # of KVzip, where it is not the paper's
    allocation: str
    refit: str

    @classmethod
    def of(cls, run) -> "Setting":
        params, tags = run.data.params, run.data.tags
        kernel = params.get("method.kernel", "1") if params["method.name"].startswith("kvzip") else "1"
        return cls(
            (params["model.name"], tags["hash.document"], params["budget.resolved"]), params["method.name"], kernel,
            params.get("budget.allocation", "uniform"), params.get("refit.name", "none"),
        )  # fmt: skip


def read(outputs: str, overrides: list[str]) -> dict[Setting, tuple[FinishedRun, dict]]:
    """The newest finished run of every setting, and its parameters."""
    found = {}
    folders = sorted(Path(path).resolve() for path in glob(outputs))
    for run in (run for folder in folders for run in chosen([f"outputs={folder}", *overrides])):
        if run.data.params.get("storage.name", "dense") != "dense":
            continue
        setting, uri = Setting.of(run), run.info.artifact_uri
        rows = partial(mlflow.artifacts.load_text, f"{uri}/rows.json")
        count = int(run.data.params["document.count"])
        one = FinishedRun(run.info.run_id, {}, count, dict(run.data.metrics), dict(run.data.tags), rows)
        found[setting] = one, run.data.params
    return found


def table(runs: dict[Setting, tuple[FinishedRun, dict]]) -> pd.DataFrame:
    """One row a run and metric, with its differences."""
    lines = []
    for setting, (run, params) in runs.items():
        bases = {
            "streaming": replace(setting, method=RECENCY, kernel="1", allocation="uniform", refit="none"),
            "uniform": replace(setting, allocation="uniform"),
            "no_refit": replace(setting, refit="none"),
        }
        if setting.refit != "none":  # beside the same tokens alone
            bases = {"no_refit": bases["no_refit"]}
        elif setting.method == RECENCY:  # it scores by position: the same tokens with every allocation
            bases = {}
        about = {
            "model": params["model.name"], "document": params["document.name"],
            "task": params.get("document.task", ""), "tokens": int(params["document.tokens"]),
            "documents": run.count, "kept": params["budget.resolved"],
            "method": run.title + ("" if setting.kernel == "1" else f" (best of {setting.kernel})"),
            "allocation": setting.allocation, "refit": setting.refit,
        }  # fmt: skip
        for metric in {**PREDICTION, **RECALL, **FURTHER}:
            value = run.estimate(metric) if metric in run.metrics else None
            if value is None:
                continue
            line = {**about, "metric": metric, "mean": value.mean, "low": value.low, "high": value.high}
            for name, base in bases.items():
                if metric in FURTHER or base == setting or base not in runs:
                    continue
                other = runs[base][0]
                values = differences(run.documents[metric], other.documents[metric])
                by = estimate(values)
                line |= {f"vs_{name}": by.mean, f"vs_{name}_low": by.low, f"vs_{name}_high": by.high}
                line[f"vs_{name}_p"] = p_value(values)
                if metric in margins():
                    line[f"vs_{name}_equal_p"] = equivalence(values, margins()[metric]["margin"]).p
            line["full_recall"] = run.metrics.get("retrieval/full_recall", np.nan) if metric in RECALL else np.nan
            line |= {"run": run.run_id, "hash_document": run.tags["hash.document"], "code": run.tags["hash.code"]}
            line["hardware"] = run.tags.get("hardware", "")
            lines.append(line)
    return corrected(pd.DataFrame(lines))


def corrected(found: pd.DataFrame) -> pd.DataFrame:
    """The same with p after Holm: over a model's tests of one kind of difference, of prediction and of recall each."""
    known = found["full_recall"].isna() | (found["full_recall"] >= LEAST_FULL_RECALL)
    kind = np.where(found["metric"].isin(RECALL), "recall", "prediction")
    for name in ("streaming", "uniform", "no_refit"):
        if f"vs_{name}" not in found:
            continue
        tested = found[found[f"vs_{name}"].notna() & known]
        for _, family in tested.groupby([tested["model"], kind[tested.index]]):
            found.loc[family.index, f"vs_{name}_holm"] = holm(family[f"vs_{name}_p"])
            if f"vs_{name}_equal_p" in family and family[f"vs_{name}_equal_p"].notna().any():
                found.loc[family.index, f"vs_{name}_equal_holm"] = holm(family[f"vs_{name}_equal_p"])
            found.loc[family.index, f"vs_{name}_tests"] = len(family)
    return found


def said(line: pd.Series, against: str | None, pattern: str) -> str:
    """A mean, or a difference to something, with its interval; * where it differs, = where it is equal, after Holm."""
    name = "mean" if against is None else f"vs_{against}"
    low, high = ("low", "high") if against is None else (f"{name}_low", f"{name}_high")
    if pd.isna(line.get(name)):
        return "-"
    pattern = pattern if against is None else pattern.replace("{:", "{:+")
    text = spread(Estimate(line[name], line[low], line[high]), pattern)
    tested = f"vs_{against or ('streaming' if line['refit'] == 'none' else 'no_refit')}"
    if line.get(f"{tested}_holm", 1.0) <= LEVEL:
        return text + " *"
    return text + (" =" if line.get(f"{tested}_equal_holm", 1.0) <= LEVEL else "")


def wide(of: pd.DataFrame, across: str, order: tuple[str, ...], against: str | None, pattern: str) -> str:
    """Methods down, one column a value of `across`."""
    cells = {
        method: {line[across]: said(line, against, pattern) for _, line in own.iterrows()}
        for method, own in of.groupby("method", sort=False)
    }
    frame = pd.DataFrame(cells).T
    return frame.reindex(columns=[c for c in order if c in frame]).fillna("-").to_markdown(disable_numparse=True)


def titled(title: str, text: str) -> list[str]:
    return [f"{title}:", "", text, ""]


def predicted(of: pd.DataFrame) -> list[str]:
    """Tables of what allocations do to prediction, on one text."""
    first = of.iloc[0]
    count = of["vs_streaming_tests"].max() if "vs_streaming_tests" in of else 0
    lines = [
        f"## {first['model']}: {first['kept']} of {first['tokens']} tokens, {first['documents']} windows of "
        f"{first['document']}, {first['hardware']}",
        "",
        "* differs from StreamingLLM's uniform budget, or where a difference is printed from what it is a difference "
        "to; = lies within the margin (pipeline/paper/margins.yaml) by two one-sided tests; both after Holm "
        f"({count:.0f} tests beside StreamingLLM"
        + (f", {of['vs_uniform_tests'].max():.0f} beside uniform budgets)." if "vs_uniform_tests" in of else ")."),
        "",
    ]
    best = of[of["metric"] == "ppl/kl"].groupby("method")["mean"].min().sort_values().index
    of = of.set_index("method").loc[list(best)].reset_index()
    for metric, (label, pattern) in {**PREDICTION, **FURTHER}.items():
        own = of[of["metric"] == metric]
        if len(own):
            lines += titled(label, wide(own, "allocation", ALLOCATIONS, None, pattern))
    for metric, (label, pattern) in PREDICTION.items():
        own = of[of["metric"] == metric]
        if "vs_uniform" in own and own["vs_uniform"].notna().any():
            text = wide(own[own["vs_uniform"].notna()], "allocation", ALLOCATIONS, "uniform", pattern)
            lines += titled(f"{label}, difference to the same method's uniform budget", text)
    return lines


def recalled(of: pd.DataFrame) -> list[str]:
    """What is still found: methods and allocations down, tasks across."""
    lines = []
    for task, own in of.groupby("task", sort=False):
        if (full := own["full_recall"].iloc[0]) < LEAST_FULL_RECALL:
            about = f"{task}, {own['model'].iloc[0]}, {own['documents'].iloc[0]} windows"
            lines += [f"- {about}: the full cache finds {full:.2f}, left out.", ""]
    of = of[of["full_recall"] >= LEAST_FULL_RECALL]
    if not len(of):
        return lines
    heads = {
        task: f"{task}, {own['documents'].iloc[0]} windows (full cache {own['full_recall'].iloc[0]:.2f})"
        for task, own in of.groupby("task", sort=False)
    }
    evicts = of[of["kept"] != "all"]
    first = (evicts if len(evicts) else of).iloc[0]
    of = of.assign(task=of["task"].map(heads), row=of["method"] + ", " + of["allocation"])
    best = of.groupby("row")["mean"].max().sort_values(ascending=False, kind="stable").index
    of = of.assign(method=of["row"]).set_index("row").loc[list(best)].reset_index()
    star = ""
    if "vs_streaming_tests" in of and of["vs_streaming_tests"].notna().any():
        star = f"; * differs from StreamingLLM's after Holm over {of['vs_streaming_tests'].max():.0f} tests"
    title = (
        f"## {first['model']}: recall of planted facts, question hidden, {first['kept']} of {first['tokens']} tokens, "
        f"{first['hardware']}{star}"
    )
    found = titled(title, wide(of, "task", tuple(heads.values()), None, "{:.2f}"))
    for name, said_of in (("streaming", "StreamingLLM's uniform budget"), ("uniform", "the same method's uniform one")):
        if f"vs_{name}_tests" in of and len(own := of[of[f"vs_{name}"].notna()]):
            title = f"Difference to {said_of}, * after Holm over {own[f'vs_{name}_tests'].max():.0f} tests"
            found += titled(title, wide(own, "task", tuple(heads.values()), name, "{:.2f}"))
    return [*found, *lines]


def refitted(of: pd.DataFrame) -> list[str]:
    """What kept tokens are given: methods down, refits across."""
    first, lines = of.iloc[0], []
    count = of["vs_no_refit_tests"].max()
    lines += [
        f"## {first['model']}: refits, {first['kept']} of {first['tokens']} tokens, {first['documents']} windows of "
        f"{first['document']}, {first['hardware']}; * differs from no refit after Holm over {count:.0f} tests",
        "",
    ]
    of = of.drop(columns=[name for name in of if name.startswith("vs_streaming")])
    of = of.assign(method=of["method"] + ", " + of["allocation"])
    for metric, (label, pattern) in {**PREDICTION, **FURTHER}.items():
        own = of[of["metric"] == metric]
        if not len(own):
            continue
        lines += titled(label, wide(own, "refit", REFITS, None, pattern))
        if metric in PREDICTION:
            lines += titled(f"{label}, difference", wide(own, "refit", REFITS[1:], "no_refit", pattern))
    return lines


def markdown(found: pd.DataFrame) -> str:
    """All tables, by model."""
    lines = []
    for _, own in found.groupby("model", sort=False):
        asked = own["task"] != ""
        for _, text in own[~asked].groupby("hash_document", sort=False):
            kept = text[text["refit"] == "none"]
            if kept["allocation"].nunique() > 1:
                lines += predicted(kept)
            with_refit = text[text["refit"] != "none"][["method", "allocation"]].drop_duplicates()
            if len(with_refit):
                lines += refitted(text.merge(with_refit, on=["method", "allocation"]))
        recall = own[asked & own["metric"].isin(RECALL)]
        if len(recall):
            lines += recalled(recall)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", help="folder of the runs, or a pattern of several")
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="which runs, as model.name=smollm2")
    parser.add_argument("--out", type=Path, required=True, help="path of the two files without their ending")
    arguments = parser.parse_intermixed_args()
    runs = read(arguments.outputs, arguments.overrides)
    if not runs:
        parser.error(f"no finished run in {arguments.outputs} fits: give fewer settings, or measure first")
    found = table(runs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(arguments.out.with_suffix(".csv"), index=False, float_format="%.6g")
    arguments.out.with_suffix(".md").write_text(markdown(found) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
