"""Jobs in step: each gets what it would alone, and no thread is left behind."""

import contextvars
import threading

import pytest
import torch
from comfyui_gcfg.gcfg.lockstep import run_in_step

SETTING = contextvars.ContextVar("setting", default="default")


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "gcfg-lockstep"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not threads()
    yield
    assert not threads()


def double(questions):
    return [2 * question for _, question in questions]


def noisy(rounds, scale):
    """A solver that draws from the global generator between its calls, as ancestral samplers do."""

    def job(ask):
        x = torch.zeros(3)
        for _ in range(rounds):
            x = ask(x) * scale + torch.randn(3)
        return x

    return job


def alone(job, seed):
    torch.manual_seed(seed)
    result = job(lambda x: 2 * x)
    return result, torch.rand(1)


def test_random_numbers_are_those_of_a_run_alone():
    jobs = [noisy(4, 0.5), noisy(2, 0.7), noisy(7, 0.9), noisy(0, 1.0)]
    expected = [alone(job, 5) for job in jobs]
    torch.manual_seed(5)
    results = run_in_step(jobs, double)
    after = torch.rand(1)
    for result, (wanted, _) in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
    assert any(torch.equal(after, state) for _, state in expected), "the caller goes on where some job stopped"


def test_one_job_leaves_the_generator_as_it_would_alone():
    expected, state = alone(noisy(3, 0.5), 1)
    torch.manual_seed(1)
    (result,) = run_in_step([noisy(3, 0.5)], double)
    assert torch.equal(result, expected)
    assert torch.equal(torch.rand(1), state)


def test_an_answer_that_draws_numbers_does_not_shift_those_of_the_jobs():
    expected, _ = alone(noisy(3, 0.5), 1)

    def answer(questions):
        torch.randn(17)
        return double(questions)

    torch.manual_seed(1)
    for result in run_in_step([noisy(3, 0.5)] * 2, answer):
        assert torch.equal(result, expected)


def test_every_round_asks_all_that_still_run_in_order():
    rounds = []

    def job(name, length):
        return lambda ask: [ask(f"{name}{number}") for number in range(length)]

    def answer(questions):
        rounds.append(list(questions))
        return [question.upper() for _, question in questions]

    results = run_in_step([job("a", 1), job("b", 3), job("c", 0), job("d", 2)], answer)
    assert results == [["A0"], ["B0", "B1", "B2"], [], ["D0", "D1"]]
    assert rounds == [[(0, "a0"), (1, "b0"), (3, "d0")], [(1, "b1"), (3, "d1")], [(1, "b2")]]


def test_only_one_job_runs_at_a_time():
    """Ordinary solvers share state (progress bars, generators), so they must never overlap."""
    running, most = [], []

    def job(ask):
        for number in range(20):
            running.append(1)
            most.append(len(running))
            sum(range(2000))  # long enough for another thread to get its turn
            running.pop()
            ask(number)

    run_in_step([job] * 5, double)
    assert set(most) == {1}


def test_no_jobs():
    assert run_in_step([], double) == []


class Slip(Exception):
    pass


def forever(ended):
    def job(ask):
        try:
            while True:
                ask(0)
        finally:
            ended.append(True)

    return job


@pytest.mark.parametrize("kind", [Slip, KeyboardInterrupt])
def test_an_error_in_a_job_is_raised_and_ends_the_others(kind):
    ended = []

    def fails(ask):
        ask(1)
        raise kind("here")

    with pytest.raises(kind, match="here"):
        run_in_step([forever(ended), fails, forever(ended)], double)
    assert ended == [True, True], "what the others hold is given back"
    assert not threads()


def test_an_error_before_the_first_question_ends_jobs_that_never_began():
    began = []

    def fails(ask):
        raise Slip("at once")

    with pytest.raises(Slip, match="at once"):
        run_in_step([fails, began.append], double)
    assert began == []
    assert not threads()


@pytest.mark.parametrize("kind", [Slip, KeyboardInterrupt])
def test_an_error_in_the_answer_is_raised_and_ends_all(kind):
    ended = []

    def answer(questions):
        if len(calls) == 2:
            raise kind("no answer")
        calls.append(1)
        return double(questions)

    calls = []
    with pytest.raises(kind, match="no answer"):
        run_in_step([forever(ended), forever(ended)], answer)
    assert ended == [True, True]


def test_a_job_that_catches_everything_is_still_ended():
    def stubborn(ask):
        for _ in range(5):
            try:
                ask(0)
            except BaseException:
                continue

    def answer(questions):
        raise Slip("no answer")

    with pytest.raises(Slip):
        run_in_step([stubborn, stubborn], answer)


def test_too_few_answers_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        run_in_step([forever([]), forever([])], lambda questions: [0])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_and_context_are_the_callers(mode):
    def job(ask):
        seen = [torch.is_inference_mode_enabled(), torch.is_grad_enabled(), SETTING.get()]
        x = ask(torch.ones(2, requires_grad=not torch.is_inference_mode_enabled()))
        return [*seen, torch.is_inference_mode_enabled(), x.requires_grad]

    token = SETTING.set("the caller's")
    try:
        with mode():
            expected = job(lambda x: 2 * x)
            assert run_in_step([job, job], double) == [expected, expected]
            assert expected[2] == "the caller's"
    finally:
        SETTING.reset(token)


def test_a_setting_made_in_a_job_stays_there():
    def job(ask):
        before = SETTING.get()
        SETTING.set("changed")
        ask(0)
        return before, SETTING.get()

    assert run_in_step([job, job], double) == [("default", "changed")] * 2
    assert SETTING.get() == "default"


def test_answers_are_given_in_the_callers_thread():
    seen = []

    def answer(questions):
        seen.append(threading.current_thread())
        return double(questions)

    run_in_step([noisy(2, 1.0)] * 2, answer)
    assert set(seen) == {threading.current_thread()}
