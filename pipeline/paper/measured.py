"""From jobs to finished runs: what the store holds is read in one call, what it lacks is measured."""

import json
import multiprocessing
import os
import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from pipeline.job import NOT_IDENTITY, Job
from pipeline.paper.finished import FinishedRun
from pipeline.paper.follow import follow, outliving
from pipeline.paper.placement import Placements
from pipeline.paper.sections import Section
from pipeline.paper.stored import finished
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
    taken : list of str
        Overrides of the whole document that mean something to the section.
    """

    experiment: str
    title: str
    asked: int
    narrowed: list[str]
    runs: list[FinishedRun]
    taken: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """What measures the section's runs; where they are written to is for others to say."""
        taken = [o for o in self.taken if o.partition("=")[0].partition(".")[0] not in NOT_IDENTITY]
        return shlex.join(["python", "-m", "pipeline", f"experiment={self.experiment}", *self.narrowed, *taken])

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
        """That the model itself can't do anything of what is asked of its caches."""
        found = [run.metrics["retrieval/full_recall"] for run in self.runs if "retrieval/full_recall" in run.metrics]
        if not found or max(found) >= LEAST_FULL_RECALL:
            return None
        return (
            f"Withheld: the full cache itself finds {max(found):.2f} of what is asked for; below {LEAST_FULL_RECALL} "
            "the task tells more about the model than about a cache."
        )


def _one_of(processes: int) -> None:
    """End with the process that shares its work, and leave others their cores: waiting threads spin."""
    import torch

    follow()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def _documents(job: Job) -> tuple[str, str]:
    """What a prefill depends on: the model and the documents."""
    return job.checkpoint.hash, job.document_hash


def _parts(jobs: list[Job]) -> set[int]:
    """Jobs, by their ids, of whose phases another one on the same documents has all and more.

    A process that measured the other knows all of the full cache that they need.
    """
    phases: dict[tuple[str, str], set[frozenset]] = {}
    for job in jobs:
        phases.setdefault(_documents(job), set()).add(frozenset(job.settings.phases))
    return {id(job) for job in jobs if any(set(job.settings.phases) < more for more in phases[_documents(job)])}


def _next(
    left: list[Job], own: tuple[Hashable, bool], others: set[tuple[Hashable, bool]], parts: set[int]
) -> tuple[Job, tuple[Hashable, bool]]:
    """The job that suits a process, and the process's new place: documents, and whether it begins with the `parts`.

    It is on documents of its `own` place, on those of none of the `others`, or where most is left. What of the full
    cache jobs need is measured once a process: the first who joins another begins with the parts, all others leave them
    for last.
    """
    held = Counter(_documents(job) for job in left)
    if own[0] in held:
        of, begins = own
    else:
        taken = {documents for documents, _ in others}
        of = next((d for d in held if d not in taken), held.most_common(1)[0][0])
        begins = of in taken and (of, True) not in others
    there = [job for job in left if _documents(job) == of]
    return next((job for job in there if (id(job) in parts) == begins), there[0]), (of, begins)


def _by_several(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Any]]:
    """Execute jobs in several processes, each of which stays with its documents as long as there are jobs on them."""
    from pipeline.run import execute

    context = multiprocessing.get_context("spawn")  # a forked process can't use a GPU
    left, busy, held, parts = list(jobs), {}, {}, _parts(jobs)
    with outliving(processes), ExitStack() as stack:
        count = min(processes, len(jobs))
        idle = [stack.enter_context(ProcessPoolExecutor(1, context, _one_of, (processes,))) for _ in range(count)]
        while left or busy:
            while left and idle:
                pool = idle.pop(0)
                others = {place for other, place in held.items() if other is not pool}
                job, held[pool] = _next(left, held.get(pool, (None, False)), others, parts)
                left = [other for other in left if other is not job]
                busy[pool.submit(execute, job)] = (pool, job)
            for done in wait(busy, return_when=FIRST_COMPLETED).done:
                pool, job = busy.pop(done)
                idle.append(pool)
                yield job, done.result()


def _executed(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Any]]:
    """Execute jobs, in order in this process or by several, and give each with its result when it is done.

    What is timed is executed last, here, when the other processes have ended.
    """
    from pipeline.run import execute

    shared = [job for job in jobs if processes > 1 and "throughput" not in job.settings.phases]
    yield from _by_several(shared, processes)
    for job in jobs:
        if not any(job is other for other in shared):
            yield job, execute(job)


def served(jobs: dict[str, Job]) -> dict[str, str]:
    """Of every job whose phases another one measures too, all else alike, whose run serves it; both by identity."""
    alike: dict[str, list[str]] = {}
    for name, job in jobs.items():
        settings = {k: v for k, v in job.resolved.items() if k not in NOT_IDENTITY | {"phase"}}
        alike.setdefault(json.dumps([settings, job.document_hash, job.checkpoint.hash], sort_keys=True), []).append(
            name
        )
    found = {}
    for names in alike.values():
        most = max(names, key=lambda name: len(jobs[name].settings.phases))
        phases = jobs[most].resolved["phase"].items()
        found |= {n: most for n in names if n != most and all(x in phases for x in jobs[n].resolved["phase"].items())}
    return found


def measure(
    sections: list[Section],
    placements: Placements,
    say: Callable[[str], None],
    processes: int = 1,
) -> tuple[list[MeasuredSection], int]:
    """Measure what is missing; the sections with their runs, and how many runs are new.

    Jobs that several sections share are measured once, and one whose phases are among those of another job not at all:
    its section reads the other's run. Jobs on the same documents follow one another, those first
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

    def lacking() -> tuple[dict[str, tuple[str, Job]], dict[str, str]]:
        """What is to be measured, and which runs serve other jobs."""
        jobs = identified()
        wanted = {i: job for i, job in jobs.items() if i not in there or job[1].settings.force}
        serving = {i: run for i, run in served({i: job for i, (_, job) in jobs.items()}).items() if i in wanted}
        return {i: job for i, job in wanted.items() if i not in serving}, serving

    store = sections[0].jobs[0].settings
    there = finished(store.tracking, store.outputs)
    missing, serving = lacking()
    if missing:  # frameworks are needed anyway, and know where they compute
        placements.forget()
        missing, serving = lacking()
    if missing:
        from spectral_kv.compressor import observed

        order = list({_documents(job): None for _, job in missing.values()})

        def turn(item: tuple[str, tuple[str, Job]]) -> tuple[int, int]:
            job = item[1][1]
            seen = observed(job.settings.method.scorer, job.settings.documents.tokens)
            return order.index(_documents(job)), -seen

        planned = [one for _, one in sorted(missing.items(), key=turn)]
        section_of = {id(job): experiment for experiment, job in planned}
        for number, (job, result) in enumerate(_executed([job for _, job in planned], processes), 1):
            budget = f" {result.budget}" if result.budget else ""
            took = f"{result.metrics['time/total_s']:.1f} s"
            what = f"{section_of[id(job)]}: {result.title}{budget}, {result.storage}, {result.model}"
            say(f"{number}/{len(missing)} {what}: {took}")
        there = finished(store.tracking, store.outputs)
    measured = []
    for section in sections:
        runs = []
        for choice, job in zip(section.choices, section.jobs, strict=True):
            name = identity(job, placements.of(job.settings.backend))
            run = there[serving.get(name, name)]
            about = (run.run_id, choice, len(job.windows), run.metrics, run.tags)
            runs.append(FinishedRun(*about, run.rows, run.started))
        about = (section.experiment, section.title, section.asked, section.narrowed)
        measured.append(MeasuredSection(*about, runs, section.taken))
    return measured, len(missing)
