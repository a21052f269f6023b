// The scheduler of cuda_emu.h, and the few calls of the CUDA runtime that launchers make.
//
// Under AddressSanitizer it is compiled like the kernels. Under ThreadSanitizer it is not instrumented (it would report
// its own switching), and EMU_TSAN makes every CUDA thread a fibre of TSan's, so that two threads of a block race unless
// a barrier orders them, even though one OS thread runs both.
#include "cuda_emu.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMU_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
constexpr unsigned kNoSync = 1;  // the switch itself orders nothing
#else
#define __tsan_acquire(address) (void)0
#define __tsan_release(address) (void)0
#endif

// Saves the callee-saved registers and the stack pointer in *save, and goes on where `load` was saved.
extern "C" void emu_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
#else
#error "the emulator switches stacks in x86-64 assembly; this machine needs its own (aarch64: x19-x30, d8-d15, sp)"
#endif

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace emu {
thread_local int lane;
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(EMU_TSAN)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr int kPage = 4096;

enum class Wait { none, barrier, warp };

struct Stack {
  char* memory = nullptr;
  void* tsan = nullptr;  // making a fibre of TSan's is slow, so it stays with its stack
};

struct Fibre {
  uint3 thread;
  Stack stack;
  void* sp = nullptr;
  void* fake_stack = nullptr;
  bool done = false;
  Wait waits = Wait::none;
  Site site{};
};

struct Gathering {  // a warp collective under way
  unsigned mask, arrived, to_leave;
  Collective what;
  Site site;
  uint64_t values[32];
  char order;  // an address for TSan's happens-before
};

// One OS thread and the block it runs.
struct Worker {
  std::vector<Fibre> fibres;
  std::vector<int> ready;
  std::vector<std::vector<Gathering*>> warps;
  std::vector<Gathering*> spare;
  Fibre* current = nullptr;
  void* sp = nullptr;
  void *fake_stack = nullptr, *tsan = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void (*body)(void*) = nullptr;
  void* arg = nullptr;
  int live = 0, at_barrier = 0, generation = 0;
  Site barrier{};
  char barrier_order[2], start_order, done_order;  // addresses for TSan's happens-before
  int seed = 0;
  uint64_t random_state = 1, loaded = 0;
  std::string error;

  uint64_t random() {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state;
  }
};

// In .tdata, so that filling .tbss (where __shared__ variables are) leaves it alone.
thread_local Worker* worker __attribute__((section(".tdata")));

std::mutex mutex;
std::vector<Stack> stacks;  // to be used again
std::string last_error;
std::atomic<int> seed{0};
std::atomic<uint64_t> loaded{0};

Stack new_stack() {
  std::lock_guard<std::mutex> lock(mutex);
  if (!stacks.empty()) {
    const Stack stack = stacks.back();
    stacks.pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  mprotect(memory, kPage, PROT_NONE);
  Stack stack{static_cast<char*>(memory), nullptr};
#ifdef EMU_TSAN
  stack.tsan = __tsan_create_fiber(0);
#endif
  return stack;
}

void to_scheduler(Fibre& f, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.fake_stack, worker->stack_bottom, worker->stack_size);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(worker->tsan, kNoSync);
#endif
  emu_switch(&f.sp, worker->sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
  (void)for_good;
}

void to_fibre(Fibre& f) {
  worker->current = &f;
  threadIdx = f.thread, lane = static_cast<int>(&f - worker->fibres.data()) % 32;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&worker->fake_stack, f.stack.memory, kStack);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(f.stack.tsan, kNoSync);
#endif
  emu_switch(&worker->sp, f.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(worker->fake_stack, nullptr, nullptr);
#endif
}

int index(const Fibre& f) { return static_cast<int>(&f - worker->fibres.data()); }

void wake(int i) {
  worker->fibres[i].waits = Wait::none;
  worker->ready.push_back(i);
}

void wait(Fibre& f, Wait what, Site site) {
  f.waits = what, f.site = site;
  to_scheduler(f, false);
}

void yield() {
  Fibre& f = *worker->current;
  worker->ready.push_back(index(f));
  to_scheduler(f, false);
}

void open_barrier() {
  worker->generation++, worker->at_barrier = 0;
  for (size_t i = 0; i < worker->fibres.size(); i++)
    if (worker->fibres[i].waits == Wait::barrier) wake(static_cast<int>(i));
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &worker->stack_bottom, &worker->stack_size);
#endif
  __tsan_acquire(&worker->start_order);
  worker->body(worker->arg);
  Fibre& f = *worker->current;
  __tsan_release(&worker->done_order);
  f.done = true;
  worker->live--;
  if (worker->live && worker->at_barrier == worker->live) open_barrier();  // who has returned is not waited for
  to_scheduler(f, true);
  abort();
}

// Fills this module's zero-initialised thread-local memory, which is the __shared__ variables, with NaN.
int poison_shared(dl_phdr_info* module, size_t, void*) {
  char* tls = static_cast<char*>(module->dlpi_tls_data);
  if (!tls) return 0;
  for (int k = 0; k < module->dlpi_phnum; k++) {
    const auto& segment = module->dlpi_phdr[k];
    const auto mine = reinterpret_cast<char*>(&lane);
    if (segment.p_type != PT_TLS || mine < tls || mine >= tls + segment.p_memsz) continue;
    memset(tls + segment.p_filesz, 0xff, segment.p_memsz - segment.p_filesz);
    return 1;
  }
  return 0;
}

void report_deadlock(Worker& w) {
  w.error = "deadlock: " + std::to_string(w.live) + " threads wait:";
  Site last{"", 0};
  int places = 0;
  for (const Fibre& f : w.fibres) {
    if (f.done || (f.site.line == last.line && !strcmp(f.site.file, last.file)) || places++ == 4) continue;
    char text[256];
    snprintf(text, sizeof text, " thread %u at %s %s:%d;", f.thread.x,
             f.waits == Wait::barrier ? "__syncthreads" : "a warp collective", f.site.file, f.site.line);
    w.error += text, last = f.site;
  }
}

void start_fibre(Fibre& f, int i) {
  f.thread = {static_cast<unsigned>(i) % blockDim.x, static_cast<unsigned>(i) / blockDim.x % blockDim.y,
              static_cast<unsigned>(i) / (blockDim.x * blockDim.y)};
  f.done = false, f.waits = Wait::none, f.fake_stack = nullptr;
  void** sp = reinterpret_cast<void**>(f.stack.memory + kStack) - 10;  // 6 registers, return address, alignment
  memset(sp, 0, 10 * sizeof(void*));
  sp[6] = reinterpret_cast<void*>(&entry);
  f.sp = sp;
}

void run_block(const cudaLaunchConfig_t& config, uint64_t block) {
  Worker& w = *worker;
  lane = 0;  // makes the loader allocate this thread's copy, so that it can be found
  dl_iterate_phdr(poison_shared, nullptr);
  blockDim = config.blockDim, gridDim = config.gridDim;
  blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
              static_cast<unsigned>(block / (uint64_t{gridDim.x} * gridDim.y))};
  const int n = static_cast<int>(w.fibres.size());
  w.live = n, w.at_barrier = 0;
  w.random_state = (w.seed + 1) * 0x9e3779b97f4a7c15ull + block + 1;
  w.ready.clear();
  for (auto& warp : w.warps) {
    for (Gathering* g : warp) w.spare.push_back(g);
    warp.clear();
  }
  __tsan_release(&w.start_order);
  for (int i = 0; i < n; i++) start_fibre(w.fibres[i], i), w.ready.push_back(i);

  std::vector<int> batch;
  batch.reserve(n);
  size_t next = 0;
  while (w.live && w.error.empty()) {
    if (next == batch.size()) {
      batch.swap(w.ready), w.ready.clear(), next = 0;
      if (batch.empty()) {
        report_deadlock(w);
        break;
      }
      std::sort(batch.begin(), batch.end());
      if (w.seed == 1) std::reverse(batch.begin(), batch.end());
      if (w.seed > 1)
        for (size_t k = batch.size(); k > 1; k--) std::swap(batch[k - 1], batch[w.random() % k]);
    }
    int i = batch[next++];
    if (w.seed > 1 && !w.ready.empty() && (w.random() & 1))  // one that just woke overtakes the batch
      std::swap(i, w.ready[w.random() % w.ready.size()]);
    to_fibre(w.fibres[i]);
  }
  __tsan_acquire(&w.done_order);  // the worker's next block has the same shared memory
}

