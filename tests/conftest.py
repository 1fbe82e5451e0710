"""Shared fixtures: each tiny model is built once."""

from __future__ import annotations

import re

import pytest

import apr
import models
import scripted
from apr import _core
from kernel_cases import GPUS, SETS, force
from served import PROMPT, Server

_TRAPS = pytest.StashKey[dict[int, list[str]]]()
_BUILT: dict[str, object] = {}


def built(name: str):
    if name not in _BUILT:
        _BUILT[name] = models.build(name)
    return _BUILT[name]


@pytest.fixture(params=list(models.FAMILIES))
def family(request):
    """(name, model) of every promised family."""
    return request.param, built(request.param)


@pytest.fixture(params=models.ROTARY)
def rotary(request):
    """(name, model) of the families with rotary positions."""
    return request.param, built(request.param)


@pytest.fixture(params=models.LEARNED)
def learned(request):
    """(name, model) of the families with learned positions."""
    return request.param, built(request.param)


@pytest.fixture
def llama():
    return built("llama")


@pytest.fixture(params=SETS)
def instruction_set(request):
    """The kernels that run, by the name that `_core` knows them by."""
    name = request.param
    try:
        force(name)
    except ValueError:
        pytest.skip(f"{name} was not built or does not run on this machine")
    given = request.node.callspec.params
    if name in GPUS and given.get("page_size") == 48:
        _core.force_instruction_set("")
        pytest.skip("the CUDA kernels take pages of a power of two")
    yield _core.instruction_set()
    _core.force_instruction_set("")


# What `make test-quick` runs: the core, the rules of the house, and the oracles on one model.
QUICK = ("test_core", "test_core_machine", "test_layering", "test_oracles", "test_session")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the core, and the oracles on one model")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        others = set(models.FAMILIES) - {"llama"}
        items[:] = [
            item
            for item in items
            if item.path.stem in QUICK and not others & set(re.split(r"[\[\]-]", item.name))
        ]


def traps(items) -> dict[int, list[str]]:
    """Which tests cover which trap of docs/kernels.md."""
    found: dict[int, list[str]] = {}
    for item in items:
        for marker in item.iter_markers("trap"):
            for number in marker.args:
                name = f"{item.path.stem}::{item.originalname}"
                if name not in found.setdefault(number, []):
                    found[number].append(name)
    return found


def pytest_collection_finish(session):
    session.config.stash[_TRAPS] = traps(session.items)


def pytest_terminal_summary(terminalreporter):
    for number, names in sorted(terminalreporter.config.stash.get(_TRAPS, {}).items()):
        terminalreporter.write_line(f"trap {number:2}: {', '.join(names)}")


@pytest.fixture(scope="module")
def tok():
    """A byte-level tokenizer that can spell every control word."""
    return scripted.tokenizer()


@pytest.fixture(scope="module")
def net(tok):
    """A tiny random Llama over it; what it writes is scripted."""
    return scripted.model(tok)


@pytest.fixture
def session(net):
    with apr.Session(net, max_tokens=1 << 15, page_size=16) as s:
        yield s


@pytest.fixture(scope="module")
def plain(tok):
    """Tokens whose texts are read back as they were: those that a server never samples are the
    others.
    """
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    kept = (i for i in range(len(tok)) if tok.decode([i]).isprintable() and i not in special)
    readable = {i for i in kept if "\ufffd" not in tok.decode([i])} | {tok.eos_token_id}
    return sorted(set(range(len(tok))) - readable)


@pytest.fixture
def serve(net, tok, plain):
    """Servers of the tests' model, which end with the test."""
    made = []

    def start(kind="fields", **settings):
        made.append(Server(net, tok, kind, plain))
        vars(made[-1]).update(settings)
        return made[-1]

    yield start
    for server in made:
        server.end()


@pytest.fixture
def local(session, plain):
    """The oracle: a session that leaves the same tokens out."""

    def run(method, tok, prompt=PROMPT, **options):
        return method(session, tok, prompt, suppress_tokens=plain, **options)

    return run
