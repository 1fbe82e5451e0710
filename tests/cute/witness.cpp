// Holds what the emulator takes instructions for beside NVIDIA's CuTe, whose layouts are evaluated
// here on the host: a line "fact NAME ELEMENTS DIFFERENT" each. Facts that begin with "wrong" are
// wrong on purpose. tests/test_cute.py builds and reads it.
#include <cstdio>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm80.hpp>
#include <cute/atom/copy_traits_sm90_tma_swizzle.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <map>
#include <string>

#include "kernels/cuda/bulk.cuh"
#include "kernels/cuda/launch.h"

namespace ours = apr::cuda_emulated;
using cute::_0;
using cute::_64;
using cute::Int;
using ours::Element;

namespace {

struct Tally {
  const char* name;
  long elements = 0, different = 0;

  void compare(bool same) {
    ++elements;
    different += same ? 0 : 1;
  }
  ~Tally() { std::printf("fact\t%s\t%ld\t%ld\n", name, elements, different); }
};

// Registers of `threads` threads: NVIDIA's number of an element counts down the rows, then along
// the columns.
template <typename Layout, typename Ours>
void registers(const char* name, Layout layout, int rows, const Ours& at) {
  Tally tally{name};
  for (int thread = 0; thread < size<0>(layout); ++thread) {
    for (int value = 0; value < size<1>(layout); ++value) {
      const Element mine = at(thread, value);
      tally.compare(static_cast<int>(layout(thread, value)) == mine.row + mine.col * rows);
    }
  }
}

template <typename Traits>
void products_of_a_warp(const std::string& type) {
  static_assert(std::is_same_v<typename Traits::Shape_MNK, cute::Shape<Int<16>, Int<8>, Int<16>>>);
  const auto b = [](int lane, int value) {  // theirs is [n, k]
    const Element at = ours::mma_b(lane, value);
    return Element{at.col, at.row};
  };
  registers(("mma a, " + type).c_str(), typename Traits::ALayout{}, 16, ours::mma_a);
  registers(("mma b, " + type).c_str(), typename Traits::BLayout{}, 8, b);
  registers(("mma c, " + type).c_str(), typename Traits::CLayout{}, 16, ours::mma_c);
}

template <typename Traits>
void products_of_four_warps(const std::string& type) {
  static_assert(std::is_same_v<typename Traits::Shape_MNK, cute::Shape<Int<64>, Int<64>, Int<16>>>);
  registers(("wgmma c, " + type).c_str(), typename Traits::CLayout{}, 64, ours::wgmma_c);
}

// Scores become the operand of the next product where they lie: register i of step k holds the
// accumulators 8 k + 2 i and 8 k + 2 i + 1 (attention_wide.cuh), and 4 n + 2 h of two products in
// attention_small.cuh.
void weights_from_scores() {
  Tally wide{"weights of the wide kernel from its scores"};
  const cute::MMA_Traits<
      cute::SM90_64x64x16_F32BF16BF16_RS<cute::GMMA::Major::K, cute::GMMA::Major::MN>>::ALayout a{};
  const cute::GMMA::CLayout_64x64 c{};
  for (int thread = 0; thread < 128; ++thread) {
    for (int k = 0; k < 4; ++k) {
      for (int value = 0; value < 8; ++value) {
        wide.compare(a(thread, value) + 64 * 16 * k == c(thread, 8 * k + value));
      }
    }
  }
  Tally small{"weights of the small kernel from its scores"};
  using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  for (int lane = 0; lane < 32; ++lane) {
    for (int value = 0; value < 8; ++value) {
      const int n = value / 4;  // of the two products of 8 tokens
      small.compare(Traits::ALayout{}(lane, value) ==
                    Traits::CLayout{}(lane, value % 4) + 16 * 8 * n);
    }
  }
}

// ---- ldmatrix, executed ---------------------------------------------------------------------

void load_all(bool transposed, int shift, ours::Array<uint32_t> out) {
  const uint32_t shared = ours::shared_address(ours::shared_memory());
  const int lane = ours::thread_index();
  for (int e = 0; e < 8; ++e) {
    ours::shared_array<uint16_t>(shared)[lane * 8 + e] = static_cast<uint16_t>(lane * 8 + e);
  }
  ours::sync_warp();
  uint32_t r[4];
  ours::load_matrices(r, shared + static_cast<uint32_t>((lane + shift) % 32 * 16), transposed);
  for (int m = 0; m < 4; ++m) out[lane * 4 + m] = r[m];
}

template <typename Op>
void matrix_loads(const char* name, bool transposed, int shift = 0) {
  using Traits = cute::Copy_Traits<Op>;
  std::vector<uint32_t> found(128);
  ours::start(load_all, {"witness", 1, 32, 512, nullptr, false}, transposed, shift,
              ours::Array<uint32_t>(found.data(), 128));
  // In both layouts a number is a bit of the 32 rows that lanes point to.
  const auto bits = cute::right_inverse(typename Traits::SrcLayout{});
  Tally tally{name};
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < 8; ++half) {
      const int bit = typename Traits::DstLayout{}(lane, half * 16);
      const auto theirs = static_cast<uint32_t>(bits(bit) % 32 * 8 + bits(bit) / 32 / 16);
      const uint32_t mine = found[static_cast<size_t>(lane * 4 + half / 2)] >> (half % 2 * 16);
      tally.compare(theirs == (mine & 0xffff));
    }
  }
}

