"""Methods, protocols and faults against a server that is running.

python tools/served.py URL MODEL TOKENIZER: e.g. http://127.0.0.1:8000/v1, its name there, a folder
or hub id. Prints what each method wrote, and how often answers were lost or told twice where a
proxy breaks half of the requests.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer

import apr
from apr import remote
from apr.protocols import PRESETS

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from served import FaultProxy

SHORT = {"max_new_tokens": 24}
GREEDY = {**SHORT, "do_sample": False}
QUESTION = "Question: What is 3 + 4?\nAnswer: 7\nQuestion: What is 2 + 6?\nAnswer:"
FAULTS = ["pass", "pass", "drop", "429", "cut", "slow", "garbage"]

# A base model imitates what it is shown.
TEXTS = {
    "recursive": """Q: 2+3
<call>add 2 and 3</call><result>5</result>
A: 5

Q: 4+5
<call>add 4 and 5</call><result>9</result>
A: 9

Q: 6+2
""",
    "parallel_r1": """Q: 2+3
<Parallel><Path>2+3=5</Path><Path>3+2=5</Path></Parallel>
<Summary>5</Summary>

Q: 4+5
<Parallel><Path>4+5=9</Path><Path>5+4=9</Path></Parallel>
<Summary>9</Summary>

Q: 6+2
""",
    "sprint": """Q: 2+3
<Plan><prompt>2+3</prompt><prompt>3+2</prompt></Plan>
<Execution><execution>5</execution><execution>5</execution></Execution>
A: 5

Q: 4+5
<Plan><prompt>4+5</prompt><prompt>5+4</prompt></Plan>
<Execution><execution>9</execution><execution>9</execution></Execution>
A: 9

Q: 6+2
""",
}


def methods(engine: remote.Engine, tok) -> None:
    calls = {
        "majority_vote": (apr.majority_vote, QUESTION, {"n": 4, "stop": "\n", **SHORT}),
        "best_of_n": (
            apr.best_of_n,
            QUESTION,
            {"n": 4, "verifier": lambda text, item: float("8" in text), **SHORT},
        ),
        "skeleton": (apr.skeleton, "Why is the sky blue?", {"n": 3, **GREEDY}),
        "tree_search": (
            apr.tree_search,
            QUESTION,
            {"n": 2, "depth": 2, "evaluate": lambda text: float("8" in text), **SHORT},
        ),
    }
    for name, (method, prompt, options) in calls.items():
        began = time.perf_counter()
        result = method(engine, tok, prompt, **options)
        seconds = time.perf_counter() - began
        row = (name, len(result.threads), result.total_tokens, f"{seconds:.1f} s", result.text[:50])
        print("| " + " | ".join(map(repr, row)) + " |")


def protocols(engine: remote.Engine, tok) -> None:
    for name, text in TEXTS.items():
        root = engine.thread(tok(text).input_ids)
        began = time.perf_counter()
        budget = apr.Budget(tokens=160)
        outcome = apr.run(
            engine,
            root,
            PRESETS[name],
            tokenizer=tok,
            budget=budget,
            **{**GREEDY, "max_new_tokens": 60},
        )
        seconds = time.perf_counter() - began
        row = (name, outcome.threads, outcome.total_tokens, f"{seconds:.1f} s", outcome.text[:90])
        print("| " + " | ".join(map(repr, row)) + " |")


def faults(url: str, model: str, tok, count: int = 24) -> None:
    """The same answers with and without faults: shorter ones were lost, longer ones came twice."""
    prompts = [f"Count: {i}, {i + 1}, {i + 2}," for i in range(count)]
    options = {"n": 1, "extract": len, **GREEDY}
    with remote.Engine(url, model, concurrency=4) as engine:
        calm = apr.majority_vote(engine, tok, prompts, **options)
    draw = random.Random(0)
    proxy = FaultProxy(
        url, itertools.chain(itertools.repeat("pass", 6), iter(lambda: draw.choice(FAULTS), ""))
    )
    with remote.Engine(proxy.url, model, concurrency=4, retries=12) as engine:
        broken = apr.majority_vote(engine, tok, prompts, **options)
    lost = sum(len(b.text) < len(a.text) for a, b in zip(calm, broken, strict=True))
    double = sum(len(b.text) > len(a.text) for a, b in zip(calm, broken, strict=True))
    other = sum(a.text != b.text for a, b in zip(calm, broken, strict=True)) - lost - double
    seen = ", ".join(f"{name} {n}" for name, n in sorted(proxy.seen.items()))
    print(f"\n{count} answers; {sum(proxy.seen.values())} requests through the proxy: {seen}")
    print(f"answers lost: {lost}, double: {double}, other words: {other}")
    proxy.end()


def main() -> None:
    url, model, folder = sys.argv[1:4]
    tok = AutoTokenizer.from_pretrained(folder)
    with remote.Engine(url, model, concurrency=4) as engine:
        print(f"{url}: {engine.dialect(tok)}\n")
        print("| method | threads | tokens | time | text |\n|---|---|---|---|---|")
        methods(engine, tok)
        protocols(engine, tok)
        print(engine.stats)
    faults(url, model, tok)


if __name__ == "__main__":
    main()
