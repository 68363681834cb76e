"""Run what is missing of the published comparison, and write its tables.

    python -m pipeline.paper
    python -m pipeline.paper document.count=16 model=qwen2_5_0_5b model.path=/checkpoint

Further arguments are settings as for `python -m pipeline`. Results go to <outputs>/paper: tables.md and a CSV file a
table. A configuration that MLflow already holds, measured with the same code, model and documents, is not run again.
"""

import argparse
import sys
from pathlib import Path

from pipeline.cli import reporting
from pipeline.compose import composed, spelled_out, sweep
from pipeline.errors import InputError
from pipeline.job import Job, prepare

EXPERIMENT = "paper"


def measured(jobs: list[Job]) -> tuple[dict[str, str], int]:
    """Run ids by method, and how many of them had to be measured."""
    from pipeline.run import execute

    ids, fresh = {}, 0
    for number, job in enumerate(jobs, 1):
        result = execute(job)
        ids[job.settings.method.name] = result.run_id
        fresh += not result.reused
        took = "measured before" if result.reused else f"{result.metrics['time/total_s']:.1f} s"
        print(f"{number}/{len(jobs)} {result.title}: {took}", flush=True)
    return ids, fresh


def write(jobs: list[Job], ids: dict[str, str]) -> tuple[str, Path]:
    """Build the tables from MLflow, write them, and return them as Markdown with the folder they are in."""
    from pipeline import tracking
    from pipeline.paper.tables import TABLES, build, published, render

    settings = jobs[0].settings
    mlflow = tracking.connect(settings.tracking, settings.outputs)
    runs = mlflow.search_runs(
        experiment_names=[settings.tracking.experiment],
        filter_string="attributes.status = 'FINISHED'",
        max_results=50_000,
    )
    runs = runs[runs["run_id"].isin(ids.values())].set_index("tags.method").loc[list(ids)]

    folder = settings.outputs / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    documents = settings.documents
    budget = next(job.budget for job in jobs if job.budget)
    head = (
        "# Published tables, measured again\n\n"
        f"Model {settings.model.name}, {documents.count} documents of {documents.tokens} tokens from "
        f"{documents.source}, {settings.phases['perplexity'].tokens - 1} tokens scored after each, "
        f"budget {budget.tokens} tokens (sinks {budget.sinks} and recent {budget.recent} "
        "included). Means over documents with 95 % bootstrap intervals. "
        "Published: Qwen2.5-0.5B, one document, no intervals.\n"
    )
    sections = [head]
    flagged = runs["metrics.ppl/flagged"].max()
    if flagged > 0:
        sections.append(
            f"**{flagged:.0%} of the documents have a full-cache perplexity under 1.5: they measure copying, not "
            "language modelling.**\n"
        )
    numbers = published()
    for spec in TABLES:
        table = build(spec, runs, numbers[spec.name])
        table.to_csv(folder / f"{spec.name}.csv", index_label="option")
        sections.append(render(spec, table))
    first = runs.iloc[0]
    trace = "\n".join(f"- {row['tags.title']}: {row['run_id']}" for _, row in runs.iterrows())
    sections.append(
        "## Where these numbers come from\n\n"
        f"MLflow store {tracking.store_uri(settings.tracking, settings.outputs)}; "
        f"code {first['tags.git.revision']} ({first['tags.hash.code']}), model {first['tags.hash.model']}, "
        f"documents {first['tags.hash.document']}. Runs:\n\n{trace}\n"
    )
    text = "\n".join(sections)
    (folder / "tables.md").write_text(text)
    return text, folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings as for python -m pipeline")
    overrides = parser.parse_intermixed_args().overrides
    with reporting(sys.argv[1:]):
        jobs = [prepare(composed(job)) for job in sweep(EXPERIMENT, spelled_out(overrides))]
        if len({job.settings.method.name for job in jobs}) < len(jobs):
            raise InputError("the paper has one run a method: give one value for every other setting")
        ids, fresh = measured(jobs)
        text, folder = write(jobs, ids)
        print(f"\n{text}\n{fresh} configurations measured, {len(jobs) - fresh} were there already. Tables: {folder}")


if __name__ == "__main__":
    main()
