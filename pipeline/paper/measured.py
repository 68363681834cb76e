"""From jobs to finished runs: what the store holds is read in one call, what it lacks is measured."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.job import Job
from pipeline.paper.finished import FinishedRun
from pipeline.paper.placement import Placements
from pipeline.paper.sections import Section


@dataclass(frozen=True)
class MeasuredSection:
    """A section with a run for every job.

    Parameters
    ----------
    experiment, title : str
    asked : int
        Documents that the section asks for.
    narrowed : list of str
        Settings by which the section is less than the whole experiment.
    runs : list of FinishedRun
    """

    experiment: str
    title: str
    asked: int
    narrowed: list[str]
    runs: list[FinishedRun]

    @property
    def counts(self) -> int:
        """Documents of the run that has the fewest."""
        return min(run.count for run in self.runs)

    @property
    def withheld(self) -> str | None:
        """Why the section has no tables: a sentence, or None."""
        if self.counts >= self.asked:
            return None
        return (
            f"Withheld: measured on {self.counts} documents, and the section {self.experiment} asks for {self.asked}. "
            f"Leave document.count alone, or set it to at least {self.asked}."
        )


def finished(jobs: list[Job]) -> dict:
    """The newest finished run of every identity in the store of the jobs; deleted runs are not among them."""
    from pipeline.store import tracking

    settings = jobs[0].settings
    mlflow = tracking.connect(settings.tracking, settings.outputs)
    found = mlflow.search_runs(
        experiment_names=[settings.tracking.experiment],
        filter_string="attributes.status = 'FINISHED'",
        order_by=["attributes.start_time ASC"],
        max_results=50_000,
        output_format="list",
    )
    return {run.data.tags[tracking.CONFIGURATION]: run for run in found if tracking.CONFIGURATION in run.data.tags}


def _rows_of(run) -> Callable[[], str]:
    import mlflow

    return lambda: mlflow.artifacts.load_text(f"{run.info.artifact_uri}/rows.json")


def measure(
    sections: list[Section], placements: Placements, say: Callable[[str], None]
) -> tuple[list[MeasuredSection], int]:
    """Measure what is missing; the sections with their runs, and how many runs are new.

    Jobs that several sections share are measured once. Jobs on the same documents follow one another, those first
    that look at most queries of the prompt: their prefills serve the others.
    """
    from pipeline.run import execute, identity

    def identified() -> dict[str, tuple[str, Job]]:
        found: dict[str, tuple[str, Job]] = {}
        for section in sections:
            for job in section.jobs:
                found.setdefault(identity(job, placements.of(job.settings.backend)), (section.experiment, job))
        return found

    jobs = identified()
    there = finished(sections[0].jobs)
    if not set(jobs) <= set(there):  # frameworks are needed anyway
        placements.forget()
        jobs = identified()
    missing = {i: job for i, job in jobs.items() if i not in there or job[1].settings.force}
    if missing:
        from spectral_kv.compressor import observed

        order = list({(job.checkpoint.hash, job.document_hash): None for _, job in missing.values()})

        def turn(item: tuple[str, tuple[str, Job]]) -> tuple[int, int]:
            job = item[1][1]
            seen = observed(job.settings.method.scorer, job.settings.documents.tokens)
            return order.index((job.checkpoint.hash, job.document_hash)), -seen

        for number, (_, (experiment, job)) in enumerate(sorted(missing.items(), key=turn), 1):
            result = execute(job)
            budget = f" {result.budget}" if result.budget else ""
            took = f"{result.metrics['time/total_s']:.1f} s"
            say(f"{number}/{len(missing)} {experiment}: {result.title}{budget}, {result.storage}: {took}")
        there = finished(sections[0].jobs)
    measured = []
    for section in sections:
        runs = []
        for choice, job in zip(section.choices, section.jobs, strict=True):
            run = there[identity(job, placements.of(job.settings.backend))]
            count, metrics, tags = len(job.windows), dict(run.data.metrics), dict(run.data.tags)
            runs.append(FinishedRun(run.info.run_id, choice, count, metrics, tags, _rows_of(run), run.info.start_time))
        measured.append(MeasuredSection(section.experiment, section.title, section.asked, section.narrowed, runs))
    return measured, len(missing)
