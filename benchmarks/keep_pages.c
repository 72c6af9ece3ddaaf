// Preloaded by `mmoe bench`: large tensors come from a pool of memory whose pages stay mapped, as a caching allocator
// (CUDA's in PyTorch, jemalloc or tcmalloc on the CPU) has them after the first steps of a training run.
//
// glibc maps every block above 32 MiB anew and unmaps it when it is freed, so that each call of an operator with a
// large result would time the kernel's clearing of 4 KiB pages, at a quarter of the memory's bandwidth. PyTorch
// allocates tensors by posix_memalign and frees them by free; blocks below 1 MiB, and everybody else's, are left to
// glibc.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

extern void __libc_free(void*);
extern void* __libc_memalign(size_t, size_t);

enum { kBlocks = 4096, kPage = 4096 };
static const size_t kLarge = 1 << 20, kGrain = 2 << 20;

typedef struct {
  char* start;
  size_t size;
  int used;
} Block;

static Block blocks[kBlocks];
static int count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// The smallest free block that holds `size` and wastes at most an eighth of itself; NULL where there is none.
static Block* fitting(size_t size) {
  Block* best = NULL;
  for (int i = 0; i < count; ++i) {
    Block* block = &blocks[i];
    if (block->used || block->size < size || block->size - size > block->size / 8) continue;
    if (best == NULL || block->size < best->size) best = block;
  }
  return best;
}

static Block* mapped(size_t size) {
  if (count == kBlocks) return NULL;
  void* start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return NULL;
  blocks[count] = (Block){start, size, 0};
  return &blocks[count++];
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  if (size >= kLarge && alignment <= kPage) {
    size_t rounded = (size + kGrain - 1) / kGrain * kGrain;
    pthread_mutex_lock(&lock);
    Block* block = fitting(rounded);
    if (block == NULL) block = mapped(rounded);
    if (block != NULL) block->used = 1;
    pthread_mutex_unlock(&lock);
    if (block != NULL) {
      *out = block->start;
      return 0;
    }
  }
  *out = __libc_memalign(alignment, size);
  return *out == NULL ? ENOMEM : 0;
}

void free(void* pointer) {
  if (((uintptr_t)pointer & (kPage - 1)) == 0 && pointer != NULL) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count; ++i) {
      if (blocks[i].start != pointer) continue;
      blocks[i].used = 0;
      pthread_mutex_unlock(&lock);
      return;
    }
    pthread_mutex_unlock(&lock);
  }
  __libc_free(pointer);
}

// Gives the free blocks back; called between two cases.
void mmoe_release_pages(void) {
  pthread_mutex_lock(&lock);
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    if (blocks[i].used) {
      blocks[kept++] = blocks[i];
    } else {
      munmap(blocks[i].start, blocks[i].size);
    }
  }
  count = kept;
  pthread_mutex_unlock(&lock);
}
