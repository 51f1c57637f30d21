"""Runs the source of a Metal kernel on the CPU: one C++ thread for each thread of a threadgroup.

It checks what a kernel computes (indices, barriers, reductions), not whether Metal's compiler likes
it. Barriers are real ones; threadgroups run one after the other; float32 only.
"""

import ctypes
import math
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np

PRELUDE = """
#include <algorithm>
#include <barrier>
#include <cfloat>
#include <cmath>
#include <thread>
#include <vector>

using uint = unsigned int;
struct uint3 { uint x, y, z; };
struct Simdgroup { std::barrier<> gate{32}; float slots[32]; };
thread_local Simdgroup* simdgroup_here;
thread_local std::barrier<>* gate_here;
thread_local uint lane_here;

namespace metal {
using std::exp, std::log, std::max;
enum class mem_flags { mem_threadgroup };
void threadgroup_barrier(mem_flags) { gate_here->arrive_and_wait(); }
template <class Join> float across(float value, Join join) {
  simdgroup_here->slots[lane_here] = value;
  simdgroup_here->gate.arrive_and_wait();
  float joined = simdgroup_here->slots[0];
  for (int k = 1; k < 32; ++k) joined = join(joined, simdgroup_here->slots[k]);
  simdgroup_here->gate.arrive_and_wait();
  return joined;
}
float simd_sum(float value) { return across(value, [](float a, float b) { return a + b; }); }
float simd_max(float value) { return across(value, [](float a, float b) { return max(a, b); }); }
}
"""

LAUNCH = """
extern "C" void launch(float** arrays, int** shapes, uint across, uint down, uint threads) {
  for (uint y = 0; y < down; ++y) for (uint x = 0; x < across; ++x) {
    std::barrier<> gate(threads);
    std::vector<Simdgroup> simdgroups(threads / 32);
    std::vector<std::thread> running;
    for (uint t = 0; t < threads; ++t) running.emplace_back([&, t] {
      simdgroup_here = &simdgroups[t / 32];
      gate_here = &gate;
      lane_here = t % 32;
      kernel(ARGUMENTS, uint3{t, 0, 0}, uint3{x, y, 0}, uint3{threads, 1, 1},
             t % 32, t / 32, threads / 32);
    });
    for (auto& thread : running) thread.join();
  }
}
"""

BUILT_IN = (
    "uint3 thread_position_in_threadgroup, uint3 threadgroup_position_in_grid, "
    "uint3 threads_per_threadgroup, uint thread_index_in_simdgroup, "
    "uint simdgroup_index_in_threadgroup, uint simdgroups_per_threadgroup"
)


def emulated(folder: Path):
    """What stands in for `mx.fast.metal_kernel`, its programs built in `folder`."""

    def metal_kernel(*, name, input_names, output_names, source, header=""):
        def run(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            assert threadgroup[1:] == (1, 1) and threadgroup[0] % 32 == 0
            assert set(output_dtypes) == {mx.float32}
            settings = {key: value for key, value in template if key != "T"}
            library = _build(folder, input_names, output_names, header, source, settings)
            arrays = [np.ascontiguousarray(np.array(array, np.float32)) for array in inputs]
            arrays += [np.full(shape, np.nan, np.float32) for shape in output_shapes]
            shapes = [np.array(array.shape, np.int32) for array in arrays]
            library.launch(
                _pointers(arrays), _pointers(shapes), math.ceil(grid[0] / threadgroup[0]),
                grid[1], threadgroup[0],
            )  # fmt: skip
            return [mx.array(array) for array in arrays[len(inputs) :]]

        return run

    return metal_kernel


def _pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])


def _build(folder, input_names, output_names, header, source, settings):
    names = [*input_names, *output_names]
    stem = folder / "_".join(["kernel", *(f"{key}{int(value)}" for key, value in settings.items())])
    parameters = [f"float* {name}, const int* {name}_shape" for name in names]
    given = [f"arrays[{k}], shapes[{k}]" for k in range(len(names))]
    text = [
        PRELUDE,
        "#define threadgroup",
        "using T = float;",
        *(f"constexpr int {key} = {int(value)};" for key, value in settings.items()),
        header,
        f"void kernel({', '.join(parameters)}, {BUILT_IN}) {{",
        # One array for all threads of a threadgroup.
        source.replace("threadgroup float ", "static float "),
        "}",
        LAUNCH.replace("ARGUMENTS", ", ".join(given)),
    ]
    if not stem.with_suffix(".so").exists():
        stem.with_suffix(".cpp").write_text("\n".join(text))
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Werror"]
        command += ["-Wno-unused-variable", "-Wno-unused-but-set-variable", "-o"]
        subprocess.run(
            [*command, str(stem.with_suffix(".so")), str(stem.with_suffix(".cpp"))], check=True
        )
    return ctypes.CDLL(str(stem.with_suffix(".so")))
