// What the environment says about a run; read at every launch.
//   MMOE_EMULATED_SCHEDULE         forward (default), reverse, random, greedy: the order in which threads run
//   MMOE_EMULATED_SEED             of random and greedy, default 1
//   MMOE_EMULATED_THREADS          OS threads, each with a block at a time, default 1
//   MMOE_EMULATED_MULTIPROCESSORS  of the device that is played, default 2
#pragma once

namespace emulator {

enum class Schedule {
  kForward,  // threads and blocks by index, each thread up to where it must wait
  kReverse,  // the same from the last one
  kRandom,   // an order drawn anew whenever every thread had its turn; blocks in a drawn order
  kGreedy,   // a warp at a time goes as far as it can, from a drawn one on
};

struct Settings {
  Schedule schedule;
  unsigned seed;
  int threads;
};

Settings read_settings();

}  // namespace emulator
