"""python -m benchmarks.gpu: every part on a CPU, what is kept, and parts that hang, die or find something wrong."""

import json
import os
import signal
import time

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts
from benchmarks.gpu.forked import Failed, forked
from benchmarks.gpu.measurement import row
from benchmarks.gpu.parts import Part
from benchmarks.harness.command import exit_code_of


def check(folder, *arguments):
    """The exit code, and the rows that were kept."""
    code = gpu.main(["--device", "cpu", "--small", "--results", str(folder), "--commit", "abc", *arguments])
    file = folder / "gpu.jsonl"
    return code, [json.loads(line) for line in file.read_text().splitlines()]


def judged(*results):
    """A part with a row for each of the results."""
    return Part(lambda settings: iter([row("judged", {"n": n}, {}, ok) for n, ok in enumerate(results)]), 10)


def test_every_part_runs_on_a_cpu_and_all_is_right(tmp_path, capsys):
    code, rows = check(tmp_path)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert list(dict.fromkeys(found["part"] for found in rows)) == list(parts.PARTS)
    assert not any(found["name"] in ("not finished", "left out") for found in rows)
    for found in rows:
        assert found["device"] == "cpu" and found["commit"] == "abc" and found["machine"]["cpu"] and found["date"]
        assert found["command"].startswith("python -m benchmarks.gpu --device cpu") and found["ok"] is not False
        assert {"torch", "cuda", "open-clip-train-fastclip"} <= found["versions"].keys()
    names = {found["name"] for found in rows}
    assert {"against float64", "steps with a NaN", "training step", "loss", "--resume latest", "curve"} <= names
    assert "0 failed" in printed.splitlines()[-1]


def hang(settings):
    yield row("before it hangs", {}, {})
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)


def die(settings):
    yield row("before it dies", {}, {})
    os.kill(os.getpid(), signal.SIGKILL)


def raise_an_error(settings):
    yield row("before it raises", {}, {})
    raise ValueError("no such thing")


def test_a_part_that_does_not_end_well_leaves_its_rows_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    bad = {"hangs": Part(hang, 3), "dies": Part(die, 10), "raises": Part(raise_an_error, 10), "good": judged(True)}
    monkeypatch.setattr(gpu, "PARTS", bad)
    monkeypatch.setattr(gpu, "SMALL_FACTOR", 1)
    code, rows = check(tmp_path, "--parts", *bad)
    assert code == 1
    assert [(found["part"], found["name"]) for found in rows] == [
        *[
            ("hangs", "before it hangs"),
            ("hangs", "not finished"),
            ("dies", "before it dies"),
            ("dies", "not finished"),
        ],
        *[("raises", "before it raises"), ("raises", "not finished"), ("good", "judged")],
    ]
    errors = [found["figures"]["error"] for found in rows if found["name"] == "not finished"]
    assert errors == ["stopped after its 3 s", "died with exit code -9", "ValueError: no such thing"]
    assert "3 failed" in capsys.readouterr().out


def test_what_a_part_has_started_ends_with_it():
    def start_another():
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        yield pid
        time.sleep(600)

    found = []
    with pytest.raises(Failed):
        for pid in forked(start_another, limit_s=3):
            found.append(pid)
    deadline = time.monotonic() + 20
    while alive(found[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(found[0])


def alive(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_failed_check_is_named_and_gives_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"some": judged(True, False, None)})
    code, _ = check(tmp_path, "--parts", "some")
    assert code == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "2 checks in 0 s, 1 failed",
        "  some: judged 1",
    ]


def test_a_part_without_time_is_left_out_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"late": judged(True)})
    code, rows = check(tmp_path, "--parts", "late", "--budget", "1")
    assert code == 1 and [(found["part"], found["name"]) for found in rows] == [("late", "left out")]


def test_a_second_check_says_what_changed(tmp_path, monkeypatch, capsys):
    for ms, ok in ((10.0, True), (10.5, True), (13.0, False)):
        found = row("step", {"model": "x"}, {"step_ms": ms}, ok)
        monkeypatch.setattr(gpu, "PARTS", {"some": Part(lambda settings, found=found: iter([found]), 10)})
        check(tmp_path, "--parts", "some")
    changed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert changed == ["step x: ok was True and is False", "step x: step_ms was 10.5 and is 13 (+24%)"]


def test_without_a_gpu_the_check_ends_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert exit_code_of(lambda: gpu.main(["--results", str(tmp_path)])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: torch finds no GPU here: --device cpu --small runs the same parts on a CPU"
    ]


def test_the_limits_add_up_to_the_budget():
    assert sum(part.limit_s for part in parts.PARTS.values()) <= parts.BUDGET_S <= 540
