"""Shared fixtures: each tiny model is built once."""

from __future__ import annotations

import pytest

import models
from apr import _core
from kernel_cases import SETS

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
    try:
        _core.force_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"{request.param} was not built or does not run on this machine")
    yield request.param
    _core.force_instruction_set("")