// Runs blocks until there are none left. Nothing is allocated inside a fibre: TSan would take it for the kernel's.
void work(const cudaLaunchConfig_t& config, void (*body)(void*), void* arg, int threads, uint64_t blocks,
          std::atomic<uint64_t>& next) {
  Worker w;
  worker = &w;
  w.body = body, w.arg = arg, w.seed = seed;
  w.fibres.resize(threads), w.warps.resize((threads + 31) / 32), w.ready.reserve(2 * threads);
  for (auto& warp : w.warps) warp.reserve(64);
  w.spare.reserve(64 * w.warps.size());
  for (size_t i = 0; i < 64 * w.warps.size(); i++) w.spare.push_back(new Gathering);
  for (Fibre& f : w.fibres) f.stack = new_stack();
#ifdef EMU_TSAN
  w.tsan = __tsan_get_current_fiber();
#endif
  for (uint64_t block; w.error.empty() && (block = next++) < blocks;) run_block(config, block);
  loaded += w.loaded;
  std::lock_guard<std::mutex> lock(mutex);
  for (Fibre& f : w.fibres) stacks.push_back(f.stack);
  for (auto& warp : w.warps)
    for (Gathering* g : warp) delete g;
  for (Gathering* g : w.spare) delete g;
  if (!w.error.empty()) last_error = w.error, next = blocks;
  worker = nullptr;
}

