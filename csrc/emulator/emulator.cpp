// runtime: compiled WITHOUT -fsanitize instrumentation (-DMMOE_EMULATED_ASAN / -DMMOE_EMULATED_TSAN only select the
// fiber annotations)
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#include <sys/mman.h>
#include <boost/context/detail/fcontext.hpp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#include "emulator/cuda.h"
#if defined(MMOE_EMULATED_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read16(void*);
void __tsan_write16(void*);
}
#endif
#if defined(MMOE_EMULATED_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
namespace bc = boost::context::detail;
namespace emulator {
thread_local Ctx* g_ctx = nullptr;
enum St { RUN, WAIT_BAR, WAIT_WARP, DONE };
struct Pend {
  void* d;
  const void* s;
  int n;
};
struct Fiber {
  Ctx c;
  bc::fcontext_t f{};
  St st;
  int wrec;
  void* stack = nullptr;
  void* tsan = nullptr;
  void* fake = nullptr;
  Pend q[128];
  int grp[128];
  int qh = 0, qt = 0, g_open = 0, g_done = 0;
};
struct WarpRec {
  unsigned mask = 0, arrived = 0;
  unsigned gen = 0;
  int op = 0;
  unsigned present[2];
  char sync[2];
  alignas(64) unsigned char slot[2][32 * 64];
};
struct Warp {
  unsigned exited = 0, valid = 0;
  int nrec = 0;
  WarpRec rec[8];
};
struct Site {
  const void* key;
  void* p;
  size_t n;
};
constexpr size_t STK = 128 * 1024;
struct Block {
  std::vector<Fiber> fb;
  std::vector<Warp> wp;
  int n = 0, live = 0, bar = 0;
  unsigned bargen = 0;
  int voted = 0;
  int votes[2] = {0, 0};
  char barsync[2];
  bc::fcontext_t sched{};
  Fiber* me = nullptr;
  const std::function<void()>* body = nullptr;
  std::string err;
  void* main_tsan = nullptr;
  const void* mbot = nullptr;
  size_t msz = 0;
  void* mfake = nullptr;
  std::vector<int> order;
  std::mt19937 rng;
  Site site[32];
  int nsite = 0;
  char async = 0;
  std::vector<void*> tofree;
};
static thread_local Block* B = nullptr;
void fail(const char* fmt, ...) {
  char buf[512];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(buf, sizeof buf, fmt, ap);
  va_end(ap);
  char b2[700];
  Ctx* c = g_ctx;
  if (c)
    snprintf(b2, sizeof b2, "block (%u,%u,%u) thread (%u,%u,%u): %s", c->bid.x, c->bid.y, c->bid.z, c->tid.x, c->tid.y,
             c->tid.z, buf);
  else
    snprintf(b2, sizeof b2, "%s", buf);
  fprintf(stderr, "cuda_cpu ERROR: %s\n", b2);
  _Exit(86);
}
static inline void raw_copy(void* d, const void* s, int n) {  // never becomes a call to the intercepted memcpy
  typedef uint32_t __attribute__((may_alias, aligned(1))) u32;
  unsigned char* a = (unsigned char*)d;
  const unsigned char* b = (const unsigned char*)s;
  int i = 0;
  for (; i + 4 <= n; i += 4) *(u32*)(a + i) = *(const u32*)(b + i);
  for (; i < n; i++) a[i] = b[i];
}
void slot_read(void* d, const unsigned char* s, int lane, int n) { raw_copy(d, s + 64 * lane, n); }
static inline void to_sched(bool dying = false) {
  Block* b = B;
  Fiber* f = b->me;
#if defined(MMOE_EMULATED_ASAN)
  __sanitizer_start_switch_fiber(dying ? nullptr : &f->fake, b->mbot, b->msz);
#endif
#if defined(MMOE_EMULATED_TSAN)
  __tsan_switch_to_fiber(b->main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  bc::transfer_t t = bc::jump_fcontext(b->sched, nullptr);
  b->sched = t.fctx;
#if defined(MMOE_EMULATED_ASAN)
  __sanitizer_finish_switch_fiber(f->fake, nullptr, nullptr);
#endif
}
static char end_sync;
static inline void rel(void* p);
static void entry(bc::transfer_t t) {
  Block* b = B;
  b->sched = t.fctx;
#if defined(MMOE_EMULATED_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &b->mbot, &b->msz);
#endif
  (*b->body)();
  Fiber* f = b->me;
  f->st = DONE;
  rel(&end_sync);
  b->live--;
  b->wp[f->c.warp].exited |= 1u << f->c.lane;
  to_sched(true);
  __builtin_trap();
}
static inline void rel(void* p) {
#if defined(MMOE_EMULATED_TSAN)
  __tsan_release(p);
#else
  (void)p;
#endif
}
static inline void acq(void* p) {
#if defined(MMOE_EMULATED_TSAN)
  __tsan_acquire(p);
#else
  (void)p;
#endif
}
static void maybe_release_bar(Block* b) {
  if (b->bar && b->bar == b->live) {
    b->votes[b->bargen & 1] = b->voted;
    b->bar = b->voted = 0;
    b->bargen++;
    for (auto& f : b->fb)
      if (f.st == WAIT_BAR) f.st = RUN;
  }
}
int barrier_count(bool vote) {
  Block* b = B;
  unsigned g = b->bargen;
  Fiber* f = b->me;
  rel(&b->barsync[g & 1]);
  f->st = WAIT_BAR;
  b->bar++;
  b->voted += vote;
  maybe_release_bar(b);
  if (b->bargen == g) to_sched();
  acq(&b->barsync[g & 1]);
  return b->votes[g & 1];
}
void barrier(int, int) { barrier_count(false); }
static bool try_complete(Block* b, Warp& w, WarpRec* r) {
  if (!r->arrived) return false;
  unsigned need = r->mask & w.valid & ~w.exited;
  if ((r->arrived & need) != need) return false;
  r->present[r->gen & 1] = r->arrived;
  unsigned m = r->arrived;
  r->arrived = 0;
  r->gen++;
  int wi = int(&w - b->wp.data());
  for (int l = 0; l < 32; l++)
    if ((m >> l) & 1) {
      Fiber& f = b->fb[wi * 32 + l];
      if (f.st == WAIT_WARP) f.st = RUN;
    }
  return true;
}
const unsigned char* warp_exchange(unsigned mask, Op op, const void* p, int n, bool mem, unsigned* present) {
  Block* b = B;
  Fiber* f = b->me;
  Warp& w = b->wp[f->c.warp];
  unsigned lane = f->c.lane;
  if (!((mask >> lane) & 1)) fail("calling lane %u not in warp mask %08x", lane, mask);
  WarpRec* r = nullptr;
  for (int i = 0; i < w.nrec; i++)
    if (w.rec[i].mask == mask) {
      r = &w.rec[i];
      break;
    }
  if (!r) {
    if (w.nrec == 8) {
      for (int i = 0; i < 8; i++)
        if (!w.rec[i].arrived) {
          r = &w.rec[i];
          break;
        }
      if (!r) fail("too many warp masks");
    } else
      r = &w.rec[w.nrec++];
    r->mask = mask;
    r->arrived = 0;
  }
  if (r->arrived && r->op != op)
    fail("divergent warp collective: lanes %08x wait in op %d, lane %u calls op %d (mask %08x)", r->arrived, r->op,
         lane, op, mask);
  unsigned g = r->gen & 1;
  r->op = op;
  r->arrived |= 1u << lane;
  raw_copy(r->slot[g] + 64 * lane, p, n);
  if (mem) rel(&r->sync[g]);
  unsigned gen = r->gen;
  f->st = WAIT_WARP;
  try_complete(b, w, r);
  if (r->gen == gen) to_sched();
  if (mem) acq(&r->sync[g]);
  *present = r->present[g];
  return r->slot[g];
}
void cp_async(void* d, const void* s, int n) {
  if (((uintptr_t)d | (uintptr_t)s) % n) fail("misaligned cp.async");
#if defined(MMOE_EMULATED_TSAN)
  __tsan_read16((void*)s);
  __tsan_write16(d);  // the asynchronous write may land any time from issue to wait
#endif
#if defined(MMOE_EMULATED_ASAN)
  if (__asan_region_is_poisoned(d, n) || __asan_region_is_poisoned((void*)s, n))
    fail("cp.async out of bounds (dst %p src %p)", d, s);
#endif
  static const bool early = getenv("CC_CPASYNC") && getenv("CC_CPASYNC")[0] == 'e';
  if (early)
    raw_copy(d, s, n);
  else {
    Fiber* f = B->me;
    if (f->qt - f->qh >= 128) fail("too many cp.async in flight");
    f->q[f->qt & 127] = {d, s, n};
    f->grp[f->qt & 127] = f->g_open;
    f->qt++;
  }
}
void cp_commit() { B->me->g_open++; }
static void copy_checked(void* d, const void* s, int n) {
#if defined(MMOE_EMULATED_TSAN)
  __tsan_read16((void*)s);
  __tsan_write16(d);
#endif
#if defined(MMOE_EMULATED_ASAN)
  if (__asan_region_is_poisoned(d, n) || __asan_region_is_poisoned((void*)s, n))
    fail("cp.async out of bounds (dst %p src %p)", d, s);
#endif
  raw_copy(d, s, n);
}
void cp_wait(int n) {
  Fiber* f = B->me;
  while (f->qh < f->qt && f->grp[f->qh & 127] < f->g_open - n) {
    Pend& p = f->q[f->qh & 127];
    copy_checked(p.d, p.s, p.n);
    f->qh++;
  }
}
void* shared_alloc(const void* key, size_t bytes) {
  Block* b = B;
  for (int i = 0; i < b->nsite; i++)
    if (b->site[i].key == key) {
      acq(&b->async);
      return b->site[i].p;
    }
  if (b->nsite == 32) fail("too many shared arrays");
#if defined(MMOE_EMULATED_TSAN)
  void* sf = b->me->tsan;
  __tsan_switch_to_fiber(b->main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes)) fail("oom");
  b->tofree.push_back(p);
#if defined(MMOE_EMULATED_TSAN)
  rel(&b->async);
  __tsan_switch_to_fiber(sf, __tsan_switch_to_fiber_no_sync);
  acq(&b->async);
#endif
  for (size_t i = 0; i < bytes; i++) ((volatile unsigned char*)p)[i] = 0xff;
  b->site[b->nsite++] = {key, p, bytes};
  return p;
}

static void run_block(Block* b, uint3 bid, dim3 grid, dim3 bd, unsigned char* dyn, int sched, unsigned seed) {
  int n = bd.x * bd.y * bd.z, nw = (n + 31) / 32;
  b->n = b->live = n;
  b->bar = b->voted = 0;
  b->nsite = 0;
  if ((int)b->fb.size() < n) b->fb.resize(n);
  b->wp.resize(nw);
  for (int i = 0; i < nw; i++) {
    auto& w = b->wp[i];
    w.exited = 0;
    int c = std::min(32, n - 32 * i);
    w.valid = c == 32 ? ~0u : ((1u << c) - 1);
    w.nrec = 0;
  }
  b->order.resize(n);
  b->rng.seed(seed ^ (bid.x * 2654435761u + bid.y * 40503u + bid.z));
  for (int i = 0; i < n; i++) {
    b->order[i] = sched == 1 ? n - 1 - i : i;
    Fiber& f = b->fb[i];
#if defined(MMOE_EMULATED_TSAN)
    if (f.stack) {
      munmap(f.stack, STK);
      f.stack = nullptr;
    }  // interposed: resets the shadow of the reused stack
#endif
    if (!f.stack) {
      f.stack = mmap(nullptr, STK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      mprotect(f.stack, 4096, PROT_NONE);
    }
    f.c = Ctx{
        uint3{i % bd.x, (i / bd.x) % bd.y, i / (bd.x * bd.y)}, bid, bd, grid, (unsigned)i & 31, (unsigned)i >> 5, dyn};
    f.f = bc::make_fcontext((char*)f.stack + STK, STK - 4096, entry);
    f.st = RUN;
    f.qh = f.qt = f.g_open = 0;
    f.fake = nullptr;
#if defined(MMOE_EMULATED_TSAN)
    f.tsan = __tsan_create_fiber(0);
#endif
  }
#if defined(MMOE_EMULATED_TSAN)
  b->main_tsan = __tsan_get_current_fiber();
#endif
  if (sched == 2) std::shuffle(b->order.begin(), b->order.end(), b->rng);
  while (b->live) {
    bool progress = false;
    if (sched == 2) {
      int k = b->rng() % n;
      std::rotate(b->order.begin(), b->order.begin() + k, b->order.end());
    }
    auto resume = [&](Fiber& f) {
      progress = true;
      b->me = &f;
      g_ctx = &f.c;
#if defined(MMOE_EMULATED_ASAN)
      __sanitizer_start_switch_fiber(&b->mfake, f.stack, STK);
#endif
#if defined(MMOE_EMULATED_TSAN)
      __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
      bc::transfer_t t = bc::jump_fcontext(f.f, nullptr);
      f.f = t.fctx;
#if defined(MMOE_EMULATED_ASAN)
      __sanitizer_finish_switch_fiber(b->mfake, nullptr, nullptr);
#endif
      if (f.st == DONE) {
        maybe_release_bar(b);
        Warp& w = b->wp[f.c.warp];
        for (int i = 0; i < w.nrec; i++) try_complete(b, w, &w.rec[i]);
      }
    };
    if (sched == 3) {
      int w0 = b->rng() % nw;
      for (int wi = 0; wi < nw; wi++) {
        int w = (w0 + wi) % nw;
        bool any = true;
        while (any) {
          any = false;
          for (int l = 0; l < 32 && w * 32 + l < n; l++) {
            Fiber& f = b->fb[w * 32 + l];
            if (f.st == RUN) {
              any = true;
              resume(f);
            }
          }
        }
      }
    } else
      for (int oi = 0; oi < n; oi++) {
        Fiber& f = b->fb[b->order[oi]];
        if (f.st == RUN) resume(f);
      }
    if (!progress) {
      int nb = 0, nw2 = 0, eb = -1, ew = -1;
      for (int i = 0; i < n; i++) {
        if (b->fb[i].st == WAIT_BAR) nb++, eb = i;
        if (b->fb[i].st == WAIT_WARP) nw2++, ew = i;
      }
      g_ctx = nullptr;
      fail(
          "DEADLOCK in block (%u,%u,%u): %d threads at __syncthreads (e.g. %d), %d threads at a warp collective (e.g. "
          "%d), %d exited",
          bid.x, bid.y, bid.z, nb, eb, nw2, ew, n - b->live);
    }
  }
  g_ctx = nullptr;
#if defined(MMOE_EMULATED_TSAN)
  for (int i = 0; i < n; i++) __tsan_destroy_fiber(b->fb[i].tsan);
#endif
}
void launch(dim3 grid, dim3 bd, size_t smem, const std::function<void()>& body) {
  int n = bd.x * bd.y * bd.z;
  if (n < 1 || n > 1024) fail("bad block size %d", n);
  if (smem > 227 * 1024) fail("dynamic smem %zu > 227 KiB", smem);
  const char* e = getenv("CC_SCHED");
  int sched = !e ? 0 : e[0] == 'r' && e[1] == 'e' ? 1 : e[0] == 'r' ? 2 : e[0] == 'g' ? 3 : 0;
  const char* sd = getenv("CC_SEED");
  unsigned seed = sd ? atoi(sd) : 1;
  const char* te = getenv("CC_THREADS");
  int nt = te ? atoi(te) : 1;
#if defined(MMOE_EMULATED_TSAN)
  nt = 1;
#endif
  std::atomic<size_t> next{0};
  size_t nb = (size_t)grid.x * grid.y * grid.z;
  auto worker = [&] {
    static thread_local Block blk;
    B = &blk;
    blk.body = &body;
    for (size_t i; (i = next.fetch_add(1)) < nb;) {
      unsigned char* dyn = smem ? (unsigned char*)aligned_alloc(128, smem) : nullptr;
      if (dyn) {
        blk.tofree.push_back(dyn);
        for (size_t q = 0; q < smem; q++) ((volatile unsigned char*)dyn)[q] = 0xff;
      }  // NaN poison
      size_t j = sched == 1 ? nb - 1 - i : i;
      run_block(&blk,
                uint3{unsigned(j % grid.x), unsigned(j / grid.x % grid.y), unsigned(j / ((size_t)grid.x * grid.y))},
                grid, bd, dyn, sched, seed);
    }
    acq(&end_sync);
    for (void* p : blk.tofree) free(p);
    blk.tofree.clear();
    B = nullptr;
  };
  if (nt <= 1)
    worker();
  else {
    std::vector<std::thread> th;
    for (int i = 0; i < nt; i++) th.emplace_back(worker);
    for (auto& t : th) t.join();
  }
}
int multiprocessors() {
  const char* e = getenv("MMOE_EMULATED_MULTIPROCESSORS");
  return e ? atoi(e) : 2;
}
}  // namespace emulator
