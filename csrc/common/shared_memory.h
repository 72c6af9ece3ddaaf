// Shared memory that a block of any CUDA kernel has. For host code without torch and CUDA too.
#pragma once

#include <cstdint>

namespace mmoe {

constexpr int64_t kSharedByDefault = 48 * 1024;  // bytes, dynamic and static; for more see allow_shared

}  // namespace mmoe
