// Starts the kernels that are not attention itself.
#pragma once

#include "kernels/cuda/work.h"

namespace apr::APR_GPU {

void run_plan_step(const AttentionWork& work, void* stream);
void run_merge(const AttentionWork& work, DType dtype, bool overlap, void* stream);
void run_view_step(const ViewWork& work, void* stream);
void run_turn(const TurnWork& work, void* stream);
void run_append(const AppendWork& work, void* stream);
void run_append_codes(const AppendWork& work, DType dtype, Codes codes, void* stream);
void run_copy(const CopyWork& work, void* stream);
void run_sample(const SampleWork& work, void* stream);

}  // namespace apr::APR_GPU
