"""A second witness for what instructions mean: NVIDIA's CuTe, evaluated on the host.

The emulator and the kernels share our reading of the PTX manual. `cute/witness.cpp` compares,
element by element, fragments, descriptors and swizzles with CuTe's layouts; here the spelling of
every instruction is looked up in NVIDIA's headers. What neither can show: docs/cuda-kernels.md.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"


def _includes() -> list[Path]:
    """Folders of CuTe's headers, from the package nvidia-cutlass, and of CUDA's."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH, so no CUDA headers")
    try:
        package = importlib.metadata.distribution("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps nvidia-cutlass")
    dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    cuda = Path(re.findall(r'"-I(\S+?)"', dry)[0]).resolve()
    return [
        Path(str(package.locate_file("cutlass_library/source/include"))),
        cuda,
        cuda / "cccl",
    ]


@pytest.fixture(scope="module")
def includes():
    return _includes()


@pytest.fixture(scope="module")
def facts(includes, tmp_path_factory):
    """{name: (elements compared, elements that differ)}"""
    program = tmp_path_factory.mktemp("cute") / "witness"
    command = ["g++", "-std=c++20", "-O1", "-w", "-DAPR_EMULATED", f"-I{CSRC}"]
    command += ["-D__CUDACC_VER_MAJOR__=13"]  # shows CuTe's encoding of tensor maps to a host
    command += [f"-I{folder}" for folder in includes]
    emulator = CSRC / "kernels/cuda/emulated"
    sources = [
        ROOT / "tests/cute/witness.cpp",
        emulator / "emulator.cpp",
        emulator / "counts.cpp",
    ]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    lines = [line.split("\t") for line in output.splitlines() if line.startswith("fact\t")]
    return {name: (int(compared), int(different)) for _, name, compared, different in lines}


def test_cute_agrees_with_the_emulator(facts, capsys):
    witnessed = {name: n for name, n in facts.items() if not name.startswith("wrong")}
    assert {name: d for name, (_, d) in witnessed.items() if d} == {}
    kinds = (
        "mma",
        "ldmatrix",
        "wgmma",
        "weights",
        "queries",
        "keys",
        "values",
        "a box",
        "cp.async",
    )
    assert all(any(kind in name for name in witnessed) for kind in kinds)
    with capsys.disabled():
        elements = sum(n for n, _ in witnessed.values())
        print(f"\n{len(witnessed)} facts, {elements:,} elements agree with CuTe")


@pytest.mark.parametrize("control", ["fragment", "ldmatrix", "swizzle", "stride"])
def test_cute_sees_what_is_wrong_on_purpose(facts, control):
    wrong = {name: d for name, (_, d) in facts.items() if name.startswith(f"wrong {control}")}
    assert wrong and all(wrong.values())


# ---- spelling -----------------------------------------------------------------------------------


def _statements(text: str) -> set[str]:
    """PTX instructions in the asm statements of a source."""
    found = set()
    for statement in re.finditer(r"\basm\s*(?:volatile)?\s*\(((?:\s*\"(?:[^\"\\]|\\.)*\")+)", text):
        joined = "".join(re.findall(r"\"((?:[^\"\\]|\\.)*)\"", statement[1]))
        lines = re.split(r";|\\n|\\t", joined)
        found |= {re.sub(r"^[{\s]+(?=[a-z])|^@!?\w+ ", "", line).strip() for line in lines}
    return {x for x in found if re.match(r"[a-z]", x) and "." in x.split()[0]}


def _form(instruction: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Words of the opcode, and the kind of each operand: memory, a vector of n, or a value.

    Hints for caches are left out: they change no result.
    """
    opcode, _, rest = instruction.partition(" ")
    words = opcode.split(".")
    operands = re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,\s\[\]{}]+", rest)
    if "L2::cache_hint" in words:
        operands = operands[:-1]
    kinds = []
    for operand in operands:
        inner = operand[1:-1].count(",") + 1
        kinds.append(f"[{inner}]" if operand[0] == "[" else f"{{{inner}}}" * (operand[0] == "{"))
    return frozenset(w for w in words if not w.startswith("L2::")), tuple(kinds)


def _ours(includes: list[Path]) -> set[str]:
    command = ["g++", "-E", "-P", "-x", "c++", "-D__CUDA_ARCH__=900", f"-I{CSRC}"]
    command += [f"-I{folder}" for folder in includes[1:]]
    source = CSRC / "kernels/cuda/bulk.cuh"
    text = subprocess.run(
        [*command, str(source)], capture_output=True, text=True, check=True
    ).stdout
    return _statements(text[text.index("namespace apr::cuda {") :])


def test_cute_spells_every_instruction_as_we_do(includes):
    headers = [includes[1] / "cuda_fp16.hpp"]
    for folder in ("cute", "cutlass"):
        headers += (includes[0] / folder).rglob("*.h*")
    theirs = set()
    for header in headers:
        theirs |= {_form(x) for x in _statements(header.read_text(errors="replace"))}
    ours = _ours(includes)
    assert len(ours) >= 25
    assert {x for x in ours if _form(x) not in theirs} == set()
    # The look-up has power: an operand or a word too many is found.
    for wrong in ("setmaxnreg.inc.sync.aligned.u32 %0, %1", "wgmma.fence.sync.aligned.u32"):
        assert _form(wrong) not in theirs
