// Python's names for what kernels are given: tensors by address, and the call of a layer.
#include <pybind11/stl.h>

#include <optional>

#include "bindings/tensor.h"
#include "kernels/gpu.h"

namespace apr::bindings {

void bind_tensors(py::module_& module) {
  py::enum_<DType>(module, "DType", "Element types that pools and kernels take.")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  py::enum_<Codes>(module, "Codes", "How pools keep numbers: as they are, or in 8 bits.")
      .value("none", Codes::kNone)
      .value("int8", Codes::kInt8)
      .value("float8", Codes::kFloat8);
  module.attr("code_group") = kCodeGroup;
  py::class_<Rows>(module, "Rows", "[rows, heads, dim], the last dimension contiguous.")
      .def(py::init([](int64_t data, int64_t row_stride, int64_t head_stride) {
             return Rows{pointer(data), row_stride, head_stride};
           }),
           py::arg("data"), py::arg("row_stride"), py::arg("head_stride"));
  py::class_<Pool>(module, "Pool", "Keys and values of one layer.")
      .def(py::init([](int64_t k, int64_t v, int64_t k_scales, int64_t v_scales, int64_t num_pages,
                       int64_t kv_heads, int64_t page_size, int64_t head_dim_k, int64_t head_dim_v,
                       DType dtype, Codes codes) {
             return Pool{pointer(k),
                         pointer(v),
                         pointer<float>(k_scales),
                         pointer<float>(v_scales),
                         num_pages,
                         kv_heads,
                         page_size,
                         head_dim_k,
                         head_dim_v,
                         dtype,
                         codes};
           }),
           py::kw_only(), py::arg("k"), py::arg("v"), py::arg("k_scales"), py::arg("v_scales"),
           py::arg("num_pages"), py::arg("kv_heads"), py::arg("page_size"), py::arg("head_dim_k"),
           py::arg("head_dim_v"), py::arg("dtype"), py::arg("codes"));
  py::class_<RotationTable>(module, "RotationTable", "cos and sin [rotations, pairs, 2].")
      .def(py::init([](int64_t cos_sin, int64_t rotations, int64_t first, int64_t pairs,
                       bool interleaved) {
             return RotationTable{pointer<const float>(cos_sin), rotations, first, pairs,
                                  interleaved};
           }),
           py::kw_only(), py::arg("cos_sin"), py::arg("rotations"), py::arg("first"),
           py::arg("pairs"), py::arg("interleaved"));
  py::class_<AttentionCall>(module, "AttentionCall", "Attention of one layer; 0: none.")
      .def(py::init([](const Rows& q, const Rows& out, int64_t lse, int64_t q_heads, double scale,
                       double softcap, int64_t window, int64_t chunk, int64_t sinks,
                       const std::optional<RotationTable>& rotation, bool invariant, int threads) {
             return AttentionCall{q,
                                  out,
                                  pointer<float>(lse),
                                  q_heads,
                                  static_cast<float>(scale),
                                  static_cast<float>(softcap),
                                  window,
                                  chunk,
                                  pointer<const float>(sinks),
                                  rotation.value_or(RotationTable{}),
                                  invariant,
                                  threads};
           }),
           py::kw_only(), py::arg("q"), py::arg("out"), py::arg("lse"), py::arg("q_heads"),
           py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("chunk"),
           py::arg("sinks"), py::arg("rotation"), py::arg("invariant"), py::arg("threads"));
  py::class_<AttentionKind>(module, "AttentionKind",
                            "What a layer's attention on a GPU is, apart from its tensors.")
      .def(py::init([](DType dtype, Codes codes, int64_t q_heads, int64_t kv_heads,
                       int64_t head_dim_k, int64_t head_dim_v, int64_t page_size, int64_t window,
                       int64_t chunk, bool invariant) {
             return AttentionKind{dtype,      codes,     q_heads, kv_heads, head_dim_k,
                                  head_dim_v, page_size, window,  chunk,    invariant};
           }),
           py::kw_only(), py::arg("dtype"), py::arg("codes"), py::arg("q_heads"),
           py::arg("kv_heads"), py::arg("head_dim_k"), py::arg("head_dim_v"), py::arg("page_size"),
           py::arg("window"), py::arg("chunk"), py::arg("invariant"));
}

}  // namespace apr::bindings
