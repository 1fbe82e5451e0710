"""The command line as a user types it, and the Countdown task behind it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import apr
import scripted
from apr import countdown, hf
from apr.__main__ import main
from apr.commands import bench
from apr.countdown.problems import Problem, Range, apply, chains, format_chain, solved, verify
from apr.countdown.tokenizer import WORDS, build_tokenizer
from apr.countdown.train_guess import SMOKE, train
from apr.errors import InvalidInput

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from plot import draw


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"CPU kernels     {apr.ops.kernels().chosen}" in out
    assert "portable" in out
    assert "torch's (OpenMP)" in out


def test_run_smoke(capsys, tmp_path):
    assert main(["run", "--smoke", "--n", "4", "--trace", str(tmp_path / "t.json")]) == 0
    out = capsys.readouterr().out
    assert "held-out problems" in out
    assert "replayed by arithmetic" in out
    assert "forked at 7" in out
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {"fork", "step", "thread_name"} <= {e["name"] for e in events}


@pytest.mark.parametrize(
    "method", ["beam_search", "tree_search", "mcts", "group_think", "hogwild", "majority_vote"]
)
def test_every_method_runs_on_a_problem(method, capsys):
    arguments = ["run", "--method", method, "--n", "4", "--workers", "3", "--live"]
    assert main([*arguments, "--prompt", "24 : 8 6 4"]) == 0
    out = capsys.readouterr().out
    assert "one after the other" in out and "replayed by arithmetic" in out
    if method == "hogwild":  # side by side
        assert any(
            all(name in line for name in ("Alice", "Bob", "Carol")) for line in out.splitlines()
        )


@pytest.mark.parametrize("method", ["skeleton", "parathinker"])
def test_methods_of_words_want_a_text_model(method, capsys):
    assert main(["run", "--method", method, "--prompt", "24 : 8 6 4"]) == 2
    assert "--model" in capsys.readouterr().err
    model = ["run", "--model", str(countdown.CHECKPOINT), "--prompt", "1 2 3"]
    assert main([*model, "--method", "mcts", "--max-new-tokens", "4"]) == 2
    assert "apr.mcts(reward=" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["sequential", "majority_vote", "best_of_n"])
def test_run_any_model(method, capsys, monkeypatch):
    Session = apr.Session  # noqa: N806
    arguments = ["run", "--model", str(countdown.CHECKPOINT), "--prompt", "<bos> 24 : 8 6 4 <try>"]
    arguments += ["--method", method, "--n", "3", "--max-new-tokens", "9"]
    assert main(arguments) == 0
    assert "tokens/s" in capsys.readouterr().out
    made = []
    monkeypatch.setattr(apr, "Session", lambda *a, **k: made.append(Session(*a, **k)) or made[-1])
    more = ["--kv-dtype", "int8", "--max-tokens", "4096", "--device", "auto"]
    assert main([*arguments, *more]) == 0
    (session,) = made
    assert session.spec.kv_dtype is torch.int8
    assert session.memory.most_pages == 4096 // session.page_size


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["bench", "attention", "--seconds", "0"], "--seconds"),
        (["bench", "fork", "--rounds", "-1"], "--rounds"),
        (["run", "--n", "0"], "--n"),
        (["run", "--kv-dtype", "int8"], "--kv-dtype, --device: go with --model"),
        (["run", "--max-tokens", "64"], "go with --model"),
        (["run", "--device", "cuda"], "go with --model"),
        (["run", "--model", str(countdown.CHECKPOINT), "--prompt", "1", "--device", "x"], "'x'"),
        (["run", "--model", str(countdown.CHECKPOINT), "--prompt", "1", "--max-tokens", "0"], "1"),
        (["run", "--problems", "0"], "--problems"),
        (["run", "--temperature", "0"], "--temperature"),
        (["run", "--prompt", "24 = 8"], "TARGET : NUMBERS"),
        (["run", "--checkpoint", "/nowhere"], "apr train guess"),
        (["run", "--method", "adaptive", "--checkpoint", "/nowhere"], "apr train countdown"),
        (["run", "--method", "adaptive", "--prompt", "24 : 8 6 4"], "four or five"),
        (["run", "--protocol", "npr"], "--model and --prompt"),
        (
            ["run", "--protocol", "npr", "--model", str(countdown.CHECKPOINT), "--prompt", "1"],
            "spell",
        ),
        (["run", "--model", "/nowhere/x", "--prompt", "hi"], "cannot be loaded"),
        (["run", "--model", str(countdown.CHECKPOINT)], "--prompt"),
        (["run", "--model", str(countdown.CHECKPOINT), "--prompt", "1", "--chat"], "chat template"),
    ],
)
def test_bad_arguments_are_named(arguments, word, capsys):
    assert main(arguments) == 2
    assert word in capsys.readouterr().err


def test_options_that_a_bench_does_not_take_are_refused(capsys):
    for arguments in (["plan", "--model", "x"], ["scaling", "--prefix", "9"]):
        with pytest.raises(SystemExit):
            main(["bench", *arguments])
        assert f"unrecognized arguments: {arguments[1]}" in capsys.readouterr().err


@pytest.mark.parametrize("what", list(bench.BENCHES))
def test_bench_smoke(what, capsys, tmp_path):
    assert main(["bench", what, "--smoke", "--json", str(tmp_path / "b.json")]) == 0
    record = json.loads((tmp_path / "b.json").read_text())
    rows = record["rows"]
    assert {"cpu", "cores", "kernels", "torch", "load"} <= record["machine"].keys()
    assert rows
    if what == "methods":
        assert len(rows) == 10 and all(row["pages_left"] == 0 for row in rows)
        assert all(row["most_pages"] >= row["bound_pages"] > 0 for row in rows)
        assert "| MCTS" in capsys.readouterr().out
    if what == "fork":
        assert rows[0]["note"] == "0 KV bytes"
        memory = rows[-1]
        assert memory["slots"] <= memory["floor"] * 1.02 + 64 * 17
    if what == "attention":
        # Every method computes the same thing: errors against float64, rounded values up to about
        # 1.
        limits = {"float32": 2e-6, "bfloat16": 2e-2}
        assert all(r["error"] < limits[r["dtype"]] for r in rows)
        assert min(r["machine_gb_per_s"] for r in rows) > 0
    if what == "width":
        draw(record, tmp_path / "width.png")
        assert (tmp_path / "width.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_runs_under_a_preset(tmp_path, capsys):
    """A random model over bytes never writes the words; it is run, and shown, all the same."""
    tokenizer = scripted.tokenizer()
    scripted.model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = ["run", "--model", str(tmp_path), "--prompt", "Q", "--max-new-tokens", "6"]
    assert main([*run, "--protocol", "parathinker", "--n", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("child") >= 3 and "one after the other" in shown
    assert main([*run, "--protocol", "multiverse", "--trace", str(tmp_path / "t.json")]) == 0
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_training_resumes_to_the_same_model(tmp_path):
    recipe = dataclasses.replace(SMOKE, steps=6, rows=32)
    list(train(recipe, tmp_path / "whole", report_every=3))
    run = train(recipe, tmp_path / "parts", report_every=3)
    next(run)
    run.close()  # interrupted after three steps
    list(train(recipe, tmp_path / "parts", report_every=3))
    one, _ = hf.load(str(tmp_path / "whole"))
    two, _ = hf.load(str(tmp_path / "parts"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert main(["run", "--smoke", "--checkpoint", str(tmp_path / "whole"), "--n", "2"]) == 0


def test_the_shipped_model_is_what_its_record_says():
    """Held-out accuracy of the checkpoint, within the noise of 200 problems (4 standard errors)."""
    record = json.loads((countdown.CHECKPOINT / "training.json").read_text())
    last = record["curve"][-1]
    model, tokenizer = hf.load(str(countdown.CHECKPOINT), dtype=torch.float32)
    problems = countdown.sample_problems(200, seed=1)
    results = apr.best_of_n(
        model,
        tokenizer,
        [p.prompt for p in problems],
        n=16,
        do_sample=True,
        max_new_tokens=10,
        verifier=lambda text, thread: float(verify(problems[thread.request], text)),
    )
    once = sum(r.scores[0] for r in results) / len(results)
    found = sum(max(r.scores) for r in results) / len(results)
    assert abs(once - last["sampled_once"]) < 4 * (0.8 * 0.2 / 200) ** 0.5
    assert abs(found - last["within_16"]) < 4 * (0.9 * 0.1 / 200) ** 0.5
    assert found > once + 0.05
    size = sum(f.stat().st_size for f in countdown.CHECKPOINT.iterdir())
    assert size <= 8 << 20


def test_problems_and_their_verifier():
    problem = Problem((8, 6, 4), 24)
    assert problem.prompt == "<bos> 24 : 8 6 4 <try>"
    found = [c for c in chains((8, 6, 4), 127) if c[-1][3] == 24]
    assert found
    assert all(verify(problem, format_chain(c)) for c in found)
    right = format_chain(found[0])
    wrong = ["", "8 + 6 14", right + " 1", right.replace("24", "25"), "8 + 6 15 15 + 4 24"]
    wrong += ["8 + 8 16 16 + 8 24", "x + 6 14 14 + 4 18", "8 / 0 4 6 * 4 24"]
    assert not any(verify(problem, text) for text in wrong)
    assert apply(7, "/", 2) is None
    assert apply(7, "/", 0) is None


def test_held_out_number_sets_are_never_trained_on():
    span = Range(highest=9, target=50)
    sides = [{p.numbers for p, _ in solved(3, span, held_out)} for held_out in (False, True)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_every_word_is_one_token():
    tokenizer = build_tokenizer()
    assert tokenizer(" ".join(WORDS)).input_ids == list(range(len(WORDS)))
    text = "<bos> 24 : 8 6 4 <try> 8 * 6 48 48 / 4 12 <eos>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == 16


def test_code_that_a_model_brings_is_neither_run_nor_asked_about(tmp_path, monkeypatch, capsys):
    """Even to somebody who would say yes."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    (tmp_path / "own.py").write_text(code)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    config["auto_map"]["AutoModelForCausalLM"] = "own.Model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for call in (
        lambda: hf.load(str(tmp_path)),
        lambda: main(["run", "--model", str(tmp_path), "--prompt", "a", "--method", "best_of_n"]),
    ):
        try:
            assert call() != 0
        except InvalidInput as error:
            assert "cannot be loaded" in str(error)
    assert not ran.exists()
