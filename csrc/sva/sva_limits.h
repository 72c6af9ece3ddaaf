// How much one call of sva takes, known to its checks and to its kernels.
#pragma once

#include <cstdint>

namespace mmoe {

constexpr int64_t kSvaEncoders = 16;
constexpr int64_t kSvaWindow = 8;  // m: a query owns m * m cells of a grid

}  // namespace mmoe
