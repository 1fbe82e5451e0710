// Physical memory behind the arenas, which the operating system gives at the first touch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace apr::cpu {

// Asks for huge pages: fewer faults, and fewer address translations for kernels that stream keys.
void use_huge_pages(void* data, size_t bytes);

// Lets `bytes` of a file, from `offset` on, stand at `data`, all three whole pages of the system:
// what is written there is nobody else's. Returns 0, or the system's error number.
int map_file(void* data, size_t bytes, int file, int64_t offset);

// Makes the memory present, unchanged, while others may use it.
void populate(void* data, size_t bytes);

}  // namespace apr::cpu
