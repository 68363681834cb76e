"""The finished runs of a store as one CSV and one Markdown table, for results of machines that others have not.

    python benchmarks/results.py sqlite:////data/outputs/mlflow.db --models smollm2,reference --out docs/results/smollm2

Writes <out>.csv (every finished run of the models with its means, 95 % intervals and hashes) and <out>.md.
"""

import argparse
from pathlib import Path

import mlflow
import pandas as pd

METRICS = (
    "memory/ratio", "aop/mean", "ppl/nd", "ppl/kl", "ppl/top1", "retrieval/recall", "retrieval/full_recall",
    "retrieval/kept",
)  # fmt: skip
SHOWN = {"aop/mean": "AOP", "ppl/nd": "ND-PPL", "ppl/kl": "KL", "ppl/top1": "top-1"}
PARAMS = (
    "model.name", "method.name", "method.title", "storage.name", "budget.resolved", "document.name",
    "document.title",
    "document.form", "document.tokens", "document.count",
)  # fmt: skip
TAGS = ("table", "hash.model", "hash.document", "hash.code", "version.torch", "version.transformers")


def finished(uri: str, models: list[str], without: list[str]) -> pd.DataFrame:
    """A row a finished run of the models, `without` some methods, and without variants of methods."""
    mlflow.set_tracking_uri(uri)
    runs = mlflow.search_runs(search_all_experiments=True, filter_string="attributes.status = 'FINISHED'")
    runs = runs[runs["params.model.name"].isin(models) & ~runs["params.method.name"].isin(without)]
    runs = runs[runs["tags.table"] != "ablation"].iloc[::-1]  # in the order in which they were measured
    names = [f"params.{p}" for p in PARAMS] + [f"tags.{t}" for t in TAGS]
    names += [f"metrics.{m}{end}" for m in METRICS for end in ("", "_low", "_high")]
    found = runs[[name for name in names if name in runs]]
    return found.rename(columns=lambda name: name.split(".", 1)[1]).drop_duplicates()


def markdown(found: pd.DataFrame) -> str:
    """Mean and interval of what predicts, by document, method and storage."""
    of = found[found["aop/mean"].notna()]
    lines = pd.DataFrame(
        {
            "model": of["model.name"],
            "document": of["document.name"].str.cat(of["document.title"].fillna(""), sep=" ").str.strip(),
            "windows": of["document.count"],
            "method": of["method.title"],
            "storage": of["storage.name"],
            "tokens": of["budget.resolved"],
        }
    )
    for metric, label in SHOWN.items():
        lines[label] = intervals(of, metric)
    tables = [lines.sort_values(["model", "document", "storage", "AOP"], kind="stable").to_markdown(index=False)]
    asked = found[found["retrieval/recall"].notna()]
    lines = asked[["model.name", "document.tokens", "document.count", "document.form", "method.title"]].copy()
    lines.columns = ["model", "tokens", "documents", "form", "method"]
    lines["recall"] = intervals(asked, "retrieval/recall")
    lines["full cache"] = asked["retrieval/full_recall"].round(2)
    lines["planted sentences kept"] = asked["retrieval/kept"].round(2)
    order = ["model", "tokens", "form"]
    return "\n\n".join([*tables, lines.sort_values(order, kind="stable").to_markdown(index=False)])


def intervals(of: pd.DataFrame, metric: str) -> list[str]:
    """`mean [low, high]` of every run."""
    return [
        f"{mean:.3f} [{low:.3f}, {high:.3f}]" if low < high else f"{mean:.3f}"
        for mean, low, high in zip(of[metric], of[f"{metric}_low"], of[f"{metric}_high"], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="tracking URI, such as sqlite:///outputs/mlflow.db")
    parser.add_argument("--models", default="smollm2", help="model.name of the runs, one or more")
    parser.add_argument("--without", default="", help="method.name of runs to leave out")
    parser.add_argument("--out", type=Path, required=True, help="path of the two files without their ending")
    arguments = parser.parse_args()
    found = finished(arguments.store, arguments.models.split(","), arguments.without.split(","))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(arguments.out.with_suffix(".csv"), index=False, float_format="%.6g")
    arguments.out.with_suffix(".md").write_text(markdown(found) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