bool same(Site a, Site b) { return a.line == b.line && !strcmp(a.file, b.file); }

}  // namespace

void fail(const char* format, ...) {
  char text[512], where[128];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(where, sizeof where, " [block %u thread %u]", blockIdx.x, threadIdx.x);
  worker->error = std::string(text) + where;
  to_scheduler(*worker->current, true);  // the block is given up; its fibres never go on
  abort();
}

void count_load(size_t bytes) { worker->loaded += bytes; }

void block_barrier(Site site) {
  Fibre& f = *worker->current;
  if (worker->at_barrier == 0)
    worker->barrier = site;
  else if (!same(worker->barrier, site))
    fail("divergent __syncthreads: %s:%d, others at %s:%d", site.file, site.line, worker->barrier.file,
         worker->barrier.line);
  char* order = &worker->barrier_order[worker->generation & 1];
  __tsan_release(order);
  if (++worker->at_barrier == worker->live) {
    open_barrier();
    yield();
  } else {
    wait(f, Wait::barrier, site);
  }
  __tsan_acquire(order);
  (void)order;
}

void warp_gather(Collective what, unsigned mask, uint64_t value, uint64_t (&values)[32], Site site) {
  Fibre& f = *worker->current;
  const int me = lane, warp = index(f) / 32;
  if (!(mask >> me & 1))
    fail("lane %d calls a warp collective with mask %#x, which lacks it, %s:%d", me, mask, site.file, site.line);
  auto& under_way = worker->warps[warp];
  Gathering* g = nullptr;
  for (Gathering* other : under_way) {
    if (other->arrived == other->mask || other->mask != mask) continue;  // overlapping masks wait, or deadlock
    if (other->what != what || !same(other->site, site))
      fail("warp collectives differ: mask %#x %s:%d against %s:%d", mask, site.file, site.line, other->site.file,
           other->site.line);
    g = other;
  }
  if (!g) {
    g = worker->spare.back(), worker->spare.pop_back();
    g->mask = mask, g->arrived = 0, g->to_leave = mask, g->what = what, g->site = site;
    under_way.push_back(g);
  }
  g->values[me] = value;
  g->arrived |= 1u << me;
  const bool orders_memory = what == Collective::syncwarp;  // shuffles and votes do not, on the GPU either
  if (orders_memory) __tsan_release(&g->order);
  if (g->arrived == mask) {
    for (int i = 0; i < 32; i++)
      if (i != me && (mask >> i & 1)) wake(warp * 32 + i);
    yield();
  } else {
    wait(f, Wait::warp, site);
  }
  if (orders_memory) __tsan_acquire(&g->order);
  memcpy(values, g->values, sizeof values);
  g->to_leave &= ~(1u << me);
  if (g->to_leave) return;
  *std::find(under_way.begin(), under_way.end(), g) = under_way.back();
  under_way.pop_back();
  worker->spare.push_back(g);
}

std::atomic<uint64_t> launches{0};
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;  // as in a new thread

cudaError_t launch(const cudaLaunchConfig_t& config, void (*body)(void*), void* arg) {
  if (capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorNotSupported;  // may be a kernel's first
  launches++;
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (!blocks || !threads || threads > 1024 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || block.z > 64)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes || config.numAttrs) return cudaErrorNotSupported;
  {
    std::lock_guard<std::mutex> lock(mutex);
    last_error.clear();
  }
  std::atomic<uint64_t> next{0};
  std::vector<std::thread> pool;
  const uint64_t cores = std::max(1u, std::thread::hardware_concurrency());
  for (uint64_t i = 0; i < std::min(blocks, cores); i++)
    pool.emplace_back([&] { work(config, body, arg, static_cast<int>(threads), blocks, next); });
  for (auto& thread : pool) thread.join();
  return last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emu

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))
// 0: fibres in order, 1: in reverse, others: shuffled.
EMU_EXPORT void cuda_emu_set_seed(int value) { emu::seed = value; }
// Bytes that the kernels have loaded since the last call.
EMU_EXPORT uint64_t cuda_emu_loaded_bytes() { return emu::loaded.exchange(0); }
// Kernels launched since the last call.
EMU_EXPORT uint64_t cuda_emu_launches() { return emu::launches.exchange(0); }
// How this thread may act while a stream is captured: a cudaStreamCaptureMode.
EMU_EXPORT int cuda_emu_capture_mode() { return emu::capture_mode; }
EMU_EXPORT const char* cuda_emu_last_error() { return emu::last_error.c_str(); }

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, emu::capture_mode);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 0, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t e) { return e == cudaErrorLaunchFailure ? emu::last_error.c_str() : "refused"; }
const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorLaunchFailure          ? "cudaErrorLaunchFailure"
         : e == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
                                              : "cudaErrorNotSupported";
}
}
