"""Runs of the transform coder and of its rivals, out of one or several stores, as tables that others can check.

    python -m benchmarks.codec_results outputs/mlflow.db --out docs/results/codec

Writes <out>.csv (a row a run: means and 95 % intervals over documents), <out>_windows.csv and <out>_recall.csv (KL and
recall of every document, from which paired differences follow) and <out>.md. The best rival of a run of the coder is
what has the least KL among all that is no transform coder and has its bytes within a tenth, bits by RoPE pair included.
"""

import argparse
import json
import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.artifacts import load_dict

from pipeline.paper.tables import NEAR
from pipeline.show.summary import spread
from pipeline.statistics import Estimate, paired, per_document

METRICS = (
    "memory/ratio", "memory/at_rest_ratio", "memory/bases_mb", "time/encode_mb_s", "time/decode_mb_s", "aop/mean",
    "ppl/nd", "ppl/kl", "ppl/top1", "retrieval/recall", "retrieval/full_recall",
)  # fmt: skip
PARAMS = (
    "model.name", "document.name", "document.title", "document.tokens", "document.count", "method.name",
    "document.continuation", "storage.name", "storage.ratio", "storage.layers", "storage.along", "storage.bases",
    "budget.ratio", "budget.allocation", "budget.resolved", "backend.dtype",
)  # fmt: skip
TAGS = ("hash.model", "hash.code")
WHAT = [  # tells a run from another
    "model", "text", "tokens", "document.continuation", "count", "method", "allocation", "budget.resolved", "storage",
    "bases, MB", "storage.bases", "storage.layers", "storage.along", "asked", "backend.dtype",
]  # fmt: skip
NAMES = {"model.name": "model", "document.tokens": "tokens", "document.count": "count", "method.name": "method",
         "budget.allocation": "allocation", "storage.name": "storage", "memory/bases_mb": "bases, MB"}  # fmt: skip
CODER = "spectral"
SAME = ["model", "text", "tokens", "document.continuation", "count"]
BY_DOCUMENT = ("ppl/kl", "retrieval/recall", "retrieval/full_recall")


def collected(stores: list[Path]) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """A row a run, and metrics by document `[runs, documents]`, each of the runs that measured it."""
    found, windows = [], {metric: {} for metric in BY_DOCUMENT}
    for store in stores:
        mlflow.set_tracking_uri(f"sqlite:///{store.resolve()}")
        runs = mlflow.search_runs(search_all_experiments=True, filter_string="attributes.status = 'FINISHED'")
        if "params.storage.name" not in runs:
            continue
        runs = runs[runs["params.storage.name"].notna()]
        found.append(runs)
        measured = runs[runs.reindex(columns=[f"metrics.{m}" for m in BY_DOCUMENT]).notna().any(axis=1)]
        for run, folder in zip(measured["run_id"], measured["artifact_uri"], strict=True):
            beside = store.parent / "artifacts" / run / "artifacts" / "rows.json"  # also of a store that was moved
            rows = json.loads(beside.read_text()) if beside.is_file() else load_dict(f"{folder}/rows.json")
            rows = pd.DataFrame(**rows)
            numbers = {column: pd.to_numeric(rows[column]) for column in ("layer", "turn", "value")}
            values = per_document(rows.assign(**numbers))
            for metric in values.columns.intersection(BY_DOCUMENT):
                windows[metric][run] = values[metric]
    runs = pd.concat(found, ignore_index=True).sort_values("start_time")
    names = [f"params.{p}" for p in PARAMS] + [f"tags.{t}" for t in TAGS]
    names += [f"metrics.{m}{end}" for m in METRICS for end in ("", "_low", "_high")]
    table = runs[["run_id", *(name for name in names if name in runs)]]
    table = table.rename(columns=lambda name: name.split(".", 1)[-1]).rename(columns=NAMES)
    table = table.astype(object).mask(table == "None").infer_objects()
    table[["tokens", "count"]] = table[["tokens", "count"]].astype(int)
    given = table.reindex(columns=["document.title", "memory/at_rest_ratio", "storage.ratio", "budget.ratio"]).astype(
        object
    )
    table["text"] = given["document.title"].fillna(table["document.name"])
    table["smaller"] = given["memory/at_rest_ratio"].fillna(table["memory/ratio"]).astype(float)
    table["asked"] = given["storage.ratio"].fillna(given["budget.ratio"])
    if "storage.bases" in table:  # folders are those of one machine
        table["storage.bases"] = table["storage.bases"].map(lambda file: Path(file).name, na_action="ignore")
    table = table.drop_duplicates([name for name in WHAT if name in table], keep="last").set_index("run_id")
    by_document = {m: pd.DataFrame(values).T.reindex(table.index).dropna(how="all") for m, values in windows.items()}
    return table.dropna(axis=1, how="all"), by_document


