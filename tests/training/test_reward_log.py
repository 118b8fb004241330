"""What reward workers print: nothing on the disk before it is kept, all of it afterwards, never without a bound."""

import os

from rlalign.training import reward_log
from rlalign.training.reward_log import WorkerLog


def say(log: WorkerLog, text: str) -> None:
    assert log.stderr is not None
    os.write(log.stderr, text.encode())


def test_it_reaches_its_file_when_kept_and_each_part_once(tmp_path):
    path = tmp_path / "errors" / "reward.log"
    log = WorkerLog(path)
    log.keep()
    say(log, "one ")
    assert list(tmp_path.iterdir()) == []
    assert log.tail() == "one "
    log.keep()
    log.keep()
    say(log, "two")
    log.keep()
    assert path.read_text() == "one two"


def test_the_log_of_a_run_before_this_one_stays(tmp_path):
    (tmp_path / "reward.log").write_text("before ")
    log = WorkerLog(tmp_path / "reward.log")
    say(log, "after")
    log.keep()
    assert (tmp_path / "reward.log").read_text() == "before after"


def test_it_begins_anew_when_it_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_log, "_LIMIT", 10)
    log = WorkerLog(tmp_path / "reward.log")
    say(log, "0123456789-")
    log.keep()
    say(log, "new")
    log.keep()
    assert (tmp_path / "reward.log").read_text() == "new"
    assert log.tail() == "new"


def test_without_a_file_workers_print_where_the_trainer_does():
    log = WorkerLog(None)
    log.keep()
    assert (log.stderr, log.tail()) == (None, "")
