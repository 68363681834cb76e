"""Run what is missing of every experiment, and write the document: tables, figures, and a verdict on every claim.

    python -m pipeline.paper                                     every section, on the embedded model
    python -m pipeline.paper --full                              and whole experiments where a section is a part of one
    python -m pipeline.paper --sections paper,budgets            some sections
    python -m pipeline.paper model=qwen2_5_0_5b model.path=/checkpoint model.calibration=/statistics.safetensors
    python -m pipeline.paper --refresh                           measure again what is there already

Further arguments are settings as for `python -m pipeline`; they apply to every section whose experiment doesn't choose
another option of the same group. Results go to <outputs>/paper: index.html (one page that needs no network), paper.md,
results.json, tables/ (CSV and LaTeX) and figures/ (PNG and SVG). A configuration that MLflow already holds, measured
with the same code, model and documents, is not run again: after an interruption the command goes on. That holds for
speeds, too, which the document dates: `--sections speed --refresh` times again.
"""

import argparse
import sys
from pathlib import Path

from pipeline.paper.readme import refresh
from pipeline.paper.sections import plan, titles, usual
from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed


def regenerate(experiments: list[str], overrides: list[str], readme: Path | None = None, full: bool = False) -> None:
    """Measure what is missing, write the document, and print the verdicts.

    Parameters
    ----------
    readme : Path, optional
        A Markdown file that receives a copy of the results between its markers, and of the published tables in the
        folder docs beside it.
    full : bool
        Whether whole experiments are measured.
    """
    general = [o for o in overrides if o.partition("=")[0] in ("outputs", "tracking.uri", "tracking.experiment")]
    outputs = Path(composed(general).outputs).resolve()
    folder = outputs / "paper"
    sections = plan(experiments, overrides, folder / "compositions.json", full)
    from pipeline.paper.document import Origin, tally, timed, write
    from pipeline.paper.measured import measure
    from pipeline.paper.placement import Placements
    from pipeline.store import tracking

    placements = Placements(folder / "placements.json")
    measured, fresh = measure(sections, placements, lambda line: print(line, flush=True))
    first = next((s for s in sections if s.experiment == "paper"), sections[0]).jobs[0].settings
    documents = first.documents
    origin = Origin(
        first.model.name,
        f"windows of {documents.tokens} + {documents.continuation} tokens of {documents.source}",
        tracking.store_uri(first.tracking, first.outputs),
        " ".join(["python -m pipeline.paper", *sys.argv[1:]]),
        " ".join(general),
    )
    document = write(measured, origin, folder)
    verdicts = document.verdicts
    if readme is not None:
        refresh(readme, document.excerpt(), document.published_tables(), folder / "figures")
    total = len({run.run_id for section in measured for run in section.runs})
    for sentence in document.main_result:
        print(f"\n{sentence}")
    if verdicts:
        print(f"\n{tally(verdicts)}")
        for verdict in verdicts:
            print(f"  {verdict.verdict:<14} {verdict.source}: {verdict.statement}\n{'':>17}{verdict.deciding}")
    if when := timed(measured):
        print(f"\n{when}")
    for section in measured:
        if section.withheld:
            print(f"{section.title}: {section.withheld}")
    print(f"\n{fresh} configurations measured, {total - fresh} were there already. The document: {folder / 'paper.md'}")
    print(f"As a page to open: {folder / 'index.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="settings as for python -m pipeline")
    parser.add_argument(
        "--sections", metavar="NAME,...", help=f"some of {', '.join(titles())}; by default {', '.join(usual(False))}"
    )
    parser.add_argument("--readme", metavar="FILE", type=Path, help="a Markdown file that gets a copy of the results")
    parser.add_argument("--full", action="store_true", help="whole experiments, where sections take a part of them")
    parser.add_argument("--refresh", action="store_true", help="measure again what is there already")
    arguments = parser.parse_intermixed_args()
    experiments = usual(arguments.full) if arguments.sections is None else arguments.sections.split(",")
    overrides = [*arguments.overrides, *(["force=true"] if arguments.refresh else [])]
    with reporting(sys.argv[1:]):
        regenerate(experiments, overrides, arguments.readme, arguments.full)


if __name__ == "__main__":
    main()
