// One instance of the kernel for many rows: compiled once for each dtype and size.
#include "kernels/cuda/attention_wide.cuh"
#include "kernels/cuda/instance.h"
#include "kernels/cuda/launch.h"

namespace apr::APR_GPU {
namespace {

using Number = APR_NUMBER;
using Shape = WideShape<APR_DIM, APR_STAGES>;

#ifdef APR_EMULATED
TensorMap map_of(const AttentionWork& work, const Array<const uint16_t>& pool, int dim,
                 int tokens) {
  return {pool.data, dim, int64_t{1} << work.page_shift, work.kv_heads, work.num_pages, tokens};
}
#else
using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking the driver: the module must load where there is none.
Encode encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("apr: this CUDA driver has no cuTensorMapEncodeTiled; update it");
  }
  return reinterpret_cast<Encode>(function);
}

TensorMap map_of(const AttentionWork& work, const Array<const uint16_t>& pool, int dim,
                 int tokens) {
  static const Encode encode = encode_function();
  const auto page_size = cuuint64_t{1} << work.page_shift;
  const auto row = static_cast<cuuint64_t>(dim), heads = static_cast<cuuint64_t>(work.kv_heads);
  const cuuint64_t sizes[4] = {row, page_size, heads, static_cast<cuuint64_t>(work.num_pages)};
  const cuuint64_t strides[3] = {row * 2, row * 2 * page_size, row * 2 * page_size * heads};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(tokens), 1, 1}, steps[4] = {1, 1, 1, 1};
  TensorMap map{};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<uint16_t*>(pool.data), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("apr: cuTensorMapEncodeTiled failed with " + std::to_string(result));
  }
  return map;
}
#endif

void run(const AttentionWork& work, const Launch& launch) {
  const int box = box_tokens(work);
  const PoolMaps maps{
      map_of(work, work.k, work.head_dim_k, box), map_of(work, work.v, work.head_dim_v, box),
      map_of(work, work.k, work.head_dim_k, kFew), map_of(work, work.v, work.head_dim_v, kFew)};
  start(attention_wide<Number, APR_DIM, APR_STAGES>, launch, work, maps);
}

}  // namespace

const Instance APR_INSTANCE = instance_of<Shape>(kNumber<Number>, APR_STAGES, true, false, run);

}  // namespace apr::APR_GPU
