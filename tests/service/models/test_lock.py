"""The lock of a shared volume: one holder, who is replaced when it dies and finds out if it was only stopped."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.models.errors import StoreError
from service.models.lock import SharedLock

BEAT, STALE = 0.02, 0.3


def lock(tmp_path: Path) -> SharedLock:
    return SharedLock(tmp_path / "toy.lock", beat=BEAT, stale=STALE)


def numbers(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path))


def test_there_is_one_holder_at_a_time(tmp_path: Path) -> None:
    inside, most, count = 0, 0, threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        with SharedLock(tmp_path / "toy.lock", beat=BEAT, stale=60.0).held():
            with count:
                inside += 1
                most = max(most, inside)
            with count:
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(enter) for _ in range(8)]:
            done.result()
    assert most == 1
    assert numbers(tmp_path) == ["toy.lock.8"]


def test_a_living_holder_is_waited_for_however_long_it_takes(tmp_path: Path) -> None:
    taken = threading.Event()

    def wait() -> None:
        with lock(tmp_path).held():
            taken.set()

    with lock(tmp_path).held():
        thread = threading.Thread(target=wait)
        thread.start()
        assert not taken.wait(3 * STALE)
    assert taken.wait(30)
    thread.join()


def test_who_waits_is_told_so_all_the_time_and_may_give_up(tmp_path: Path) -> None:
    told = itertools.count(1)

    def waits() -> None:
        if next(told) == 3:
            raise StoreError("nobody waits any more")

    with (
        lock(tmp_path).held(),
        pytest.raises(StoreError, match="nobody waits"),
        lock(tmp_path).held(waits),
    ):
        pass
    assert numbers(tmp_path) == ["toy.lock.1"]


def test_a_dead_holder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "toy.lock.7").write_text("elsewhere process 1 beat 3")
    with lock(tmp_path).held():
        assert numbers(tmp_path) == ["toy.lock.8"]


@pytest.mark.parametrize("left", ["", "elsewhere pro"])
def test_who_died_while_it_wrote_is_replaced_too(tmp_path: Path, left: str) -> None:
    (tmp_path / "toy.lock.1").write_text(left)
    with lock(tmp_path).held():
        assert numbers(tmp_path) == ["toy.lock.2"]


def stopped(holder: SharedLock) -> Callable[[], None]:
    """Takes the heart out of a holder, as SIGSTOP would; gives it back."""
    holder._ended.set()
    assert holder._heart is not None
    holder._heart.join()
    return holder._ended.clear


def test_a_holder_that_was_only_stopped_writes_nothing_more(tmp_path: Path) -> None:
    with lock(tmp_path).held() as first:
        stopped(first)
        with lock(tmp_path).held() as second:
            with pytest.raises(StoreError, match="another process went on with it"):
                first.check()
            second.check()
    assert numbers(tmp_path) == ["toy.lock.2"]


def test_who_is_slow_to_take_a_stale_lock_finds_that_it_was_taken_and_given_back(tmp_path: Path) -> None:
    (tmp_path / "toy.lock.1").write_text("elsewhere process 1 beat 3")
    slow = lock(tmp_path)
    with lock(tmp_path).held():
        pass
    with lock(tmp_path).held():
        assert not slow._take(2)
    assert numbers(tmp_path) == ["toy.lock.3"]


def test_of_all_that_want_the_same_number_one_gets_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        took = [pool.submit(lock(tmp_path)._take, 1) for _ in range(8)]
    assert [each.result() for each in took].count(True) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StoreError, match="File exists"),
        SharedLock(tmp_path / "file" / "toy.lock").held(),
    ):
        pass
