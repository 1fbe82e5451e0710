// Instantiates and starts the kernels that are not attention itself.
#include <stdexcept>
#include <string>

#include "kernels/cuda/append.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/plan_step.cuh"
#include "kernels/cuda/sample.cuh"
#include "kernels/cuda/steps.h"
#include "kernels/cuda/view_step.cuh"

namespace apr::APR_GPU {
namespace {

int64_t blocks_for(int64_t items, int64_t of_a_block) {
  return (items + of_a_block - 1) / of_a_block;
}

std::invalid_argument too_many(int64_t tokens) {
  return std::invalid_argument("append: " + std::to_string(tokens) +
                               " tokens are too many for one step; set step_tokens");
}

// A thread for every 16 bytes; dims are counted in 16-bit numbers.
int64_t copy_blocks(int64_t tokens, int64_t kv_heads, int64_t dims) {
  const int64_t chunks = tokens * kv_heads * (dims / 8);
  if (chunks > INT32_MAX) throw too_many(tokens);
  return blocks_for(chunks, kCopyThreads);
}

}  // namespace

void run_plan_step(const AttentionWork& work, void* stream) {
  start(plan_step, {"plan_step", 1, kPlanThreads, kPlanThreads / 32 * 4, stream, false}, work);
}

void run_merge(const AttentionWork& work, DType dtype, bool overlap, void* stream) {
  const int64_t rows = static_cast<int64_t>(work.row_count) * work.q_heads;
  const Launch launch{"merge_parts", blocks_for(rows, kMergeThreads / 32), kMergeThreads, 0, stream,
                      overlap};
  const bool widest = work.head_dim_v > 128 * kQuads;
  if (dtype == DType::kBFloat16) {
    start(widest ? merge_parts<BFloat16, kMostQuads> : merge_parts<BFloat16, kQuads>, launch, work);
  } else if (dtype == DType::kFloat16) {
    start(widest ? merge_parts<Float16, kMostQuads> : merge_parts<Float16, kQuads>, launch, work);
  } else {
    start(widest ? merge_parts<Float32, kMostQuads> : merge_parts<Float32, kQuads>, launch, work);
  }
}

void run_view_step(const ViewWork& work, void* stream) {
  start(view_step, {"view_step", 1, kViewThreads, 0, stream, false}, work);
}

void run_turn(const TurnWork& work, void* stream) {
  const int64_t angles = static_cast<int64_t>(work.capacity) * work.frequencies;
  start(turn_pairs,
        {"turn_pairs", blocks_for(angles, kTurnThreads), kTurnThreads, 0, stream, false}, work);
}

void run_append(const AppendWork& work, void* stream) {
  const int64_t blocks = copy_blocks(work.rows, work.kv_heads, work.head_dim_k + work.head_dim_v);
  start(append_tokens, {"append_tokens", blocks, kCopyThreads, 0, stream, false}, work);
}

void run_append_codes(const AppendWork& work, DType dtype, Codes codes, void* stream) {
  const int64_t rows = static_cast<int64_t>(work.rows) * work.kv_heads * 2;
  if (rows > INT32_MAX / 32) throw too_many(work.rows);
  const Launch launch{"append_codes", blocks_for(rows, kCopyThreads / 32), kCopyThreads, 0, stream,
                      false};
  if (dtype == DType::kBFloat16) {
    start(codes == Codes::kInt8 ? append_codes<BFloat16, Codes::kInt8>
                                : append_codes<BFloat16, Codes::kFloat8>,
          launch, work);
  } else {
    start(codes == Codes::kInt8 ? append_codes<Float16, Codes::kInt8>
                                : append_codes<Float16, Codes::kFloat8>,
          launch, work);
  }
}

void run_copy(const CopyWork& work, void* stream) {
  const int64_t blocks = copy_blocks(work.count, work.kv_heads, work.head_dim_k + work.head_dim_v);
  start(copy_tokens, {"copy_tokens", blocks, kCopyThreads, 0, stream, false}, work);
}

void run_sample(const SampleWork& work, void* stream) {
  start(sample_rows, {"sample_rows", work.rows, kSampleThreads, kSampleShared, stream, false},
        work);
}

}  // namespace apr::APR_GPU
