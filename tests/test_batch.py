"""A file of prompts: each answered once, whatever ends the process in between."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apr import countdown
from apr.__main__ import main
from served import Server
from test_ranks import saved, torchrun

PROMPTS = [
    f"{p.target} : {' '.join(map(str, p.numbers))}" for p in countdown.sample_problems(24, seed=3)
]
OPTIONS = ["--n", "16", "--max-new-tokens", "16", "--temperature", "2"]


def lines(path):
    return [json.loads(row) for row in path.read_text().split("\n") if row]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("batch") / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"p{i}", "prompt": p}) + "\n" for i, p in enumerate(PROMPTS))
    )
    return path


@pytest.fixture(scope="module")
def whole(prompts):
    """The answers of a run that nothing disturbed."""
    out = prompts.with_name("whole.jsonl")
    assert main(["batch", "--in", str(prompts), "--out", str(out), *OPTIONS]) == 0
    return lines(out)


def test_each_prompt_is_answered_once(whole, prompts, capsys):
    assert [told["id"] for told in whole] == [f"p{i}" for i in range(len(PROMPTS))]
    out = str(prompts.with_name("whole.jsonl"))
    assert main(["batch", "--in", str(prompts), "--out", out, *OPTIONS]) == 0
    assert (
        "24 answers" in capsys.readouterr().out and lines(prompts.with_name("whole.jsonl")) == whole
    )


def test_the_command_of_the_page(prompts, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    command = re.findall(r"^python -m apr (batch .*)$", page, re.MULTILINE)
    (tmp_path / "prompts.jsonl").write_text(prompts.read_text())
    monkeypatch.chdir(tmp_path)
    assert len(command) == 1 and main(shlex.split(command[0])) == 0
    assert "24 answers" in capsys.readouterr().out


def test_a_killed_run_goes_on(whole, prompts, tmp_path):
    """Killed at any moment, with half a line in the file: the same answers as in one run."""
    out = tmp_path / "out.jsonl"
    command = ["batch", "--in", str(prompts), "--out", str(out), *OPTIONS]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen([sys.executable, "-m", "apr", *command], **quiet)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    with open(out, "a") as file:
        file.write('{"index": 23, "id": "p2')
    assert main(command) == 0
    assert sorted(lines(out), key=lambda told: told["index"]) == whole


def test_bad_lines_are_reported_and_not_fatal(prompts, tmp_path, capsys):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps(PROMPTS[0]), json.dumps({"prompt": PROMPTS[1]})]
    rows = [good[0], "{", "", '{"prompt": 3}', '"x : y"', good[1], "[]", '"\\ud800"']
    rows += [f'{{"prompt": {good[0]}, "id": "one\u2028two"}}']
    path.write_text("\n".join(rows))
    assert main(["batch", "--in", str(path), "--out", str(out), *OPTIONS]) == 0
    said = capsys.readouterr()
    assert [told["index"] for told in lines(out)] == [0, 5, 8]
    assert "3 answers" in said.out and "5 lines without one" in said.out
    for number in (2, 4, 5, 7, 8):
        assert f"line {number}:" in said.err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--n", "8"], "other options"),
        (["--seed", "1"], "other options"),
        (["--n", "0"], "--n"),
        (["--temperature", "0"], "--temperature"),
        (["--in", "/nowhere.jsonl"], "--in"),
        (["--out", "/nowhere/out.jsonl"], "--out"),
        (["--engine", "http://127.0.0.1:9/v1"], "--engine"),
    ],
)
def test_what_does_not_fit_is_refused(whole, prompts, capsys, arguments, said):
    out = prompts.with_name("whole.jsonl")
    command = ["batch", "--in", str(prompts), "--out", str(out), *OPTIONS, *arguments]
    assert main(command) == 2 and said in capsys.readouterr().err
    assert lines(out) == whole


def test_no_other_file_is_written_over(prompts, tmp_path, capsys):
    """One that holds something else, the prompts, a folder."""
    notes = tmp_path / "notes.txt"
    notes.write_text("no newline at the end")
    for out in (notes, prompts, tmp_path):
        before = out.read_text() if out.is_file() else ""
        assert main(["batch", "--in", str(prompts), "--out", str(out), *OPTIONS]) == 2
        assert "--out" in capsys.readouterr().err
        assert not before or out.read_text() == before


def test_a_prompt_that_the_template_refuses_is_one_line(net, tok, tmp_path, capsys):
    """Whatever a template raises: the others are answered."""
    folder = tmp_path / "model"
    folder.mkdir()
    saved(folder, 2)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content.strip() }}{% endfor %}"
    )
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    roles = [[("system", "x"), ("user", "y")], [("user", None)], [("user", "hi")]]
    rows = [{"messages": [{"role": r, "content": c} for r, c in row]} for row in roles]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "batch",
        "--in",
        str(path),
        "--out",
        str(out),
        "--model",
        str(folder),
        "--n",
        "200",
    ]
    assert main([*arguments, "--max-new-tokens", "3"]) == 0
    assert [told["index"] for told in lines(out)] == [2]
    assert "no system" in capsys.readouterr().err


def test_two_processes_do_not_share_a_file(prompts, tmp_path, capsys):
    import fcntl

    out = tmp_path / "out.jsonl"
    with open(out, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["batch", "--in", str(prompts), "--out", str(out), *OPTIONS]) == 2
    assert "another process" in capsys.readouterr().err


def test_a_server_that_is_gone_is_not_asked_for_each_prompt(prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda least, most: 0.0)  # as long as it waits
    folder = tmp_path / "model"
    folder.mkdir()
    saved(folder, 2)
    arguments = ["batch", "--in", str(prompts), "--out", str(tmp_path / "out.jsonl"), "--n", "200"]
    arguments += ["--engine", "http://127.0.0.1:9/v1", "--model", "m", "--tokenizer", str(folder)]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "0 answers" in said.out and said.err.count("no server answers") == 4


def test_on_two_ranks(whole, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    ran = torchrun("-m", "--", "apr", "batch", "--in", str(prompts), "--out", str(out), *OPTIONS)
    assert ran.returncode == 0 and ran.stdout.count("24 answers") == 1, ran.stderr
    found = lines(out)
    assert [told["index"] for told in found] == list(range(len(PROMPTS)))
    assert sum(a["text"] == b["text"] for a, b in zip(found, whole, strict=True)) >= 22


def test_on_an_engine(net, tok, tmp_path, capsys):
    """Texts that fail by themselves are told; others are answered."""
    folder = saved(tmp_path, 2)
    server = Server(net, tok, "fields", [i for i in range(len(tok)) if not 35 < i < 90])
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = ["How?", {"messages": [{"role": "user", "content": "hi"}]}, "Why?"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["batch", "--in", str(path), "--out", str(out), "--engine", server.url]
    arguments += ["--model", "m", "--tokenizer", folder, "--method", "best_of_n", "--n", "2"]
    assert main([*arguments, "--max-new-tokens", "5"]) == 0
    assert [told["index"] for told in lines(out)] == [0, 2]  # the tokenizer has no chat template
    command = ["run", "--engine", server.url, "--model", "m", "--tokenizer", folder, "--n", "2"]
    assert main([*command, "--prompt", "How?", "--max-new-tokens", "4"]) == 0
    assert "2 requests" in capsys.readouterr().out
    assert main([*command, "--prompt", "How?", "--protocol", "recursive"]) == 0
    dumb = Server(net, tok, "none")  # tells no log-probabilities, which best_of_n weighs
    arguments[arguments.index(server.url)] = dumb.url
    arguments[arguments.index(str(out))] = str(tmp_path / "other.jsonl")
    assert main([*arguments, "--max-new-tokens", "5"]) == 2
    assert "tells none" in capsys.readouterr().err
    dumb.end()
    server.end()


def test_on_ray(whole, prompts, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out.jsonl"
    command = ["batch", "--in", str(prompts), "--out", str(out), *OPTIONS, "--ray", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "apr", *command], env=environment, check=True, timeout=300
    )
    assert sorted(lines(out), key=lambda told: told["index"]) == whole
