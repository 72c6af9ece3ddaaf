#include "emulator/settings.h"

#include <cstdlib>
#include <cstring>

#include "emulator/block.h"
#include "emulator/launch.h"

namespace emulator {
namespace {

int read_number(const char* name, int least, int otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  char* end;
  const long number = std::strtol(text, &end, 10);
  if (end == text || *end != 0 || number < least || number > 1 << 20) {
    fail("%s=%s: must be a number from %d", name, text, least);
  }
  return static_cast<int>(number);
}

Schedule read_schedule() {
  const char* text = std::getenv("MMOE_EMULATED_SCHEDULE");
  const char* const names[] = {"forward", "reverse", "random", "greedy"};
  if (text == nullptr) return Schedule::kForward;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(text, names[i]) == 0) return static_cast<Schedule>(i);
  }
  fail("MMOE_EMULATED_SCHEDULE=%s: must be forward, reverse, random or greedy", text);
}

}  // namespace

Settings read_settings() {
  return {read_schedule(), static_cast<unsigned>(read_number("MMOE_EMULATED_SEED", 0, 1)),
          read_number("MMOE_EMULATED_THREADS", 1, 1)};
}

int multiprocessors() { return read_number("MMOE_EMULATED_MULTIPROCESSORS", 1, 2); }

}  // namespace emulator
