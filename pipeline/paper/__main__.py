"""Run what is missing of every experiment, and write the document: tables, figures, and a verdict on every claim.

    python -m pipeline.paper                                     every section but optional ones, on the embedded model
    python -m pipeline.paper --full                              and those, and every experiment whole
    python -m pipeline.paper --sections paper,budgets            some sections
    python -m pipeline.paper model=qwen2_5_0_5b model.path=/checkpoint model.calibration=/statistics.safetensors
    python -m pipeline.paper --models reference,smollm2          two models, and a section that compares them
    python -m pipeline.paper --refresh                           measure again what is there already

Further arguments are settings as for `python -m pipeline`; they apply to every section whose experiment doesn't choose
another option of the same group. Results go to <outputs>/paper: index.html (one page that needs no network), paper.md,
results.json, tables/ (CSV and LaTeX) and figures/ (PNG and SVG). Of several models the first one's document is there,
with the section over models in it; every other has its own in <outputs>/paper/<model>. A configuration that MLflow
already holds, measured with the same code, model and documents, is not run again: after an interruption the command
goes on. That holds for speeds, too, which the document dates: `--sections speed --refresh` times again.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.paper.readme import refresh
from pipeline.paper.sections import Section, plan, titles, usual
from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError

if TYPE_CHECKING:
    from pipeline.paper.provenance import Origin


def regenerate(
    experiments: list[str],
    overrides: list[str],
    readme: Path | None = None,
    full: bool = False,
    models: list[str] | None = None,
    results: Path | None = None,
    processes: int = 1,
) -> None:
    """Measure what is missing, write the document, and print the verdicts.

    Parameters
    ----------
    readme : Path, optional
        A Markdown file that receives a copy of the results between its markers, and of the published tables in the
        folder docs beside it.
    full : bool
        Whether whole experiments are measured.
    models : list of str, optional
        Options of the group model, which are compared; by default one, which the overrides choose.
    results : Path, optional
        Where the section over models, or the one model's document without its figures, goes as `.md`, and all its runs
        as `.csv`.
    processes : int
        How many share the work.

    Raises
    ------
    InputError
        If the overrides and `models` both choose, or a model is named twice.
    """
    if models and (given := [o for o in overrides if o.startswith(("model=", "model."))]):
        raise InputError(f"--models chooses the models, and so does {given[0]}: leave one of them out")
    if twice := [model for model in models or [] if models.count(model) > 1 or not model]:
        raise InputError(f"--models names '{twice[0]}' twice or no model: write each option of model once, with commas")
    general = [o for o in overrides if o.partition("=")[0] in ("outputs", "tracking.uri", "tracking.experiment")]
    folder = Path(composed(general).outputs).resolve() / "paper"
    chosen = [[f"model={model}", *overrides] for model in models] if models else [overrides]
    planned = [plan(experiments, own, folder / "compositions.json", full, processes) for own in chosen]
    from pipeline.paper.document import judged, tally, write, write_results
    from pipeline.paper.measured import measure
    from pipeline.paper.models import ModelResults, over_models
    from pipeline.paper.placement import Placements
    from pipeline.paper.provenance import timed

    placements = Placements(folder / "placements.json")
    everything = [section for sections in planned for section in sections]
    measured, fresh = measure(everything, placements, lambda line: print(line, flush=True), processes)
    each = [measured[i : i + len(experiments)] for i in range(0, len(measured), len(experiments))]
    origins = [_origin(sections, general) for sections in planned]
    over = None
    if len(each) > 1:
        together = zip(origins, each, strict=True)
        over = over_models([ModelResults(o.model, o.documents, own, judged(own)) for o, own in together])
    document = write(each[0], origins[0], folder, over)
    for model, origin, own in list(zip(models or [], origins, each, strict=False))[1:]:
        write(own, origin, folder / model)
    if results is not None:
        write_results(document, results)
    if readme is not None:
        refresh(readme, document.excerpt(), document.published_tables(), folder / "figures")
    total = len({run.run_id for section in measured for run in section.runs})
    for sentence in document.main_result:
        print(f"\n{sentence}")
    if document.verdicts:
        print(f"\n{tally(document.verdicts)}")
        for verdict in document.verdicts:
            print(f"  {verdict.verdict:<14} {verdict.source}: {verdict.statement}\n{'':>17}{verdict.deciding}")
    if over:
        print(f"\n{over.matrix.title}\n{over.matrix.plain(width=48)}")
        for sentence in over.changes:
            print(f"\n{sentence}")
    if when := timed(measured):
        print(f"\n{when}")
    for section in measured:
        if section.withheld:
            print(f"{section.title}: {section.withheld}")
    print(f"\n{fresh} configurations measured, {total - fresh} were there already. The document: {folder / 'paper.md'}")
    print(f"As a page to open: {folder / 'index.html'}")


def _origin(sections: list[Section], where: list[str]) -> "Origin":
    """What a model's document is about; `where` are the settings that lead to its store."""
    from pipeline.paper.provenance import Origin, portable
    from pipeline.store import tracking

    first = next((s for s in sections if s.experiment == "paper"), sections[0]).jobs[0].settings
    documents = first.documents
    return Origin(
        first.model.title,
        f"windows of {documents.tokens} + {documents.continuation} tokens of {documents.source}",
        portable(tracking.store_uri(first.tracking, first.outputs)),
        shlex.join(["python", "-m", "pipeline.paper", *map(portable, sys.argv[1:])]),
        shlex.join(map(portable, where)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="settings as for python -m pipeline")
    parser.add_argument(
        "--sections", metavar="NAME,...", help=f"some of {', '.join(titles())}; by default {', '.join(usual(False))}"
    )
    parser.add_argument("--readme", metavar="FILE", type=Path, help="a Markdown file that gets a copy of the results")
    parser.add_argument("--models", metavar="NAME,...", help="options of model that are compared, as reference,smollm2")
    parser.add_argument(
        "--results",
        metavar="STEM",
        type=Path,
        help="also writes <STEM>.md, of several models the section over them, and every run to <STEM>.csv",
    )
    parser.add_argument(
        "--processes", metavar="N", type=int, default=1, help="share the work; speeds are timed afterwards by one alone"
    )
    parser.add_argument("--full", action="store_true", help="whole experiments, where sections take a part of them")
    parser.add_argument("--refresh", action="store_true", help="measure again what is there already")
    arguments = parser.parse_intermixed_args()
    models = arguments.models.split(",") if arguments.models else None
    overrides = [*arguments.overrides, *(["force=true"] if arguments.refresh else [])]
    with reporting(sys.argv[1:]):
        named = arguments.sections
        experiments = usual(arguments.full, overrides, models) if named is None else named.split(",")
        regenerate(
            experiments, overrides, arguments.readme, arguments.full, models,
            arguments.results, arguments.processes,
        )  # fmt: skip


if __name__ == "__main__":
    main()
