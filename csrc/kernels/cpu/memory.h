// Physical memory behind the arenas, which the operating system gives at the first touch.
#pragma once

#include <cstddef>

namespace apr::cpu {

// Asks for huge pages: fewer faults, and fewer address translations for kernels that stream keys.
void use_huge_pages(void* data, size_t bytes);

// Makes the memory present, unchanged, while others may use it.
void populate(void* data, size_t bytes);

}  // namespace apr::cpu
