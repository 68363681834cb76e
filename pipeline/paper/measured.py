"""From jobs to finished runs: what the store holds is read in one call, what it lacks is measured."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from pipeline.job import Job
from pipeline.paper.finished import FinishedRun
from pipeline.paper.placement import Placements
from pipeline.paper.sections import Section
from pipeline.phases.retrieval import LEAST_FULL_RECALL


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
            return self._beyond_the_model
        return (
            f"Withheld: measured on {self.counts} documents, and the section {self.experiment} asks for {self.asked}. "
            f"Leave document.count alone, or set it to at least {self.asked}."
        )

    @property
    def _beyond_the_model(self) -> str | None:
        """That the model itself can't do what is asked of its caches."""
        found = [run.metrics["retrieval/full_recall"] for run in self.runs if "retrieval/full_recall" in run.metrics]
        if not found or min(found) >= LEAST_FULL_RECALL:
            return None
        return (
            f"Withheld: the full cache itself finds {min(found):.2f} of what is asked for; below {LEAST_FULL_RECALL} "
            "the task tells more about the model than about a cache."
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


def _one_of(processes: int) -> None:
    """Leave the other processes their cores: threads that wait for one another spin."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def _executed(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Any]]:
    """Execute jobs, in order in this process or by several, and give each with its result when it is done.

    What is timed is executed last, here, when the other processes have ended.
    """
    from pipeline.run import execute

    shared = [job for job in jobs if processes > 1 and "throughput" not in job.settings.phases]
    if shared:
        context = multiprocessing.get_context("spawn")  # a forked process can't use a GPU
        with ProcessPoolExecutor(min(processes, len(shared)), context, _one_of, (processes,)) as pool:
            waiting = {pool.submit(execute, job): job for job in shared}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
    for job in jobs:
        if not any(job is other for other in shared):
            yield job, execute(job)


def measure(
    sections: list[Section], placements: Placements, say: Callable[[str], None], processes: int = 1
) -> tuple[list[MeasuredSection], int]:
    """Measure what is missing; the sections with their runs, and how many runs are new.

    Jobs that several sections share are measured once. Jobs on the same documents follow one another, those first
    that look at most queries of the prompt: their prefills serve the others.

    Parameters
    ----------
    processes : int
        How many share the work, each with the model loaded. Speeds are timed by one alone.
    """
    from pipeline.run import identity

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

        planned = [one for _, one in sorted(missing.items(), key=turn)]
        section_of = {id(job): experiment for experiment, job in planned}
        for number, (job, result) in enumerate(_executed([job for _, job in planned], processes), 1):
            budget = f" {result.budget}" if result.budget else ""
            took = f"{result.metrics['time/total_s']:.1f} s"
            what = f"{section_of[id(job)]}: {result.title}{budget}, {result.storage}, {result.model}"
            say(f"{number}/{len(missing)} {what}: {took}")
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
