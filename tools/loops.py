"""Innermost loops of a CPU kernel, with the cycles that LLVM's model of a processor gives each:
what bounds a kernel on a machine that is not at hand. Needs g++ and llvm-mca (Debian: llvm-19).

    python tools/loops.py attend_matrix --set amx --cpu sapphirerapids

The model knows no operation of the matrix unit, and one port for products of 64-byte vectors where
servers have two: docs/kernels.md has the numbers that those loops are judged by.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import Counter
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "csrc"
TILE = SOURCES / "kernels" / "cpu" / "tile.cpp"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
SETS = {  # as in CMakeLists.txt
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DAPR_MATRIX"],
}
ITERATIONS = 200


def assembly(name: str) -> list[str]:
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-g1", f"-DAPR_ISA={name}", *SETS[name]]
    command = ["g++", *flags, f"-I{SOURCES}", "-S", "-o", "-", str(TILE)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")


def loops(body: list[str]) -> list[tuple[int, int]]:
    """First and last line of each loop that holds no other, but for those that only fetch."""
    labels = {m[1]: i for i, line in enumerate(body) if (m := re.match(r"(\.L\w+):", line))}
    found = []
    for i, line in enumerate(body):
        jump = re.match(r"\s+j\w+\s+(\.L\w+)", line)
        if jump and labels.get(jump[1], i) < i:
            found.append((labels[jump[1]], i))
    found = [x for x in found if not any("prefetch" in line for line in body[x[0] : x[1]][-6:])]
    inside = lambda a, b: a != b and a[0] <= b[0] and b[1] <= a[1]  # noqa: E731
    return sorted(x for x in found if not any(inside(x, y) for y in found))


def cycles(code: list[str], cpu: str) -> float:
    straight = "\n".join(line for line in code if not line.split()[0].startswith("j"))
    command = ["llvm-mca-19", f"-mcpu={cpu}", f"-iterations={ITERATIONS}"]
    told = subprocess.run(command, input=straight, check=True, capture_output=True, text=True)
    return int(re.search(r"Total Cycles:\s+(\d+)", told.stdout)[1]) / ITERATIONS  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("function", help="a part of its name")
    parser.add_argument("--set", choices=SETS, default="amx")
    parser.add_argument("--cpu", default="sapphirerapids", help="as llvm-mca names it")
    args = parser.parse_args()
    lines = assembly(args.set)
    files = {m[1]: m[2] for line in lines if (m := re.search(r'\.file (\d+) .*?([\w.]+)"$', line))}
    start = next(i for i, x in enumerate(lines) if re.match(rf"_Z\w*{args.function}\w*:", x))
    end = next(i for i in range(start, len(lines)) if ".cfi_endproc" in lines[i])
    body = lines[start:end]
    for first, last in loops(body):
        part = body[first : last + 1]
        code = [x for x in part if x.strip() and not re.match(r"\s*[.#]", x)]
        file, line = re.findall(r"\.loc (\d+) (\d+)", "\n".join(body[: first + len(part) // 2]))[-1]
        names = Counter(x.split()[0] for x in code)
        tiles = sum(n for name, n in names.items() if name.startswith(("tile", "tdp")))
        what = f"{tiles} of tiles" if tiles else f"{cycles(code, args.cpu):.1f} cycles"
        common = ", ".join(f"{n} {name}" for name, n in names.most_common(4))
        print(f"{files[file]}:{line}: {len(code)} instructions, {what} ({common})")


if __name__ == "__main__":
    main()
