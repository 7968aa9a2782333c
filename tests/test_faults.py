"""Processes that die, get stuck or lose their disk: who is named, what is started again."""

import pytest

from jaxcomm.training.watchdog import FINISHED, Beat, Watch, Watchdog

NOBODY = (-1, "nobody was accused")


def watched(silence=10.0, standstill=0.0):
    """Rank 1 of three, all alive at time 0 and judged once a second."""
    return Watch(1, {0, 2}, silence, standstill, 0.0)


def live(watch, start, end, beats):
    """Judges every second; `beats(t)` is what the service answers, None if it does not."""
    for t in range(start, end):
        answer = beats(t)
        if answer is not None:
            watch.hear(answer, float(t))
        if sentence := watch.verdict(float(t)):
            return t, sentence
    return NOBODY


def test_nobody_is_accused_while_all_beat():
    beats = lambda t: {0: Beat(t, 1), 2: Beat(t, 1)}
    assert live(watched(), 1, 100, beats) == NOBODY


def test_a_silent_process_is_named_with_its_last_step():
    beats = lambda t: {0: Beat(t, t), 2: Beat(min(t, 5), min(t, 5))}
    when, sentence = live(watched(), 1, 100, beats)
    assert when == 16  # the last beat at 5, and more than ten seconds
    assert sentence == "rank 2 (last at step 5) is stuck or gone: no sign of life for 11.0 s"


def test_a_process_that_never_beat_is_named():
    _, sentence = live(watched(), 1, 100, lambda t: {0: Beat(t, t)})
    assert sentence.startswith("rank 2 (last at step 0) is stuck or gone")


def test_a_silent_service_is_rank_0():
    beats = lambda t: {0: Beat(t, 7), 2: Beat(t, 7)} if t < 20 else None
    when, sentence = live(watched(), 1, 100, beats)
    assert when == 30
    assert sentence.startswith("rank 0 is stuck or unreachable")
    assert sentence.endswith("last seen at step 7")


def test_a_process_that_was_suspended_does_not_accuse_the_others():
    watch = watched()
    assert live(watch, 1, 5, lambda t: {0: Beat(t, 1), 2: Beat(t, 1)}) == NOBODY
    assert watch.verdict(500.0) is None
    assert live(watch, 501, 520, lambda t: {0: Beat(t, 1), 2: Beat(t, 1)}) == NOBODY
    _, sentence = live(watch, 520, 600, lambda t: {0: Beat(t, 1)})
    assert sentence.startswith("rank 2 (last at step 1) is stuck")


def test_steps_that_stand_still_name_who_is_furthest_behind():
    watch = watched(standstill=30.0)

    def beats(t):
        if t < 8:
            watch.step(t, float(t))
        return {0: Beat(t, min(t, 7)), 2: Beat(t, min(t, 6))}

    when, sentence = live(watch, 1, 100, beats)
    assert when == 38
    assert sentence == "no step for 31.0 s; furthest behind: rank 2 (last at step 6)"


def test_who_has_finished_or_is_forgotten_may_be_silent():
    watch = watched()
    watch.forget(0)
    assert live(watch, 1, 100, lambda _: {2: Beat(FINISHED, 9)}) == NOBODY


def test_a_process_on_its_own_is_not_watched():
    with Watchdog(silence=0.1, end=pytest.fail) as watchdog:
        watchdog.step(1)
        assert watchdog.blame() is None


@pytest.mark.parametrize("name", ["silence", "standstill"])
def test_negative_times_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1 s"):
        Watchdog(**{name: -1.0})
