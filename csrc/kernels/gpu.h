// What bindings see of a GPU back-end: plans in device memory, and the kernels of a layer. The CUDA
// build and the emulator implement it.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/params.h"

namespace apr {

// What a layer's attention is, apart from its tensors.
struct AttentionKind {
  DType dtype;
  Codes codes;
  int64_t q_heads, kv_heads, head_dim_k, head_dim_v, page_size;
  int64_t window, chunk;  // 0: none
  bool invariant;
};

// The GPU as the host needs to know it.
struct GpuDevice {
  int capability = 0;  // 90 for compute capability 9.0
  int multiprocessors = 0;
  int shared_per_block = 0;  // bytes that a block may ask for
  int shared_per_multiprocessor = 0;
  int64_t most_part_bytes = int64_t{1} << 28;  // for partial results; longer plans run in passes
};

// One compiled attention kernel.
struct GpuKernel {
  std::string name;
  int head_dim, item_rows, stages, threads, shared_bytes;
  bool wide;   // wgmma and TMA
  bool coded;  // reads codes of 8 bits
};

// One pass over a plan's rows. The caller owns the memory.
class GpuPlan {
 public:
  virtual ~GpuPlan() = default;
  virtual const std::vector<char>& upload() const = 0;  // to be copied to the front of `tables`
  virtual int64_t table_bytes() const = 0;
  virtual int64_t part_bytes() const = 0;
  virtual const char* kernel() const = 0;
  // The device planner: once, after the tables were copied.
  virtual void prepare(void* tables, void* stream) const = 0;
  virtual void attention(void* tables, void* parts, const AttentionCall& call, const Pool& pool,
                         void* stream) const = 0;
};

// What the views that share one captured graph may come to.
struct ViewCapacity {
  int64_t rows, entries, segments, pages;
};

// The same for views of which only lengths change from step to step.
class GpuViews : public GpuPlan {
 public:
  // Lays other views out in the same memory; `upload` is new. Throws std::invalid_argument where
  // they do not fit.
  virtual void update(const ViewArrays& views) = 0;
  // The device's part before the layers: what each row sees now, the cut, where new tokens go
  // ([rows of the capacity], -1 beyond the rows that there are) and the positions that they are
  // written at; lengths grow by one.
  virtual void step(void* tables, int64_t* slots, int64_t* positions, void* stream) const = 0;
  // cos and sin [entries of the capacity, pairs, 2] of what `step` found; `inv_freq` [pairs] in
  // device memory.
  virtual void turn(void* tables, const double* inv_freq, int64_t pairs, float* cos_sin,
                    void* stream) const = 0;
};

class GpuBackend {
 public:
  virtual ~GpuBackend() = default;
  virtual std::string architectures() const = 0;
  virtual std::vector<GpuKernel> kernels() const = 0;
  virtual GpuDevice device(int index) const = 0;
  // Throws std::invalid_argument where no kernel serves the kind; as do plans and views of it.
  virtual void check(const AttentionKind& kind, int device_index) const = 0;
  virtual std::vector<std::unique_ptr<GpuPlan>> plan(const PlanArrays& plan,
                                                     const AttentionKind& kind,
                                                     int device_index) const = 0;
  virtual std::unique_ptr<GpuViews> views(const ViewArrays& views, const AttentionKind& kind,
                                          const ViewCapacity& capacity, int device_index) const = 0;
  // `slots` [rows] in device memory: page * page_size + slot, or -1.
  virtual void append(const Rows& k, const Rows& v, const Pool& pool, const int64_t* slots,
                      int64_t rows, void* stream) const = 0;
  virtual void copy_tokens(const Pool& pool, const PlanCopy* copies, int64_t count,
                           void* stream) const = 0;
  virtual void sample(const SampleCall& call, void* stream) const = 0;  // all in device memory
};

// What warps asked of device memory for one kind of data: bytes, each once a request, and the
// sectors of 32 bytes that they touch.
struct GpuTraffic {
  int64_t requests = 0, bytes = 0, sectors = 0, least_sectors = 0;
};

// Accesses of warps to shared memory: in each round every bank of 32 gives a word.
struct GpuShared {
  int64_t requests = 0, rounds = 0, least_rounds = 0;
};

// What the emulator counts of a kernel.
struct GpuCounts {
  int64_t launches = 0, blocks = 0, working_blocks = 0;  // with spans of their own
  std::map<std::string, GpuTraffic> traffic;             // by the name of the data
  GpuShared operands, other;  // of copies and products; by the kernels' own loads and stores
  // Keys and values of the multiprocessor that reads most, launch by launch: blocks take turns.
  int64_t busiest_bytes = 0;
  int64_t products = 0;  // multiplications and additions of the tensor cores
  int64_t exponentials = 0, barriers = 0;
  // Spans of a block, at most; what a thread looks up in tables before the first copy of its first
  // span, and of a later one, at most.
  int64_t spans = 0, first_lookups = 0, later_lookups = 0;
};

const GpuBackend* cuda_backend();      // nullptr: not in this build
const GpuBackend* emulated_backend();  // nullptr: not in this build
// Which GPU is emulated, and what its orders are drawn from.
void set_emulated_device(const GpuDevice& device, uint64_t seed);
// From now on kernels are counted, afresh, or no more; what was counted, by kernel.
void count_emulated(bool on);
std::map<std::string, GpuCounts> emulated_counts();
// Runs a kernel with a known fault: "" where the emulator saw none, else what it saw.
std::string run_broken_kernel(const std::string& name);

}  // namespace apr