// ---- shared memory as wgmma and bulk copies see it ------------------------------------------

// A bulk copy of numbers that tell where they come from, executed.
void copy_one_box(ours::TensorMap map, ours::Array<uint16_t> out) {
  const uint32_t shared = ours::shared_address(ours::shared_memory());
  const uint32_t barrier = shared + 8192;
  ours::barrier_init(barrier, 1);
  ours::barrier_expect(barrier, 8192);
  for (int token = 0; token < 64; token += map.box) {
    ours::copy_box(shared + static_cast<uint32_t>(token * 128), map, 0, token, 0, 0, barrier);
  }
  ours::barrier_wait(barrier, 0);
  for (int i = 0; i < 4096; ++i) out[i] = ours::shared_array<uint16_t>(shared)[i];
}

std::vector<uint16_t> a_box(int box) {
  std::vector<uint16_t> from(4096), to(4096);
  for (int i = 0; i < 4096; ++i) from[static_cast<size_t>(i)] = static_cast<uint16_t>(i);
  ours::start(copy_one_box, {"witness", 1, 1, 8192 + 8, nullptr, false},
              ours::TensorMap{from.data(), 64, 64, 1, 1, box},
              ours::Array<uint16_t>(to.data(), 4096));
  return to;
}

using Number = cute::bfloat16_t;
template <int kRows, int kColumns>  // k innermost
using ByK = decltype(tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Number>{},
                                   cute::Shape<Int<kRows>, Int<kColumns>>{}));
using ByN = decltype(tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Number>{},
                                   cute::Shape<_64, _64>{}));  // n innermost

// The layout with its swizzle in numbers, not in bits of a pointer.
template <typename Layout>
auto offsets(const Layout& layout) {
  return as_position_independent_swizzle_layout(layout);
}

void boxes() {
  const std::vector<uint16_t> box = a_box(64), few = a_box(8);
  Tally copied{"a box of a bulk copy"}, by_few{"a box of 64 tokens, eight by eight"};
  Tally wrong{"wrong swizzle"};
  const auto layout = offsets(ByK<64, 64>{});
  for (int token = 0; token < 64; ++token) {
    for (int dim = 0; dim < 64; ++dim) {
      const auto at = static_cast<size_t>(layout(token, dim));
      copied.compare(box[at] == token * 64 + dim);
      by_few.compare(few[at] == token * 64 + dim);
      wrong.compare(box[at ^ (at >> 7 & 1) << 3] == token * 64 + dim);
    }
  }
  Tally mode{"the tensor map's swizzle is of 128 bytes"};
  const ByK<64, 64> plain{};
  mode.compare(cute::TMA::to_CUtensorMapSwizzle(cute::detail::get_tma_swizzle_bits(plain),
                                                cute::detail::get_tma_swizzle_base(plain)) ==
               CU_TENSOR_MAP_SWIZZLE_128B);
}

// Where gather_queries puts the numbers that are multiplied with K major.
template <int kRows, int kDim>
void queries() {
  const std::string name = "queries in shared memory, head_dim " + std::to_string(kDim);
  Tally tally{name.c_str()};
  const auto layout = offsets(ByK<kRows, kDim>{});
  for (int r = 0; r < kRows; ++r) {
    for (int dim = 0; dim < kDim; ++dim) {
      const auto mine =
          static_cast<uint32_t>(dim / 64 * kRows * 128) + ours::in_rows_of_128(r, dim % 64);
      tally.compare(mine == 2u * static_cast<uint32_t>(layout(r, dim)));
    }
  }
}

// The operand of one product, a 64 x 16 part of `layout`: the addresses of its elements, and the
// descriptor bit by bit. CuTe's begins at 0 on a host.
template <cute::GMMA::Major kMajor, typename Layout>
void operand(Tally& addresses, Tally& descriptors, const Layout& layout, int row, int column,
             uint64_t mine) {
  constexpr bool kByK = kMajor == cute::GMMA::Major::K;
  const auto tensor = make_tensor(cute::make_smem_ptr(static_cast<Number*>(nullptr)), layout);
  const auto first = local_tile(tensor, cute::Shape<_64, Int<16>>{}, cute::make_coord(_0{}, _0{}));
  const uint64_t theirs = cute::SM90::GMMA::make_gmma_desc<kMajor>(first);
  const auto bytes = static_cast<uint64_t>(
      2 * static_cast<int>(layout.layout_b()(row, column)));  // before the swizzle
  // The leading offset is of matrices with more than 64 numbers a row: n major ours have no more.
  const uint64_t used = kByK ? ~uint64_t{0} : ~(uint64_t{0x3fff} << 16);
  descriptors.compare((mine & used) == theirs + (bytes >> 4));
  const auto at = offsets(layout);
  for (int i = 0; i < 64; ++i) {
    for (int k = 0; k < 16; ++k) {
      const auto address = 2u * static_cast<uint32_t>(at(row + i, column + k));
      addresses.compare(address ==
                        (kByK ? ours::described(mine, i, k) : ours::described(mine, k, i)));
    }
  }
}

