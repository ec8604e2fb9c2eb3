"""Several jobs that ask for evaluations, in step: every round of questions is answered at once.

A solver is an ordinary function that calls its model. To batch the calls of several solvers each one runs in a thread
of its own, but only one of them ever runs: a job goes on until it asks, then waits, and when all have asked they are
answered together. So any solver works, and each sees exactly what it would see alone, its random numbers included.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")


class _Cancelled(BaseException):
    """Unwinds a job that will not be answered any more."""


def run_in_step(
    jobs: Sequence[Callable[[Callable[[Q], A]], R]],
    answer: Callable[[list[tuple[int, Q]]], Sequence[A]],
    device: torch.device | None = None,
) -> list[R]:
    """Run jobs that ask questions, and answer each round of questions with one call.

    Args:
        jobs: functions of `ask`; `ask(question)` returns the answer.
        answer: gets the open questions as (job number, question), in the order of the jobs, and returns an answer for
            each. Called in the caller's thread.
        device: the device whose random numbers the jobs draw, besides the CPU's.

    Returns:
        What the jobs return. Every job begins with the caller's random state; the caller keeps the last job's.

    Raises:
        Whatever a job or `answer` raises; the other jobs are ended first.
    """
    start = RandomState.take(device)
    running = [_Job(job, start) for job in jobs]
    try:
        for job in running:
            job.resume()
        while asking := [(number, job) for number, job in enumerate(running) if not job.ended]:
            answers = answer([(number, job.question) for number, job in asking])
            for (_, job), given in zip(asking, answers, strict=True):
                job.resume(given)
    finally:
        for job in running:
            job.cancel()
    return [job.result for job in running]


class _Job(Generic[Q, A, R]):
    """A job in a thread that runs only while `resume` waits for it."""

    question: Q
    result: R

    def __init__(self, work: Callable[[Callable[[Q], A]], R], random: RandomState) -> None:
        self.ended = False
        self._answer: Any = None  # of type A, once there is one
        self._error: BaseException | None = None
        self._cancelled = False
        self._random = random
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        # Modes and settings of PyTorch and ComfyUI belong to a thread or a context: the job gets the caller's.
        context, inference, grad = (
            contextvars.copy_context(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
        )

        def run() -> None:
            self._go.acquire()
            try:
                if not self._cancelled:
                    with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
                        self.result = context.run(work, self._ask)
            except _Cancelled:
                pass
            except BaseException as error:
                self._error = error
            finally:
                self.ended = True
                self._stopped.release()

        self._thread = threading.Thread(target=run, name="gcfg-lockstep", daemon=True)
        self._thread.start()

    def resume(self, answer: A | None = None) -> None:
        """Let the job run until it asks or ends; raises what it raised."""
        self._answer = answer
        self._random.restore()
        self._switch()
        self._random = self._random.taken_again()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the job and its thread, whatever it is doing."""
        while not self.ended:
            self._cancelled = True
            self._switch()
        self._thread.join()

    def _switch(self) -> None:
        self._go.release()
        self._stopped.acquire()

    def _ask(self, question: Q) -> A:
        self.question = question
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled
        answer: A = self._answer
        return answer


class RandomState:
    """The state of the global generators, which some solvers draw their noise from.

    Args:
        device: the device whose generator counts, besides the CPU's.
        states: of the CPU's generator, and of the device's if it is a GPU.
    """

    def __init__(self, device: torch.device | None, states: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        self._device, self._states = device, states

    @classmethod
    def take(cls, device: torch.device | None) -> RandomState:
        """The state now."""
        cuda = device if device is not None and device.type == "cuda" else None
        return cls(cuda, (torch.get_rng_state(), None if cuda is None else torch.cuda.get_rng_state(cuda)))

    def taken_again(self) -> RandomState:
        """The state of the same generators now."""
        return self.take(self._device)

    def restore(self) -> None:
        """Put the generators back to this state."""
        torch.set_rng_state(self._states[0])
        if self._states[1] is not None:
            assert self._device is not None
            torch.cuda.set_rng_state(self._states[1], self._device)
