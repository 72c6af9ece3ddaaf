// Argument checks of host code.
#pragma once

#include <sstream>
#include <stdexcept>

namespace mmoe {

// Raises RuntimeError in Python with the parts of the message put together. STD_TORCH_CHECK is not used because it
// puts the path of the source file on the building machine before the message.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace mmoe