// As attend() of attention_wide.cuh makes them, the tile at address 0.
template <int kDim>
void operands(uint32_t stride) {
  using cute::GMMA::Major;
  const std::string dim = std::to_string(kDim), wrong = stride == 1024 ? "" : "wrong stride of ";
  const std::string names[] = {wrong + "queries of " + dim, wrong + "keys of " + dim,
                               wrong + "values of " + dim};
  const uint64_t tile = ours::matrix_descriptor(0, stride);
  std::string descriptors[3];
  for (int i = 0; i < 3; ++i) descriptors[i] = names[i] + ", descriptors";
  {
    Tally at{names[0].c_str()}, word{descriptors[0].c_str()};
    for (int row = 0; row < 128; row += 64) {
      const uint64_t base = ours::matrix_descriptor(static_cast<uint32_t>(row * 128), stride);
      for (int k = 0; k < kDim / 16; ++k) {
        operand<Major::K>(at, word, ByK<128, kDim>{}, row, 16 * k,
                          ours::advanced(base, k / 4 * 128 * 128 + k % 4 * 32));
      }
    }
  }
  {
    Tally at{names[1].c_str()}, word{descriptors[1].c_str()};
    for (int k = 0; k < kDim / 16; ++k) {
      operand<Major::K>(at, word, ByK<64, kDim>{}, 0, 16 * k,
                        ours::advanced(tile, k / 4 * 8192 + k % 4 * 32));
    }
  }
  Tally at{names[2].c_str()}, word{descriptors[2].c_str()};
  for (int k = 0; k < 4; ++k) {
    operand<Major::MN>(at, word, ByN{}, 0, 16 * k, ours::advanced(tile, k * 16 * 128));
  }
}

// ---- cp.async, executed -----------------------------------------------------------------------

void copy_pieces(bool valid, ours::Array<const uint16_t> from, ours::Array<uint16_t> out) {
  const uint32_t shared = ours::shared_address(ours::shared_memory());
  for (int i = 0; i < 16; ++i) ours::shared_array<uint16_t>(shared)[i] = 0xffff;
  ours::copy_async16(shared, from, 0, valid);
  ours::copy_async_commit();
  ours::copy_async_wait<0>();
  for (int i = 0; i < 16; ++i) out[i] = ours::shared_array<uint16_t>(shared)[i];
}

void copies() {
  using Traits = cute::Copy_Traits<cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>>;
  constexpr int kNumbers = size(Traits::SrcLayout{}) / 16;
  alignas(16) const uint16_t from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  Tally tally{"cp.async: 16 bytes"};
  for (const bool valid : {true, false}) {
    uint16_t out[16];
    ours::start(copy_pieces, {"witness", 1, 1, 32, nullptr, false}, valid,
                ours::Array<const uint16_t>(from, 8), ours::Array<uint16_t>(out, 16));
    for (int i = 0; i < 16; ++i) {
      tally.compare(out[i] == (i >= kNumbers ? 0xffff : valid ? i + 1 : 0));
    }
  }
}

}  // namespace

int main() {
  products_of_a_warp<cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>>("bf16");
  products_of_a_warp<cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>>("fp16");
  using cute::GMMA::Major;
  products_of_four_warps<cute::MMA_Traits<cute::SM90_64x64x16_F32BF16BF16_SS<Major::K, Major::K>>>(
      "bf16");
  products_of_four_warps<cute::MMA_Traits<cute::SM90_64x64x16_F32F16F16_SS<Major::K, Major::K>>>(
      "fp16");
  using FromRegisters = cute::MMA_Traits<cute::SM90_64x64x16_F32BF16BF16_RS<Major::K, Major::MN>>;
  registers("wgmma a in registers", FromRegisters::ALayout{}, 64, ours::wgmma_a);
  registers("wgmma c, a in registers", FromRegisters::CLayout{}, 64, ours::wgmma_c);
  registers("wrong fragment", FromRegisters::ALayout{}, 64, [](int thread, int value) {
    return ours::wgmma_a(thread, value ^ 2);  // the halves of the rows exchanged
  });
  weights_from_scores();
  matrix_loads<cute::SM75_U32x4_LDSM_N>("ldmatrix", false);
  matrix_loads<cute::SM75_U16x8_LDSM_T>("ldmatrix, transposed", true);
  matrix_loads<cute::SM75_U32x4_LDSM_N>("wrong ldmatrix, transposed", true);
  matrix_loads<cute::SM75_U32x4_LDSM_N>("wrong ldmatrix, rows off by one", false, 1);
  boxes();
  queries<128, 64>();
  queries<128, 128>();
  queries<128, 256>();
  for (const uint32_t stride : {1024u, 512u}) {
    operands<64>(stride);
    operands<128>(stride);
    operands<256>(stride);
  }
  copies();
}
