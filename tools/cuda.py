"""Compiles attention kernels with nvcc and reads what ptxas and nvdisasm say: fails where registers
spill or products of wgmma are serialised.

Without arguments the main instances (head_dim 64 and 128 in bfloat16, and those without tensor
cores); with --all every one, and a table of registers, shared memory and instructions in the file
given by --record.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
ARCHITECTURES = {"wide": ["90a"]}  # of the others: BOTH
BOTH = ["80", "90a"]
# Classes of instructions, by how their names begin; the rest is "other".
CLASSES = {
    "products": ("HMMA", "HGMMA"),
    "exponentials": ("MUFU",),
    "float": ("FA", "FM", "FFMA", "FS", "F2", "FCHK", "HADD", "HMUL", "HFMA"),
    "shared memory": ("LDS", "STS", "SYNCS", "SHFL"),
    "waits": ("LDGDEPBAR", "DEPBAR", "FENCE", "WARPGROUP", "BAR", "NANOSLEEP"),
    "global memory": ("LDG", "STG", "LDL", "STL", "UTMALDG"),
    "integer": ("I", "UI", "L", "UL", "SHF", "USHF", "MOV", "UMOV", "SEL", "P", "R2U", "VIADD"),
    "control": ("B", "WARP", "ELECT", "NOP", "CALL", "RET"),
}


class Compiled(NamedTuple):
    name: str
    architecture: str
    registers: int
    spilled: int  # bytes of spills and of the stack
    seconds: float
    complaints: list[str]
    loop: Counter[str]  # instructions of the main loop, by class


def instances() -> list[tuple[str, str, list[str]]]:
    """(source, name, definitions) of each instance, as instances.cmake lists them."""
    text = (KERNELS / "instances.cmake").read_text()
    shapes = dict(re.findall(r"set\(shapes_(\w+)\s+([^)]*)\)", text))
    types = dict(re.findall(r"set\(type_(\w+) (\w+)\)", text))
    found = []
    for number, type_name in types.items():
        listed = re.sub(r"\$\{shapes_(\w+)\}", lambda other: shapes[other[1]], shapes[number])
        for shape in listed.split():
            kind, dim, rows, stages = shape.split("_")
            name = f"{kind}_{number}_{dim}_{rows}_{stages}"
            values = {"NUMBER": type_name, "DIM": dim, "ROWS": rows, "STAGES": stages}
            defines = [f"APR_{key}={value}" for key, value in values.items()]
            found.append((kind, name, [*defines, f"APR_INSTANCE={name}"]))
    return found


def compile_one(source: Path, name: str, defines: list[str], architecture: str) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-O3", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        command += [f"-D{d}" for d in [*defines, 'APR_CUDA_ARCHITECTURES="x"']]
        command += ["-c", str(source), "-o", f"{folder}/object.o"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        text = done.stdout + done.stderr
        if done.returncode:
            raise SystemExit(f"{name}, sm_{architecture}:\n{text[-3000:]}")
        loop = main_loop(disassembled(f"{folder}/object.o"))
    spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", text)
    registers = re.findall(r"Used (\d+) registers", text)
    complaints = [x for x in text.splitlines() if re.search("warning|performance loss", x, re.I)]
    return Compiled(
        name,
        architecture,
        max(map(int, registers)),
        sum(map(int, spilled)),
        time.perf_counter() - began,
        complaints,
        loop,
    )


def disassembled(path: str) -> str:
    """What cuobjdump makes of an object; "" without it (pip: nvidia-cuda-cuobjdump, -nvdisasm)."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    where = os.pathsep.join([*map(str, packaged), os.environ["PATH"]])
    if shutil.which("cuobjdump", path=where) is None:
        return ""
    command = [shutil.which("cuobjdump", path=where), "-sass", path]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": where}
    )
    return done.stdout


def main_loop(sass: str) -> Counter[str]:
    """Instructions of the longest loop with products and no such loop inside, by class.

    They are counted as they stand: parts that a step passes over, masks and the softcap, too.
    """
    code = [
        (int(at, 16), text)
        for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", sass, re.M)
    ]
    bodies = []
    for at, text in code:
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            body = [x for here, x in code if int(jump[1], 16) <= here <= at]
            bodies.append([re.sub(r"^@!?U?P\w+\s+", "", x) for x in body])
    products = CLASSES["products"]
    bodies = [b for b in bodies if any(x.startswith(products) for x in b)]
    if not bodies:
        return Counter()
    fewest = min(sum(x.startswith(products) for x in b) for b in bodies)
    body = min((b for b in bodies if sum(x.startswith(products) for x in b) == fewest), key=len)
    found: Counter[str] = Counter()
    for text in body:
        kinds = (kind for kind, names in CLASSES.items() if text.startswith(names))
        found[next(kinds, "other")] += 1
    return found


def kernels() -> dict[str, Any]:
    """What a build of apr with emulation or CUDA says of each instance, where one is installed."""
    from apr import _core

    backend = _core.gpu(True) or _core.gpu(False)
    return {k.name: k for k in backend.kernels} if backend else {}


def blocks_together(registers: int, threads: int, shared_bytes: int, architecture: str) -> int:
    """Blocks that a multiprocessor holds: of 65,536 registers, given to warps in lots of 256, and
    of 164 or 228 KiB of shared memory, of which a block takes one more.
    """
    room = (228 if architecture.startswith("9") else 164) * 1024
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(65536 // of_a_warp // (threads // 32), room // (shared_bytes + 1024))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every instance")
    parser.add_argument("--record", type=Path, help="write a table here")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("cuda.py: no nvcc on PATH; the CUDA kernels cannot be compiled", file=sys.stderr)
        return 1
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    installed = kernels()
    work = [("steps", "steps", [])]
    work += [x for x in instances() if options.all or re.match(r"\w+_bf16_(64|128)_|plain", x[1])]
    tasks = [
        (KERNELS / f"{source}.cu", *rest, arch)
        for source, *rest in work
        for arch in ARCHITECTURES.get(source, BOTH)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda task: compile_one(*task), tasks))
    heads = ["kernel", "sm", "registers", "spilled bytes", "shared memory, bytes"]
    heads += ["blocks, each multiprocessor", "main loop", *CLASSES]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in results:
        row = [one.name, one.architecture, one.registers, one.spilled]
        if one.name in installed:
            size, threads = installed[one.name].shared_bytes, installed[one.name].threads
            together = blocks_together(one.registers, threads, size, one.architecture)
            row += [f"{size:,}", together]
        row += [one.loop.total(), *(one.loop[kind] for kind in CLASSES)] if one.loop else []
        lines.append(f"| {' | '.join(map(str, row))} |")
    print("\n".join(lines))
    bad = [r for r in results if r.spilled or r.complaints]
    for one in bad:
        print(f"{one.name}, sm_{one.architecture}: {one.spilled} bytes spilled", *one.complaints)
    if options.record:
        release = next(iter(re.findall(r"release [\d.]+, V[\d.]+", version)), "unknown")
        options.record.write_text(
            "# All CUDA kernels, compiled\n\n"
            f"`make cuda-all`, {time.strftime('%Y-%m-%d')}, nvcc {release}, {len(results)} objects "
            "in "
            f"{time.perf_counter() - began:.0f} s with {options.jobs} at a time. Compiled, not "
            "run.\n\n" + "\n".join(lines) + "\n"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
