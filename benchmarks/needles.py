"""Needle recall of every method on several models and lengths, as a table that says where the task measures nothing.

    python benchmarks/needles.py
    python benchmarks/needles.py --models reference,smollm2 --tokens 2048,4096 backend.device=cuda

Further arguments are settings of `python -m pipeline experiment=retrieval`. Every row is a run: 16 documents of four
planted facts, the question hidden at compression, 512 tokens kept. Runs that MLflow holds are not measured again. A
model whose full cache finds fewer than 60 % of the facts is left out of the Markdown table, and a line says so; the CSV
has everything. Writes <out>/needles.csv and <out>/needles.md.
"""

import argparse
from pathlib import Path

import pandas as pd

from pipeline.job import prepare
from pipeline.phases.retrieval import LEAST_FULL_RECALL
from pipeline.run import execute
from pipeline.settings.compose import composed, sweep
from pipeline.statistics import Estimate

DOCUMENTS = 16
FORMS = {"plain": "continued text", "chat": "a turn of a conversation"}


def table(rows: pd.DataFrame) -> str:
    """Recall by method, one column a model, length and form; and what was left out for want of recall."""
    kept, lines = rows[rows.full_recall >= LEAST_FULL_RECALL], []
    out = rows[rows.full_recall < LEAST_FULL_RECALL]
    wide = kept.pivot_table(
        index="method", columns=["model", "tokens", "form"], values="cell", aggfunc="first", sort=False
    )
    wide.columns = [f"{model}, {tokens}, {form}" for model, tokens, form in wide.columns]
    if len(kept):
        lines += [wide.fillna("-").to_markdown(), ""]
    for (model, tokens, form), of in out.groupby(["model", "tokens", "form"], sort=False):
        lines.append(
            f"{model}, {tokens} tokens, asked in {FORMS[form]}: not in the table, as the full cache itself finds "
            f"{of.full_recall.iloc[0]:.2f}, fewer than {LEAST_FULL_RECALL}."
        )
    return "\n".join(lines)


def cell(recall: Estimate, kept: float) -> str:
    """Recall with its interval, and the share of the planted sentences that is kept."""
    return f"{recall.mean:.2f} [{recall.low:.2f}, {recall.high:.2f}] ({kept:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="settings as for python -m pipeline")
    parser.add_argument("--models", default="reference,smollm2", help="options of conf/model")
    parser.add_argument("--tokens", default="2048,4096", help="lengths of the prompts")
    parser.add_argument("--forms", default="plain,chat", help="how a model with a chat template is asked")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the two files")
    arguments = parser.parse_intermixed_args()
    rows = []
    for model in arguments.models.split(","):
        for form in arguments.forms.split(",") if model != "reference" else ["plain"]:
            given = [f"model={model}", f"document.tokens={arguments.tokens}", f"document.form={form}"]
            for overrides in sweep("retrieval", [*given, f"document.count={DOCUMENTS}", *arguments.overrides]):
                job = prepare(composed(overrides))
                result = execute(job)
                recall, full = result.estimate("retrieval/recall"), result.metrics["retrieval/full_recall"]
                rows.append(
                    {
                        "model": result.model,
                        "tokens": job.settings.documents.tokens,
                        "form": form,
                        "method": result.title,
                        "kept_tokens": result.budget or job.settings.documents.tokens,
                        "recall": recall.mean,
                        "recall_low": recall.low,
                        "recall_high": recall.high,
                        "full_recall": full,
                        "planted_kept": result.metrics["retrieval/kept"],
                        "cell": cell(recall, result.metrics["retrieval/kept"]),
                        "questions": sum(map(len, job.lookups)),
                        "hash_model": job.checkpoint.hash,
                        "hash_document": job.document_hash,
                        "code": job.code_hash,
                    }
                )
                print(
                    {k: rows[-1][k] for k in ("model", "tokens", "form", "method", "cell", "full_recall")}, flush=True
                )
    found = pd.DataFrame(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found.drop(columns="cell").to_csv(arguments.out / "needles.csv", index=False, float_format="%.6g")
    (arguments.out / "needles.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
