"""Needle recall of every method on several models and lengths, as a table that says where the task measures nothing.

    python benchmarks/needles.py
    python benchmarks/needles.py --tokens 2048,4096 --tasks single,multikey,chain --out docs/results/needles_h100
    python benchmarks/needles.py --models smollm2 --tokens 2048 --forms chat --documents 4 method=fourier,full

Further arguments are settings of `python -m pipeline experiment=retrieval`. Every row is a run: 16 documents of four
planted facts, the question hidden at compression, 512 tokens kept. Runs that MLflow holds are not measured again, so
that several processes may each measure a part before one of them writes the whole. Where the full cache finds fewer
than 60 % of what is asked for, the task is left out of the Markdown table, and a line says so; the CSV has everything.
Writes <out>.csv, <out>.md and, of every layer and KV head, <out>_heads.csv: how much of the planted sentences it keeps,
and how much of its attention they get.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import mlflow
import pandas as pd

from pipeline.job import prepare
from pipeline.phases.retrieval import LEAST_FULL_RECALL
from pipeline.run import execute
from pipeline.settings.compose import composed, sweep

# the methods that look at all queries of the prompt first: their prefills serve the others
METHODS = (
    "h2o,observed_attention,expected_attention,full,turboquant,fourier,wavelet,wavelet_fourier,wavelet_tri,tri,snapkv,"
    "tova,keydiff,knorm,random,streaming"
)
FORMS = {"plain": "continued text", "chat": "a turn of a conversation"}


def table(rows: pd.DataFrame) -> str:
    """Recall by method, one column a model, length and form; and what was left out for want of recall."""
    kept, lines = rows[rows.full_recall >= LEAST_FULL_RECALL], []
    out = rows[rows.full_recall < LEAST_FULL_RECALL]
    for task, of in kept.groupby("task", sort=False):
        wide = of.pivot_table(
            index="method", columns=["model", "tokens", "form"], values="cell", aggfunc="first", sort=False
        )
        wide.columns = [f"{model}, {tokens}, {form}" for model, tokens, form in wide.columns]
        lines += [f"Task {task}:", "", wide.fillna("-").to_markdown(), ""]
    for (task, model, tokens, form), of in out.groupby(["task", "model", "tokens", "form"], sort=False):
        lines.append(
            f"- {task}, {model}, {tokens} tokens, asked in {FORMS[form]}: not in the table, as the full cache itself "
            f"finds {of.full_recall.iloc[0]:.2f}, fewer than {LEAST_FULL_RECALL}."
        )
    return "\n".join(lines)


def cell(metrics: dict[str, float]) -> str:
    """Recall with its interval, the share of the planted sentences that is kept, and of the attention they get."""
    low, high = (metrics.get(f"retrieval/recall_{end}", float("nan")) for end in ("low", "high"))
    shares = f"{metrics['retrieval/kept']:.2f}, {metrics['retrieval/mass_kept']:.2f}"
    return f"{metrics['retrieval/recall']:.2f} [{low:.2f}, {high:.2f}] ({shares})"


def hardware(run_id: str) -> dict[str, str]:
    """What a run was measured on."""
    tags = mlflow.get_run(run_id).data.tags
    return {name: tags.get(name, "") for name in ("hardware", "version.torch", "git.revision")}


def heads(run_id: str) -> pd.DataFrame:
    """Means over documents by layer and KV head: `kept` and `mass` of the planted sentences."""
    rows = json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/rows.json"))
    frame = pd.DataFrame(rows["data"], columns=rows["columns"]).dropna(subset=["layer", "head"])
    wide = frame.pivot_table(index=["layer", "head"], columns="metric", values="value", aggfunc="mean")
    return wide.rename(columns=lambda name: name.removeprefix("retrieval/")).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="settings as for python -m pipeline")
    parser.add_argument("--models", default="reference,smollm2", help="options of conf/model")
    parser.add_argument("--tokens", default="2048,4096", help="lengths of the prompts")
    parser.add_argument(
        "--tasks", default="single", help="single, multikey, chain; of all but single the full cache alone"
    )
    parser.add_argument("--forms", default="plain,chat", help="how a model with a chat template is asked")
    parser.add_argument("--documents", type=int, default=16, help="prompts of every model, length and form")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/needles"), help="path of the three files without ending"
    )
    arguments = parser.parse_intermixed_args()
    rows, by_head = [], []
    for model, task in product(arguments.models.split(","), arguments.tasks.split(",")):
        for form in arguments.forms.split(",") if model != "reference" else ["plain"]:
            given = [f"model={model}", f"document.tokens={arguments.tokens}", f"document.form={form}"]
            given += [f"document.task={task}", f"document.count={arguments.documents}"]
            # whether the model can do it at all
            given.append(f"method={METHODS if task == 'single' else 'full'}")
            for overrides in sweep("retrieval", [*given, *arguments.overrides]):
                job = prepare(composed(overrides))
                result = execute(job)
                metrics = result.metrics
                about = {
                    "model": result.model, "task": task, "tokens": job.settings.documents.tokens, "form": form,
                    "method": result.title,
                }  # fmt: skip
                rows.append(
                    about
                    | {
                        "kept_tokens": result.budget or job.settings.documents.tokens,
                        "recall": metrics["retrieval/recall"],
                        "recall_low": metrics.get("retrieval/recall_low"),
                        "recall_high": metrics.get("retrieval/recall_high"),
                        "full_recall": metrics["retrieval/full_recall"],
                        "planted_kept": metrics["retrieval/kept"],
                        "planted_mass": metrics["retrieval/mass"],
                        "planted_mass_kept": metrics["retrieval/mass_kept"],
                        "cell": cell(metrics),
                        "questions": sum(map(len, job.lookups)),
                        "hash_model": job.checkpoint.hash,
                        "hash_document": job.document_hash,
                        "code": job.code_hash,
                        **hardware(result.run_id),
                        "run": result.run_id,
                    }
                )
                by_head.append(heads(result.run_id).assign(**about))
                print(about | {k: rows[-1][k] for k in ("cell", "full_recall")}, flush=True)
    found = pd.DataFrame(rows)
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    found.drop(columns="cell").to_csv(out.with_suffix(".csv"), index=False, float_format="%.6g")
    by_layer = out.with_name(f"{out.name}_heads.csv")
    pd.concat(by_head).to_csv(by_layer, index=False, float_format="%.4g")
    out.with_suffix(".md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
