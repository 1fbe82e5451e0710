"""The record of a run: its tree, its Chrome-trace file, and that it does not grow for ever."""

from __future__ import annotations

import json

import apr
from apr.threads import trace
from models import tokens


def run(model):
    with apr.Session(model, max_tokens=1024) as s:
        root = s.thread(tokens(11))
        kids = root.fork(3)
        apr.decode(s, kids, do_sample=True, max_new_tokens=4)
        root.join(kids[:2])
        kids[2].release()
        root.extend([5])
        s.step([root])
        return s.trace


def test_tree(llama):
    lines = run(llama).tree().splitlines()
    assert lines[0].startswith("thread 0 · 11 tokens")
    assert len(lines) == 4
    assert all("forked at 11 · length" in line and "4 tokens" in line for line in lines[1:])
    assert lines[1].startswith("├─ ")
    assert lines[3].startswith("└─ ")


def test_chrome_trace(llama, tmp_path):
    run(llama).save(tmp_path / "run.json")
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    names = [e["name"] for e in events]
    assert names.count("thread") == 1
    assert names.count("fork") == 1
    assert names.count("join") == 1
    # Five steps of three threads less the finished last one, and the root's own.
    assert names.count("step") == 4 * 3 + 1
    child = next(e["args"]["children"][0] for e in events if e["name"] == "fork")
    steps = [e for e in events if e["name"] == "step" and e["tid"] == child]
    ends = [e["ts"] + e["dur"] for e in steps[:-1]]
    assert len(steps) == 4  # one after the other
    assert all(end <= e["ts"] for end, e in zip(ends, steps[1:], strict=True))


def test_a_chain_of_forks_of_any_depth():
    record = trace.Trace()
    record.thread(0, 5)
    for i in range(1, 3000):
        record.fork(i - 1, [i], 5, record.clock())
    record.fork(0, [3000], 5, record.clock())
    lines = record.tree().splitlines()
    assert len(lines) == 3001
    assert lines[1].startswith("├─ thread 1 ") and lines[2].startswith("│  └─ thread 2 ")
    assert lines[3000].startswith("└─ thread 3000 ")
    assert all(len(line) <= 100 for line in lines)


def test_the_record_is_bounded(monkeypatch):
    monkeypatch.setattr(trace, "MOST_EVENTS", 10)
    record = trace.Trace()
    record.thread(0, 5)
    for i in range(1, 40):
        record.fork(i - 1, [i], 5, record.clock())
        record.release(i - 1)
    assert len(record.events) == 10
    lines = record.tree().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("thread 30")


def test_events_of_many_threads_are_forgotten_sooner(monkeypatch):
    monkeypatch.setattr(trace, "MOST_NAMES", 1000)
    record = trace.Trace()
    for _ in range(50):
        record.step(list(range(99)), 99, record.clock())
    assert len(record.events) == 10 and record._names == 1000


def test_what_a_model_writes_does_not_steer_a_terminal():
    record = trace.Trace()
    record.thread(0, 5)
    record.end(0, "eos", 3, "\x1b]0;title\x07 é 🙂\x1b[2J\r")
    tree = record.tree()
    assert "\\x1b]0;title\\x07 é 🙂\\x1b[2J\\r" in tree and tree.isprintable()
    assert trace.visible("two\n\tlines") == "two\n\tlines"
