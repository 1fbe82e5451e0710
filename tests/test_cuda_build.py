"""What `make cuda` makes of compilers' words: products that are serialised fail it, and counts of
instructions are those of the main loop.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import cuda as build

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc on PATH", allow_module_level=True)

# A wait that only some threads reach: ptxas then puts a wait behind every product.
SERIALISED = """
#include "kernels/cuda/bulk.cuh"
using namespace apr::cuda;
extern "C" __global__ void kernel(float* out, unsigned long long a, unsigned long long b) {
  float c[32] = {};
  for (int i = 0; i < 8; ++i) {
    products_begin();
    multiply_shared<BFloat16>(c, a, b, i > 0);
    products_commit();
    WAIT products_wait<0>();
    keep_order(c);
  }
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = c[i];
}
"""


@pytest.mark.parametrize("wait,complains", [("", False), ("if (out != nullptr)", True)])
def test_serialised_products_are_complained_about(tmp_path, wait, complains):
    source = tmp_path / "kernel.cu"
    source.write_text(SERIALISED.replace("WAIT", wait))
    compiled = build.compile_one(source, "kernel", [], "90a")
    assert bool(compiled.complaints) == complains
    assert compiled.spilled == 0


def test_the_main_loop_is_the_innermost_with_products():
    code = ["S2R R0", "MOV R1", "LDGSTS R2", "LDSM R3", "@P0 HMMA R4", "MUFU R5", "@P1 BRA 0x20"]
    code += ["FFMA R6", "BRA 0x10", "EXIT"]
    sass = "\n".join(f"  /*{16 * i:04x}*/  {text} ;  /* 0 */" for i, text in enumerate(code))
    loop = build.main_loop(sass)
    assert loop == {
        "global memory": 1,
        "shared memory": 1,
        "products": 1,
        "exponentials": 1,
        "control": 1,
    }


def test_instances_are_those_of_the_build():
    """The list is read from CMake's file; a build with the kernels has the same."""
    from apr import _core

    names = {name for _, name, _ in build.instances()}
    backend = _core.gpu(True) or _core.gpu(False)
    assert "wide_bf16_128_128_5" in names and "plain_fp32_576_16_2" in names
    assert backend is None or names == {kernel.name for kernel in backend.kernels}
