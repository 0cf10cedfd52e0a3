from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.callbacks.schedule import Schedule
from lightning_interp.errors import ConfigurationError

positive = st.integers(1, 50)
epochs = st.integers(0, 200)


@given(positive, epochs)
def test_epochs_are_due_where_lightning_would_say_so(every: int, epoch: int) -> None:
    assert Schedule(every_n_epochs=every).due_after_epoch(epoch) is ((epoch + 1) % every == 0)


@given(st.lists(epochs, min_size=1), epochs)
def test_chosen_epochs_are_due_in_any_order(chosen: list[int], epoch: int) -> None:
    schedule = Schedule.create(at_epochs=chosen)
    assert schedule.due_after_epoch(epoch) is (epoch in chosen)
    assert not schedule.due_after_steps(previous=0, now=10**6)


@given(positive, st.lists(st.integers(0, 7), max_size=60))
def test_each_multiple_is_seen_once_however_steps_come(every: int, strides: list[int]) -> None:
    # A batch brings no step under accumulation, and several under manual optimisation.
    schedule, now, due, crossed = Schedule(every_n_train_steps=every), 0, [], []
    for stride in strides:
        previous, now = now, now + stride
        due.append(schedule.due_after_steps(previous, now))
        crossed.append(any(step % every == 0 for step in range(previous + 1, now + 1)))
    assert due == crossed
    if all(stride <= every for stride in strides):
        assert sum(due) == now // every


@given(positive, epochs)
def test_step_schedules_are_never_due_at_an_epochs_end(every: int, epoch: int) -> None:
    assert not Schedule(every_n_train_steps=every).due_after_epoch(epoch)


@given(positive, epochs)
def test_epoch_schedules_are_never_due_after_steps(every: int, step: int) -> None:
    assert not Schedule(every_n_epochs=every).due_after_steps(step, step + 100)


@given(positive)
def test_resuming_changes_nothing(every: int) -> None:
    schedule = Schedule(every_n_epochs=every)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(Schedule(every_n_epochs=every))


@pytest.mark.parametrize("at_epochs", [[0, 5], (0, 5), range(0, 6, 5)])
def test_any_sequence_of_epochs_will_do(at_epochs: Any) -> None:
    assert Schedule.create(at_epochs=at_epochs).at_epochs == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs takes a positive integer, got 0"),
        ({"every_n_epochs": 1.5}, r"every_n_epochs takes a positive integer, got 1\.5"),
        ({"every_n_epochs": True}, "every_n_epochs takes a positive integer, got True"),
        ({"every_n_train_steps": -3}, "every_n_train_steps takes a positive integer, got -3"),
        ({"at_epochs": []}, r"at_epochs takes a list of 0-based epochs, got \[\]; to record only the untrained model"),
        ({"at_epochs": [1, -2]}, r"at_epochs takes 0-based epochs, got -2 in \[1, -2\]"),
        ({"at_epochs": [1, 2.0]}, r"at_epochs takes 0-based epochs, got 2\.0 in"),
        ({"at_epochs": "12"}, "at_epochs takes a list of 0-based epochs, got '12'"),
        ({"at_epochs": 3}, "at_epochs takes a list of 0-based epochs, got 3"),
        ({"every_n_epochs": 2, "at_epochs": [1]}, "every_n_epochs and at_epochs exclude each other; give one of them"),
        ({"every_n_epochs": 2, "every_n_train_steps": 5}, "every_n_epochs and every_n_train_steps exclude each other"),
        ({"at_epochs": [1], "every_n_train_steps": 5}, "at_epochs and every_n_train_steps exclude each other"),
        ({"at_start": "yes"}, "at_start takes True or False, got 'yes'"),
    ],
)
def test_misuse_is_told_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Schedule.create(**arguments)
