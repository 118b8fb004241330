"""Worker processes that may die or hang: that costs the job at hand, never the run."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

STARTUP_SECONDS = 120.0
"""For a fresh interpreter to import what a job needs, on a busy machine."""


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    deadline: float
    job: int | None = None
    ready: bool = False


class Workers:
    """Run jobs in processes of their own, started by spawn at the first call and kept until `close`.

    Args:
        work: Called with a job in a worker; a function that can be imported there, or a partial of one.
        count: Processes.
        job_seconds: Wall-clock time a job may take. One that takes more is lost, and its worker replaced.
    """

    def __init__(self, work: Callable[[Any], Any], *, count: int, job_seconds: float):
        self.work, self.count, self.job_seconds = work, count, job_seconds
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def run(self, jobs: Sequence[Any]) -> tuple[list[Any], dict[int, str]]:
        """Run all jobs.

        Returns:
            Results in the order of the jobs, None for a lost one; and why each lost one was lost.

        Raises:
            RuntimeError: Workers do not even start.
        """
        results: list[Any] = [None] * len(jobs)
        lost: dict[int, str] = {}
        waiting = list(range(len(jobs)))[::-1]
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                self._fill(min(self.count, len(waiting)))
                self._give(waiting, jobs)
                self._collect(results, lost)
        except BaseException:  # an interrupt, for one: no worker may stay behind with half a job
            self.close()
            raise
        return results, lost

    def close(self) -> None:
        """End all workers; a later `run` starts new ones."""
        for worker in self._workers:
            self._end(worker)
        self._workers = []

    def _fill(self, wanted: int) -> None:
        idle = sum(worker.job is None for worker in self._workers)
        for _ in range(min(wanted - idle, self.count - len(self._workers))):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, self.work), daemon=True)
            process.start()
            theirs.close()  # ours then reads the end of the stream when the worker dies
            self._workers.append(_Worker(process, ours, time.perf_counter() + STARTUP_SECONDS))

    def _give(self, waiting: list[int], jobs: Sequence[Any]) -> None:
        """Hand out jobs to workers that have none."""
        for worker in [worker for worker in self._workers if worker.ready and worker.job is None]:
            if not waiting:
                return
            try:
                worker.connection.send(jobs[waiting[-1]])
            except OSError:  # it died between jobs: the job waits for another
                self._workers.remove(worker)
                self._end(worker)
                continue
            worker.job, worker.deadline = waiting.pop(), time.perf_counter() + self.job_seconds

    def _collect(self, results: list[Any], lost: dict[int, str]) -> None:
        """Wait for the next message, end or deadline, and act on all there are."""
        busy = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        if not busy:
            return
        left = min(worker.deadline for worker in busy) - time.perf_counter()
        heard = wait([worker.connection for worker in busy], timeout=max(left, 0))
        for worker in busy:
            if worker.connection in heard:
                self._hear(worker, results, lost)
            elif time.perf_counter() >= worker.deadline:
                self._drop(worker, f"took more than {self.job_seconds:g} seconds", lost)

    def _hear(self, worker: _Worker, results: list[Any], lost: dict[int, str]) -> None:
        try:
            good, message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            self._drop(worker, f"its worker died (exit code {worker.process.exitcode})", lost)
            return
        if not worker.ready:
            worker.ready = True
            return
        assert worker.job is not None
        if good:
            results[worker.job] = message
        else:
            lost[worker.job] = message
        worker.job = None

    def _drop(self, worker: _Worker, reason: str, lost: dict[int, str]) -> None:
        self._workers.remove(worker)
        self._end(worker)
        if not worker.ready:
            raise RuntimeError(
                "a worker process did not start. Scripts that use `workers` need their code under "
                '`if __name__ == "__main__":`, as workers import the script anew; or set `workers` to 0.'
            )
        if worker.job is not None:
            lost[worker.job] = reason

    def _end(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.join()
        worker.process.close()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """A worker's life: say that it is there, then work until the other end closes."""
    connection.send((True, None))
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, work(job))
        except Exception as error:  # whatever it is, it is the job's, and the other end tells of it
            answer = (False, f"{type(error).__name__}: {error}")
        connection.send(answer)
