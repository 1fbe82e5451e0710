"""Who may know whom: the rules of docs/design.md, checked on the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from apr import _core
from conftest import traps

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "apr"


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)


def sources(folder: str) -> list[Path]:
    files = [
        p for p in (ROOT / "csrc" / folder).rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")
    ]
    assert files, folder
    return files


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs (not those for type checkers alone)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def python_files() -> dict[str, set[str]]:
    return {path.relative_to(PACKAGE).as_posix(): imports(path) for path in PACKAGE.rglob("*.py")}


def test_the_core_includes_only_itself():
    for path in sources("core"):
        assert all(name.startswith("core/") for name in includes(path)), path


def test_kernels_know_only_the_cores_types():
    for path in sources("kernels"):
        for name in includes(path):
            assert name.startswith("kernels/") or name == "core/types.h", (path, name)


def test_no_torch_header_and_no_environment_variable():
    for path in sources("."):
        text = path.read_text()
        assert "torch/" not in text and "ATen" not in text and "getenv" not in text, path
    for path in PACKAGE.rglob("*.py"):
        assert "os.environ" not in path.read_text(), path


def test_pybind11_stays_in_the_bindings():
    for path in sources("core") + sources("kernels"):
        assert "pybind11" not in path.read_text(), path


def test_the_extension_is_imported_in_few_places():
    users = {f for f, names in python_files().items() if "apr._core" in names}
    assert users == {"session.py", "ops.py", "gpu.py", "graph.py", "machine.py"}


def test_transformers_is_touched_where_the_design_says():
    users = {
        f
        for f, names in python_files().items()
        if any(n.split(".")[0] == "transformers" for n in names)
    }
    model_side, sampling = (
        {
            "compatibility.py",
            "interface.py",
            "probe.py",
            "model_state.py",
            "hf.py",
            "cache.py",
            "cache_seam.py",
        },
        {"decode.py", "sampling.py"},
    )
    countdown = {"countdown/train.py", "countdown/tokenizer.py"}
    tools = {"commands/info.py", "bench/sessions.py"}
    assert users == model_side | sampling | countdown | tools


def test_strategies_stand_on_decode_and_session():
    allowed = {
        "decode",
        "sampling",
        "text",
        "vectors",
        "session",
        "thread",
        "trace",
        "errors",
        "budget",
        "strategies",
    }
    for name, found in python_files().items():
        if name.startswith("strategies/"):
            mine = {n.split(".")[1] for n in found if n.startswith("apr.")}
            assert mine <= allowed, (name, mine - allowed)
        elif not name.startswith("commands/") and name not in ("__init__.py", "bench/methods.py"):
            assert not any(n.startswith("apr.strategies") for n in found), name


def test_protocols_stand_on_decode_and_session():
    allowed = {"decode", "sampling", "session", "thread", "trace", "errors", "budget", "record"}
    for name, found in python_files().items():
        if name.startswith("protocols/"):
            mine = {n.split(".")[1] for n in found if n.startswith("apr.")}
            assert mine <= allowed | {"protocols"}, (name, mine - allowed)
    training = {n.split(".")[1] for n in python_files()["training.py"] if n.startswith("apr.")}
    assert training == {"errors", "record"}


def test_no_architecture_is_named():
    for path in PACKAGE.rglob("*.py"):
        assert "model_type" not in path.read_text(), path


def test_every_file_says_what_it_owns():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
    for path in sources("."):
        assert path.read_text().startswith("//"), path


def test_every_trap_is_covered(request):
    """The traps of docs/kernels.md, by the marks of the tests that were collected; 15 wants a GPU to run."""
    if any(not p.name.startswith("tests") for p in map(Path, request.config.args)):
        pytest.skip("only with the whole suite")
    if _core.gpu(True) is None:
        pytest.skip("some of them need the emulated GPU (APR_EMULATION=ON)")
    covered = traps(request.session.items)
    assert set(covered) == set(range(1, 17)), sorted(set(range(1, 17)) - set(covered))


def test_files_stay_readable():
    for path in [*PACKAGE.rglob("*.py"), *sources(".")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path}: {lines} lines; is it really one thing?"
