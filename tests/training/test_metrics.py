"""The metrics file: records, crashes, resume, hash."""

import errno
import json
import math
import os

import pytest

from rlalign.training.metrics import MetricsLog, metrics_hash, read


def test_a_record_is_one_json_line(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"reward/mean": 0.5, "n": 3, "note": "a\nb"})
        log.write(1, {"eval/reward_mean": 1.0}, kind="eval")
    assert path.read_text() == (
        '{"kind": "train", "step": 1, "reward/mean": 0.5, "n": 3, "note": "a\\nb"}\n'
        '{"kind": "eval", "step": 1, "eval/reward_mean": 1.0}\n'
    )


def test_records_are_on_disk_as_soon_as_written(tmp_path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(1, {"a": 1.0})
    assert len(read(tmp_path / "m.jsonl")) == 1
    log.close()


def test_non_finite_values_are_valid_json_and_floats_again_when_read(tmp_path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["b"] == "inf"
    record = read(path)[0]
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("value", [None, [1.0], {"a": 1}, object()])
def test_other_values_are_refused_and_nothing_is_written(tmp_path, value) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        # TypeError of ours, or the type checker's in these tests
        with pytest.raises(Exception, match="metric `reward/mean`|reward/mean|Mapping"):
            log.write(1, {"reward/mean": value})
        assert len(log) == 0


@pytest.mark.parametrize(
    "tail", [b'{"kind": "train", "st', b'{"kind": "train", "step": 3}', b"\0" * 64, b"\0\n", b"\n", b"7\n"]
)
def test_a_torn_tail_is_dropped_on_open(tmp_path, tail) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"a": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(read(path)) == 1
    with MetricsLog(path) as log:
        log.write(2, {"a": 2.0})
    assert [record["a"] for record in read(path)] == [1.0, 2.0]
    assert path.read_bytes().startswith(whole)


def test_truncate_after_gives_the_file_of_an_uninterrupted_run(tmp_path) -> None:
    def write(log: MetricsLog, steps: range) -> None:
        for step in steps:
            log.write(step, {"loss": step / 7})
            if step % 2 == 0:
                log.write(step, {"eval/reward_mean": step / 3}, kind="eval")

    with MetricsLog(tmp_path / "a.jsonl") as log:
        write(log, range(1, 9))
    with MetricsLog(tmp_path / "b.jsonl") as log:
        write(log, range(1, 7))
    with MetricsLog(tmp_path / "b.jsonl") as log:
        log.truncate_after(4)
        write(log, range(5, 9))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_truncate_after_a_record_count_drops_later_records_of_the_same_step(tmp_path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"a": 1})
        count = len(log)
        log.write(1, {"b": 1}, kind="eval")
        log.truncate_after(1)
        assert len(log) == 2
        log.truncate_after(1, records=count)
        assert read(path) == [{"kind": "train", "step": 1, "a": 1}]
        log.write(2, {"a": 2})
    assert [record["step"] for record in read(path)] == [1, 2]


def test_truncate_before_everything_empties_the_file(tmp_path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write(1, {})
        log.truncate_after(0)
        assert len(log) == 0


def test_hash_ignores_the_clock_and_key_order_and_nothing_else(tmp_path) -> None:
    def hash_of(name: str, *records: dict) -> str:
        with MetricsLog(tmp_path / name) as log:
            for step, record in enumerate(records):
                log.write(step, record)
        return metrics_hash(tmp_path / name)

    base = hash_of("0", {"a": 1.0, "b": math.nan, "time/step_s": 1.0, "throughput/tokens_per_s": 5.0})
    assert hash_of("1", {"time/step_s": 2.0, "b": math.nan, "a": 1.0}) == base
    assert hash_of("2", {"a": math.nextafter(1.0, 2.0), "b": math.nan}) != base
    assert hash_of("3", {"a": 1.0, "b": math.nan, "timeout": 1.0}) != base
    assert hash_of("4", {"a": 1.0, "b": math.nan}, {}) != base


def test_a_full_disk_leaves_whole_records_only(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    log.write(1, {"a": 1.0})
    real = os.write

    def half_then_full(descriptor: int, data: bytes) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:-5])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OSError, match="No space left") as caught:
        log.write(2, {"a": 2.0})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    log.write(2, {"a": 2.5})
    assert [record["a"] for record in read(path)] == [1.0, 2.5]
    log.close()
