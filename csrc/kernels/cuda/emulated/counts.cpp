// What kernels ask of a GPU, counted while the emulator runs them.
#include "kernels/cuda/emulated/counts.h"

#include <algorithm>
#include <set>
#include <utility>

namespace apr {
namespace cuda_emulated {
namespace {

constexpr uint64_t kSector = 32;
constexpr int64_t kBanks = 32;
constexpr int64_t kRoundBytes = 4 * kBanks;  // what shared memory gives at once

struct Data {
  std::string name;
  uint64_t begin, end;
};

const std::string kTables = "tables";  // whatever is not named
bool on = false;
std::vector<Data> named;
std::map<std::string, GpuCounts> by_kernel;

const std::string& name_of(uint64_t address) {
  for (const Data& data : named) {
    if (address >= data.begin && address < data.end) return data.name;
  }
  return kTables;
}

int64_t sectors_of(int64_t bytes) {
  return (bytes + static_cast<int64_t>(kSector) - 1) / static_cast<int64_t>(kSector);
}

void add(GpuTraffic& to, const GpuTraffic& x) {
  to.requests += x.requests;
  to.bytes += x.bytes;
  to.sectors += x.sectors;
  to.least_sectors += x.least_sectors;
}

void add(GpuShared& to, const GpuShared& x) {
  to.requests += x.requests;
  to.rounds += x.rounds;
  to.least_rounds += x.least_rounds;
}

}  // namespace

Counter::Counter(int64_t threads)
    : warps_(static_cast<size_t>((threads + 31) / 32)), threads_(static_cast<size_t>(threads)) {}

void Counter::access(Memory memory, int64_t thread, const void* place, uint64_t address,
                     int64_t bytes) {
  Thread& one = threads_[static_cast<size_t>(thread)];
  Warp& warp = warps_[static_cast<size_t>(thread / 32)];
  const int64_t times = one.times[memory][place]++;
  auto& request = warp.requests[memory][{place, times}];
  if (bytes == 0) return;
  request.push_back({address, bytes, static_cast<int>(thread % 32)});
  if (memory == kGlobal && &name_of(address) == &kTables) ++one.lookups;
}

void Counter::span(int64_t thread) {
  Thread& one = threads_[static_cast<size_t>(thread)];
  if (one.spans++ > 0) one.lookups = 0;
  one.waits = true;
  total_.spans = std::max(total_.spans, one.spans);
}

void Counter::copy_begins(int64_t thread) {
  Thread& one = threads_[static_cast<size_t>(thread)];
  if (!one.waits) return;
  one.waits = false;
  int64_t& most = one.spans > 1 ? total_.later_lookups : total_.first_lookups;
  most = std::max(most, one.lookups);
}

void Counter::meet(int64_t number) {
  Warp& warp = warps_[static_cast<size_t>(number)];
  for (const auto& [place, request] : warp.requests[kGlobal]) count_global(request);
  for (const auto& [place, request] : warp.requests[kOperands]) {
    count_shared(total_.operands, request);
  }
  for (const auto& [place, request] : warp.requests[kShared]) count_shared(total_.other, request);
  warp = {};
  const auto first = static_cast<size_t>(number * 32);
  for (size_t i = first; i < std::min(first + 32, threads_.size()); ++i) {
    for (auto& times : threads_[i].times) times.clear();
  }
}

void Counter::count_global(std::vector<Access> request) {
  if (request.empty()) return;
  std::sort(request.begin(), request.end(),
            [](const Access& a, const Access& b) { return a.address < b.address; });
  uint64_t byte = 0, sector = 0;  // the first that are not counted yet
  GpuTraffic traffic{1, 0, 0, 0};
  for (const Access& one : request) {
    const uint64_t end = one.address + static_cast<uint64_t>(one.bytes);
    const uint64_t end_sector = (end + kSector - 1) / kSector;
    const uint64_t from = std::max(byte, one.address);
    const uint64_t from_sector = std::max(sector, one.address / kSector);
    traffic.bytes += end > from ? static_cast<int64_t>(end - from) : 0;
    traffic.sectors +=
        end_sector > from_sector ? static_cast<int64_t>(end_sector - from_sector) : 0;
    byte = std::max(byte, end);
    sector = std::max(sector, end_sector);
  }
  traffic.least_sectors = sectors_of(traffic.bytes);
  add(total_.traffic[name_of(request[0].address)], traffic);
}

// As many neighbouring lanes are served together as 128 bytes hold; each bank gives a word a round.
void Counter::count_shared(GpuShared& to, const std::vector<Access>& request) {
  if (request.empty()) return;
  const auto lanes = static_cast<int>(kRoundBytes / std::clamp<int64_t>(request[0].bytes, 4, 16));
  ++to.requests;
  for (int first = 0; first < 32; first += lanes) {
    std::vector<std::set<uint64_t>> words(kBanks);
    for (const Access& one : request) {
      if (one.lane < first || one.lane >= first + lanes) continue;
      const uint64_t last = (one.address + static_cast<uint64_t>(one.bytes) - 1) / 4;
      for (uint64_t word = one.address / 4; word <= last; ++word) {
        words[word % kBanks].insert(word);
      }
    }
    size_t rounds = 0, all = 0;
    for (const auto& bank : words) {
      rounds = std::max(rounds, bank.size());
      all += bank.size();
    }
    to.rounds += static_cast<int64_t>(rounds);
    to.least_rounds += (static_cast<int64_t>(all) + kBanks - 1) / kBanks;
  }
}

void Counter::bulk_copy(int64_t thread, uint64_t address, int64_t row_bytes, int64_t rows,
                        int64_t pitch) {
  copy_begins(thread);
  if (row_bytes == 0) return;
  GpuTraffic traffic{1, row_bytes * rows, 0, sectors_of(row_bytes * rows)};
  for (int64_t row = 0; row < rows; ++row) {
    const uint64_t begin = address + static_cast<uint64_t>(row * pitch);
    const uint64_t end = begin + static_cast<uint64_t>(row_bytes);
    traffic.sectors += static_cast<int64_t>((end + kSector - 1) / kSector - begin / kSector);
  }
  add(total_.traffic[name_of(address)], traffic);
}

GpuCounts Counter::finish() {
  for (size_t warp = 0; warp < warps_.size(); ++warp) meet(static_cast<int64_t>(warp));
  total_.blocks = 1;
  return std::move(total_);
}

bool counting() { return on; }

void name_data(const char* name, const void* begin, int64_t bytes) {
  const auto at = reinterpret_cast<uint64_t>(begin);
  std::erase_if(named, [&](const Data& data) { return data.name == name; });
  if (bytes > 0) named.push_back({name, at, at + static_cast<uint64_t>(bytes)});
}

void add_counts(const char* kernel, const std::vector<GpuCounts>& blocks, int multiprocessors) {
  GpuCounts& total = by_kernel[kernel];
  ++total.launches;
  std::vector<int64_t> read(static_cast<size_t>(multiprocessors));
  for (size_t block = 0; block < blocks.size(); ++block) {
    const GpuCounts& one = blocks[block];
    for (const auto& [name, traffic] : one.traffic) {
      add(total.traffic[name], traffic);
      if (name == "keys" || name == "values") read[block % read.size()] += traffic.bytes;
    }
    total.blocks += one.blocks;
    total.working_blocks += one.spans > 0 ? 1 : 0;
    add(total.operands, one.operands);
    add(total.other, one.other);
    total.products += one.products;
    total.exponentials += one.exponentials;
    total.barriers += one.barriers;
    total.first_lookups = std::max(total.first_lookups, one.first_lookups);
    total.spans = std::max(total.spans, one.spans);
    total.later_lookups = std::max(total.later_lookups, one.later_lookups);
  }
  total.busiest_bytes += *std::max_element(read.begin(), read.end());
}

}  // namespace cuda_emulated

void count_emulated(bool on) {
  cuda_emulated::on = on;
  if (on) cuda_emulated::by_kernel.clear();
}

std::map<std::string, GpuCounts> emulated_counts() { return cuda_emulated::by_kernel; }

}  // namespace apr
