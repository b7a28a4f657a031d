// The scheduler of emulation.h, and `launch`, through which tests run a kernel by name.
#include "emulation.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <utility>
#include <vector>

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t STACK = 256 * 1024;
constexpr unsigned char POISON = 0xFF;
// Bytes behind dynamic shared memory that no kernel may change.
constexpr size_t GUARD = 256;
constexpr size_t STATIC_BYTES = 48 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  bool finished = true;
  Dim3 thread;
  unsigned linear = 0;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  unsigned lanes = 0, arrived = 0, generation = 0;
  Combine combine = nullptr;
  unsigned char in[32][SLOT], out[32][SLOT];
};

std::vector<Fiber*> fibers;
std::vector<Warp> warps;
Fiber* current;
jmp_buf scheduler;
unsigned threads, barrier_arrived, barrier_generation, unfinished;
bool progress;
const char* kernel_name;
void (*body)(void**);
void** arguments;
unsigned char* dynamic_bytes;
std::map<int, size_t> static_sites;
size_t static_used;
alignas(16) unsigned char static_bytes[STATIC_BYTES];

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "kernel %s, block (%u, %u), thread (%u, %u): %s\n", kernel_name, blockIdx.x, blockIdx.y, threadIdx.x,
          threadIdx.y, what);
  abort();
}

void yield() {
  Fiber* fiber = current;
  if (_setjmp(fiber->at) == 0) _longjmp(scheduler, 1);
}

void run_fiber() {
  for (;;) {
    body(arguments);
    if (!current->copies.empty() || !current->groups.empty()) fail("left before its async copies were waited for");
    current->finished = true;
    unfinished--;
    progress = true;
    yield();
  }
}

void resume(Fiber* fiber) {
  current = fiber;
  threadIdx = fiber->thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->at, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

Fiber* new_fiber() {
  Fiber* fiber = new Fiber;
  void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for a stack");
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = stack;
  fiber->start.uc_stack.ss_size = STACK;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, run_fiber, 0);
  return fiber;
}

// 0: forward, 1: reverse, else shuffled by a linear congruential generator.
std::vector<unsigned> permutation(unsigned n, unsigned order) {
  std::vector<unsigned> out(n);
  for (unsigned i = 0; i < n; i++) out[i] = order == 1 ? n - 1 - i : i;
  unsigned long long state = order;
  for (unsigned i = n; order > 1 && i > 1; i--) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(out[i - 1], out[(state >> 33) % i]);
  }
  return out;
}

void run_block(const std::vector<unsigned>& order, size_t shared_bytes) {
  memset(dynamic_bytes, POISON, shared_bytes + GUARD);
  memset(static_bytes, POISON, STATIC_BYTES);
  unfinished = threads;
  barrier_arrived = 0;
  for (unsigned i = 0; i < threads; i++) fibers[i]->finished = false;
  while (unfinished > 0) {
    progress = false;
    for (unsigned i : order)
      if (!fibers[i]->finished) resume(fibers[i]);
    if (!progress) fail("a barrier or collective that not all threads reach");
  }
  for (size_t i = 0; i < GUARD; i++)
    if (dynamic_bytes[shared_bytes + i] != POISON) fail("wrote behind its shared memory");
}

}  // namespace

unsigned char* dynamic_shared() { return dynamic_bytes; }

void* static_shared(int site, size_t bytes) {
  auto [entry, added] = static_sites.try_emplace(site, static_used);
  if (added) static_used += (bytes + 15) / 16 * 16;
  if (static_used > STATIC_BYTES) fail("more static shared memory than a block has");
  return static_bytes + entry->second;
}

unsigned lane() { return current->linear % 32; }

void syncthreads() {
  unsigned generation = barrier_generation;
  if (++barrier_arrived == threads) {
    barrier_arrived = 0;
    barrier_generation++;
    progress = true;
  }
  while (barrier_generation == generation) yield();
}

void collective(const void* in, size_t in_bytes, void* out, size_t out_bytes, Combine combine) {
  Warp& warp = warps[current->linear / 32];
  if (warp.lanes != 32) fail("a collective in a warp of fewer than 32 threads");
  unsigned at = lane(), generation = warp.generation;
  if (warp.arrived > 0 && warp.combine != combine) fail("lanes of a warp at different collectives");
  warp.combine = combine;
  memcpy(warp.in[at], in, in_bytes);
  if (++warp.arrived == warp.lanes) {
    combine(warp.in, warp.out);
    warp.arrived = 0;
    warp.generation++;
    progress = true;
  }
  while (warp.generation == generation) yield();
  memcpy(out, warp.out[at], out_bytes);
}

void copy_later(void* to, const void* from, size_t bytes) {
  if ((size_t)to % bytes != 0 || (size_t)from % bytes != 0) fail("a misaligned async copy");
  current->copies.push_back({to, from, bytes});
}

void commit() { current->groups.push_back(std::move(current->copies)), current->copies.clear(); }

void wait(int pending) {
  while (current->groups.size() > (size_t)pending) {
    for (const Copy& copy : current->groups.front()) {
      if (copy.from == nullptr) {
        memset(copy.to, 0, copy.bytes);
      } else {
        memcpy(copy.to, copy.from, copy.bytes);
      }
    }
    current->groups.pop_front();
  }
}

}  // namespace emulation

// Generated by the test from the KERNEL lines of the sources.
extern const emulation::Kernel KERNELS[];

// Runs a kernel: 0, or 1 for an unknown name, 2 for a block that the kernel does not allow. `arguments` points to one
// pointer an argument, as cuLaunchKernel takes them.
extern "C" int launch(const char* name, const unsigned grid[3], const unsigned block[3], size_t shared_bytes,
                      void** kernel_arguments, unsigned order) {
  using namespace emulation;
  const Kernel* kernel = KERNELS;
  while (kernel->name != nullptr && strcmp(kernel->name, name) != 0) kernel++;
  if (kernel->name == nullptr) return 1;
  threads = block[0] * block[1] * block[2];
  if (threads == 0 || threads > kernel->max_threads) return 2;
  kernel_name = kernel->name;
  body = kernel->call;
  arguments = kernel_arguments;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  while (fibers.size() < threads) fibers.push_back(new_fiber());
  warps.assign((threads + 31) / 32, Warp());
  for (unsigned i = 0; i < threads; i++) {
    fibers[i]->linear = i;
    fibers[i]->thread = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
    warps[i / 32].lanes++;
  }
  static_sites.clear();
  static_used = 0;
  if (posix_memalign((void**)&dynamic_bytes, 128, shared_bytes + GUARD) != 0) fail("no memory");
  auto thread_order = permutation(threads, order);
  for (unsigned i : permutation(grid[0] * grid[1] * grid[2], order)) {
    blockIdx = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
    run_block(thread_order, shared_bytes);
  }
  free(dynamic_bytes);
  return 0;
}
