"""Who may know whom: the rules of docs/architecture.md, checked on the sources."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import apr
import apr.hf
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


# From the ground up: a room may know those before it, and its neighbours on one line do not know
# each other.
ROOMS = [
    ["errors"],
    ["ops"],
    ["hf"],
    ["threads"],
    ["loop"],
    ["cache", "remote", "strategies", "protocols"],
    ["training"],
    ["countdown"],
    ["bench", "soak"],
    ["commands"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def test_rooms_know_only_those_below():
    for file, names in python_files().items():
        if file == "__init__.py":
            continue
        here = file.split("/")[0].removesuffix(".py")
        for name in names:
            top, _, rest = name.partition(".")
            room = rest.split(".")[0]
            if top != "apr" or room == here or room == "_core":
                continue
            if room in FLOOR:
                assert FLOOR[room] < FLOOR[here], f"{file} imports {name}"
            elif name == "apr":  # with a name of its own after it, or the whole package
                continue
            else:  # what apr/__init__.py exports, for those who stand on the whole package
                assert here in ("countdown", "bench", "soak", "commands"), f"{file} imports {name}"


def test_every_room_is_on_a_floor():
    rooms = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")
    }
    assert rooms - {"__init__", "__pycache__"} == set(FLOOR)


def test_the_extension_and_transformers_stay_below_the_methods():
    for file, names in python_files().items():
        room = file.split("/")[0]
        if "apr._core" in names:
            assert room in ("ops", "hf", "threads"), file
        if any(name.split(".")[0] == "transformers" for name in names):
            above = ("hf", "cache", "remote", "loop", "countdown", "bench", "soak", "commands")
            assert room in above, file


def test_no_name_of_a_package_hides_a_module_of_it():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] in ("__init__", "__main__"):
            continue
        package = importlib.import_module(".".join(parts[:-1]))
        module = importlib.import_module(".".join(parts))
        assert getattr(package, parts[-1]) is module, ".".join(parts)


def test_tensors_are_made_where_it_says():
    """Torch's default device and dtype are the user's: none of ours depends on them."""
    of_their_values = {"tensor", "full", "arange"}  # the dtype, if it is not named
    makers = of_their_values | {"zeros", "ones", "empty", "eye", "linspace"}
    unnamed = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("bench", "countdown", "soak"):
            continue  # programs of ours
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if ast.unparse(call.func) not in {f"torch.{name}" for name in makers}:
                continue
            needed = {"device"} if call.func.attr in of_their_values else {"device", "dtype"}
            if not needed <= {word.arg for word in call.keywords}:
                unnamed.append(f"{path.name}:{call.lineno}")
    assert not unnamed


def test_no_architecture_is_named():
    for path in PACKAGE.rglob("*.py"):
        assert "model_type" not in path.read_text(), path


def test_no_architecture_is_known_by_name():
    """Neither as a word of the code, nor by a class of its own."""
    names = set(CONFIG_MAPPING_NAMES) | set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for room in ("ops", "hf", "threads", "loop", "cache"):
        for path in (PACKAGE / room).rglob("*.py"):
            tree = ast.parse(path.read_text())
            texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
            assert not texts & names, (path, texts & names)
            assert not any(name.startswith("transformers.models") for name in imports(path)), path


def test_every_file_says_what_it_owns():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
    for path in sources("."):
        assert path.read_text().startswith("//"), path


def test_everything_public_is_described():
    """Names of `apr` and its rooms, and the methods that their classes define."""
    rooms = (apr, apr.ops, apr.hf, apr.training, apr.protocols, apr.strategies)
    bare = []
    for room in rooms:
        for name in getattr(room, "__all__", [n for n in vars(room) if n[0] != "_"]):
            thing = getattr(room, name)
            if not getattr(thing, "__module__", "").startswith("apr"):
                continue
            bare += [] if inspect.getdoc(thing) else [name]
            for member, value in vars(thing).items() if inspect.isclass(thing) else ():
                is_code = inspect.isfunction(value) or isinstance(value, property)
                # A class of others that it extends may say it.
                said = any(vars(c)[member].__doc__ for c in thing.__mro__ if member in vars(c))
                if is_code and member[0] != "_" and not said:
                    bare.append(f"{name}.{member}")
    assert not bare, sorted(set(bare))


def test_every_trap_is_covered(request):
    """The traps of docs/kernels.md, by the marks of the tests that were collected; 15 wants a GPU
    to run.
    """
    named = any(not p.name.startswith("tests") for p in map(Path, request.config.args))
    if named or request.config.getoption("--quick"):
        pytest.skip("only with the whole suite")
    if _core.gpu(True) is None:
        pytest.skip("some of them need the emulated GPU (APR_EMULATION=ON)")
    covered = traps(request.session.items)
    assert set(covered) == set(range(1, 17)), sorted(set(range(1, 17)) - set(covered))


def test_files_stay_readable():
    for path in [*PACKAGE.rglob("*.py"), *sources(".")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path}: {lines} lines; is it really one thing?"
