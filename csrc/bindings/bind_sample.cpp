// Python's door to the sampler.
#include <pybind11/stl.h>

#include "bindings/tensor.h"
#include "kernels/cpu/kernels.h"
#include "kernels/draw.h"

namespace apr::bindings {

void bind_sample(py::module_& module) {
  py::class_<SampleCall>(module, "SampleCall", "Rows of scores, and where their tokens go.")
      .def(py::init([](int64_t scores, int64_t row_stride, DType dtype, int64_t logits,
                       int64_t logits_stride, DType logits_dtype, int64_t rows, int64_t vocab,
                       int64_t draws, int64_t tokens, int64_t logprobs, int64_t drawn_logprobs,
                       int64_t entropies, int threads) {
             return SampleCall{pointer(scores),
                               row_stride,
                               dtype,
                               pointer(logits),
                               logits_stride,
                               logits_dtype,
                               rows,
                               vocab,
                               pointer<const RowDraw>(draws),
                               pointer<int64_t>(tokens),
                               pointer<float>(logprobs),
                               pointer<float>(drawn_logprobs),
                               pointer<float>(entropies),
                               threads};
           }),
           py::kw_only(), py::arg("scores"), py::arg("row_stride"), py::arg("dtype"),
           py::arg("logits"), py::arg("logits_stride"), py::arg("logits_dtype"), py::arg("rows"),
           py::arg("vocab"), py::arg("draws"), py::arg("tokens"), py::arg("logprobs"),
           py::arg("drawn_logprobs"), py::arg("entropies"), py::arg("threads"));
  module.def(
      "sample",
      [](const SampleCall& call) {
        const py::gil_scoped_release release;
        cpu::sample(call);
      },
      py::arg("call"));
  module.def("random_bits", &random_bits, py::arg("key"), py::arg("count"));
  module.def("most_vocab", [] { return kMostVocab; });
  module.def("row_draw_bytes", [] { return sizeof(RowDraw); });
}

}  // namespace apr::bindings
