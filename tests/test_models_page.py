"""The record of the last sweep over all architectures, and the page that is made of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "coverage"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL))
    for name in ("examine", "report", "tiny"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import examine
    import report

    return examine, report


def test_the_page_is_the_record(tool):
    examine, report = tool
    records = json.loads((TOOL / "baseline.json").read_text())
    assert report.PAGE.read_text() == report.page(records)
    assert not {name: examine.faults(r) for name, r in records.items() if examine.faults(r)}
    found = report.counts({name: r for name, r in records.items() if "," not in name})
    assert found["plan"] + found["plan and states"] + found["rows"] >= 165
    assert all(r["why"] for r in records.values() if r["how"] in ("refused", "not built", "rows"))


def test_the_sweep_sees_a_defect(tool, monkeypatch):
    """Without re-rotation, and with states that a sibling has run on."""
    examine, _ = tool
    monkeypatch.setattr("apr.hf.attachment.self_test", lambda *_: None)
    assert not examine.faults(examine.examine("lfm2"))
    monkeypatch.setattr("apr.ops.Plan.rotation_table", lambda *_: None)
    assert [f.split(":")[0] for f in examine.faults(examine.examine("llama"))] == ["reread"]
    monkeypatch.setattr("apr.hf.layer_states.lend", lambda cache, spec: cache)
    assert "fork" in [f.split(":")[0] for f in examine.faults(examine.examine("lfm2"))]
