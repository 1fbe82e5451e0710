"""Files that sessions map: their memory is shared until somebody writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import apr
from apr.errors import InvalidInput
from apr.threads import files
from models import tokens
from test_saving import SAMPLED


def private_bytes(path):
    """Memory of this process that stands on a file, and what of it is a copy of its own."""
    mapped = own = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Size:"):
            mapped += int(line.split()[1]) * 1024
        elif inside and line.startswith("Anonymous:"):
            own += int(line.split()[1]) * 1024
    return mapped, own


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
def test_a_mapped_file_is_shared_until_it_is_written(llama, tmp_path, kv_dtype):
    path = tmp_path / "prefix"
    with apr.Session(llama, 8192, kv_dtype=kv_dtype) as s:
        root = s.thread(tokens(2990))  # not whole pages
        s.step([root])
        s.save(path, {"root": root, "again": root.fork()[0]})
        kids = root.fork(2)
        apr.decode(s, kids, **SAMPLED)
        want = [kid.tokens for kid in kids]
        keys = sum(side.nbytes for pool in s.pools for side in pool.sides.values()) // 8192 * 3000
    before = path.read_bytes()
    sessions = [apr.Session.open(path, llama, mapped=True, max_tokens=8192) for _ in range(2)]
    mapped, own = private_bytes(path)
    assert mapped > 2 * keys * 0.9 and own < 0.1 * keys
    for s, found in sessions:
        with s:
            kids = found["root"].fork(2)
            apr.decode(s, kids, **SAMPLED)
            assert [kid.tokens for kid in kids] == want
            found["root"].extend([5])  # on the file's own last page
            s.step([found["root"]])
            assert private_bytes(path)[1] < 0.2 * keys
            s.check()
    assert private_bytes(path) == (0, 0)
    assert path.read_bytes() == before
    opened, found = apr.Session.open(path, llama, max_tokens=8192)  # and read, as ever
    with opened:
        kids = found["root"].fork(2)
        apr.decode(opened, kids, **SAMPLED)
        assert [kid.tokens for kid in kids] == want


def test_what_cannot_be_mapped_is_refused(llama, tmp_path, monkeypatch):
    path = tmp_path / "prefix"
    with apr.Session(llama, 1024) as s:
        root = s.thread(tokens(100))
        s.step([root])
        s.save(path, {"root": root}, keys=False)
        with pytest.raises(InvalidInput, match="holds no keys"):
            apr.Session.open(path, llama, mapped=True)
        s.save(path, {"root": root})
    with pytest.raises(InvalidInput, match="a pool that grows is copied"):
        apr.Session.open(path, llama, mapped=True, start_tokens=16)
    with pytest.raises(apr.OutOfPages):
        apr.Session.open(path, llama, mapped=True, max_tokens=64)
    with apr.Session(llama, 1024) as s:
        root = s.thread(tokens(100))
        s.step([root])
        whole = s.pools[0].k[:2].clone()
        write = files.write

        for wrong in (1, 6000):  # whoever writes a file can write its digest
            other = whole.repeat(wrong, 1, 1, 1)[:wrong]
            monkeypatch.setattr(
                files,
                "write",
                lambda path, text, all_, other=other: write(path, text, {**all_, "0.k": other}),
            )
            s.save(path, {"root": root})
            for mapped in (False, True):
                with pytest.raises(InvalidInput, match="does not fit together"):
                    apr.Session.open(path, llama, mapped=mapped, max_tokens=1024)
        monkeypatch.setattr(files, "write", write)
        s.save(path, {"root": root})
    read = files.read

    def changed(path):
        opened = read(path)
        path.write_bytes(path.read_bytes())
        return opened

    monkeypatch.setattr(files, "read", changed)
    with pytest.raises(InvalidInput, match="was changed while it was opened"):
        apr.Session.open(path, llama, mapped=True, max_tokens=1024)