def rivals(run: str, table: pd.DataFrame, windows: pd.DataFrame) -> pd.DataFrame:
    """The runs on the same windows with about the bytes of `run`, coders left out."""
    of = table.loc[windows.index]
    what = [name for name in SAME if name in of]
    same = (of[what] == table.loc[run, what]).all(axis=1)
    near = (of["smaller"] / table.loc[run, "smaller"]).between(1 / NEAR, NEAR)
    return of[same & near & ~of["storage"].str.startswith(CODER)]


def _cell(row: pd.Series, metric: str, form: str) -> str:
    if metric not in row or pd.isna(row[metric]):
        return ""
    return spread(Estimate(row[metric], *(row.get(f"{metric}_{end}", np.nan) for end in ("low", "high"))), form)


def markdown(table: pd.DataFrame, by_document: dict[str, pd.DataFrame]) -> str:
    """What predicts and what is found, by model and text, by falling bytes."""
    windows, recall, full = (by_document[metric] for metric in BY_DOCUMENT)
    lines = []
    for run, row in table.sort_values(["model", "text", "tokens", "smaller"], kind="stable").iterrows():
        line = {name: row[name] for name in ("model", "text", "tokens", "count", "method", "allocation", "storage")}
        line["full / cache"] = f"{row['smaller']:.2f}"
        line["KL"], line["ND-PPL"] = _cell(row, "ppl/kl", "{:.4f}"), _cell(row, "ppl/nd", "{:.3f}")
        line["recall"], line["full recall"] = (
            _cell(row, "retrieval/recall", "{:.2f}"),
            _cell(row, "retrieval/full_recall", "{:.2f}"),
        )
        line["recall - 0.95 of full"] = line["bases"] = ""
        if run in recall.index:
            line["recall - 0.95 of full"] = spread(paired(recall.loc[run], 0.95 * full.loc[run]), "{:.3f}")
        if not pd.isna(row.get("storage.bases")):
            line["bases"] = row["storage.bases"]
        line["along"] = "" if pd.isna(row.get("storage.along")) else f"{int(row['storage.along'])}"
        line["bases, MB"] = "" if pd.isna(row.get("bases, MB")) else f"{row['bases, MB']:.1f}"
        line["KL - half of the best rival's"] = line["best rival"] = line["of"] = ""
        if run in windows.index and row["storage"].startswith(CODER) and len(of := rivals(run, table, windows)):
            other, line["of"] = of["ppl/kl"].idxmin(), f"{len(of)}"
            line["KL - half of the best rival's"] = spread(paired(windows.loc[run], windows.loc[other] / 2), "{:.4f}")
            line["best rival"] = ", ".join(table.loc[other, ["method", "allocation", "storage"]])
        lines.append(line)
    found = pd.DataFrame(lines)
    shown = found.loc[:, (found != "").any()].to_markdown(index=False, disable_numparse=True)
    return re.sub("-{4,}", "---", re.sub(" {2,}", " ", shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+", help="databases, such as outputs/mlflow.db")
    parser.add_argument("--out", type=Path, required=True, help="path of the files without their ending")
    arguments = parser.parse_args()
    if missing := [store for store in arguments.stores if not store.is_file()]:  # MLflow would make one
        parser.error(f"{missing[0]} is no file: name databases, such as outputs/mlflow.db")
    table, by_document = collected(arguments.stores)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out.with_suffix(".csv"), float_format="%.6g")
    for metric, ending in (("ppl/kl", "windows"), ("retrieval/recall", "recall")):
        if len(by_document[metric]):
            by_document[metric].to_csv(f"{arguments.out}_{ending}.csv", float_format="%.6g")
    arguments.out.with_suffix(".md").write_text(markdown(table, by_document) + "\n")
    print(markdown(table, by_document))


if __name__ == "__main__":
    main()
