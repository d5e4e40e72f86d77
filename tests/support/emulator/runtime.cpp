// Threads as fibers, the scheduler, and barriers of blocks and clusters.
#include "runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <set>

#define CALLER __builtin_return_address(0)

// saves the callee's registers and the stack of one fiber, and goes on with another
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

// blockDim and gridDim of the kernels
extern "C" {
dim3 emu_block_dim, emu_grid_dim;
}

namespace emu {

Machine* machine;
Thread* self;

namespace {

constexpr uint64_t kCanary = 0x5afe5afe5afe5afe;
constexpr uint32_t kMostPolls = 1 << 20;
constexpr unsigned kWindow = 4;  // blocks that run at a time while they get on

void* scheduler;
void (*kernel_body)(void*);
void* kernel_context;
std::string failure;
uint64_t random_state = 1;
unsigned late_blocks = 0;
std::vector<char*> free_stacks;

std::string command(const std::string& line) {
  std::string out;
  FILE* pipe = popen(line.c_str(), "r");
  if (!pipe) return out;
  char buffer[4096];
  while (fgets(buffer, sizeof buffer, pipe)) out += buffer;
  pclose(pipe);
  return out;
}

// function and file:line of an address and of what it is inlined into, innermost first
std::vector<std::pair<std::string, std::string>> frames(const void* at) {
  Dl_info info;
  std::vector<std::pair<std::string, std::string>> found;
  if (!dladdr(at, &info)) return found;
  char line[64];
  snprintf(line, sizeof line, "0x%zx", reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(info.dli_fbase));
  const std::string text = command(std::string("addr2line -Cfie '") + info.dli_fname + "' " + line);
  for (size_t from = 0, end; (end = text.find('\n', from)) != std::string::npos;) {
    const size_t second = text.find('\n', end + 1);
    if (second == std::string::npos) break;
    std::string place = text.substr(end + 1, second - end - 1);
    place = place.substr(0, place.find(" ("));  // "(discriminator 2)"
    found.emplace_back(text.substr(from, end - from), place);
    from = second + 1;
  }
  return found;
}

}  // namespace

std::string kernel_name(const void* kernel) {
  const auto found = frames(kernel);
  std::string name = found.empty() ? "kernel" : found[0].first;
  for (const char* part : {"(anonymous namespace)::", "flexkernels::", "cuda::", "void "}) {
    for (size_t at; (at = name.find(part)) != std::string::npos;) name.erase(at, strlen(part));
  }
  // without the arguments: up to the first ( outside of <>
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

std::string line_of(const void* at) {
  std::string out;
  // the call, not where it returns to
  for (const auto& frame : frames(static_cast<const char*>(at) - 1)) {
    const std::string& place = frame.second;
    if (place.find("/emulator/include/") != std::string::npos) continue;
    const size_t from = place.find("csrc/");
    out += (out.empty() ? "" : " in ") + (from == std::string::npos ? place : place.substr(from));
  }
  return out.empty() ? "an unknown line" : out;
}

std::string thread_name(uint32_t cluster, uint32_t index) {
  const unsigned each = machine->threads + 1, thread = index % each;
  const unsigned block = cluster * machine->cluster_blocks + index / each;
  char text[64];
  if (thread == machine->threads)
    snprintf(text, sizeof text, "a bulk copy of block %u", block);
  else
    snprintf(text, sizeof text, "thread %u of block %u", thread, block);
  return text;
}

void fail(const void* at, const char* format, ...) {
  char text[2048];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  std::string message = kernel_name(machine->grid.kernel) + ": ";
  if (at) message += line_of(at) + ": ";
  if (self) message += thread_name(self->block->cluster->number, self->index) + " ";
  message += text;
  if (!self) throw Failure{message};
  failure = message;
  void* never;
  emu_switch(&never, scheduler);
  __builtin_unreachable();
}

uint32_t dice() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 11);
}

// --- what threads know of each other

static void merge(Known& into, const Known& from) {
  for (const auto& [cluster, clocks] : from) {
    auto& mine = into[cluster];
    if (!mine) mine = clocks;
    if (mine == clocks) continue;
    auto sum = std::make_shared<Clocks>(*mine);
    for (size_t i = 0; i < sum->size(); ++i) (*sum)[i] = std::max((*sum)[i], (*clocks)[i]);
    mine = sum;
  }
}

KnownPtr join(const std::vector<Share>& shares) {
  auto sum = std::make_shared<Known>();
  std::set<const Known*> merged;
  for (const Share& one : shares) {
    if (one.known && merged.insert(one.known.get()).second) merge(*sum, *one.known);
  }
  std::map<uint32_t, std::shared_ptr<Clocks>> own;
  for (const Share& one : shares) {
    auto& clocks = own[one.cluster];
    if (!clocks) {
      const auto& base = (*sum)[one.cluster];
      clocks = base ? std::make_shared<Clocks>(*base) : std::make_shared<Clocks>(machine->cluster_threads());
    }
    (*clocks)[one.index] = std::max((*clocks)[one.index], one.clock);
  }
  for (const auto& [cluster, clocks] : own) (*sum)[cluster] = clocks;
  return sum;
}

Share share(Thread& t) { return {t.known, t.block->cluster->number, t.index, t.clock++}; }

void learn(Thread& t, const KnownPtr& known) {
  t.known = known;
  const auto own = known->find(t.block->cluster->number);
  t.own = own == known->end() ? nullptr : own->second.get();
}

static void learn_more(Thread& t, const Known& more) {
  if (more.empty()) return;
  auto sum = t.known ? std::make_shared<Known>(*t.known) : std::make_shared<Known>();
  merge(*sum, more);
  learn(t, sum);
}

// --- fibers

static void to_scheduler() { emu_switch(&self->sp, scheduler); }

void wait(const char* what, const void* at) {
  self->state = Thread::kWaiting;
  self->waits_for = what;
  self->at = at;
  while (self->state == Thread::kWaiting) to_scheduler();
}

void yield(const void* at) {
  self->at = at;
  self->waits_for = "memory that another thread writes";
  if (++self->polls > kMostPolls) fail(at, "has looked %u times for what nobody writes", kMostPolls);
  to_scheduler();
}

void poll() { yield(CALLER); }
void trap() { fail(CALLER, "called __trap()"); }

static void complete(Warp& warp, size_t which) {
  Meeting meeting = warp.open[which];
  warp.open.erase(warp.open.begin() + which);
  ++machine->progress;
  if (meeting.finish) meeting.finish(meeting);
  for (Thread* lane : warp.lanes) {
    if (meeting.arrived >> lane->number % 32 & 1) lane->state = Thread::kReady;
  }
}

void meet(const char* what, unsigned mask, void* payload, Finish finish, const void* at) {
  Warp& warp = *self->warp;
  const unsigned lane = self->number % 32;
  if (!(mask >> lane & 1)) fail(at, "calls %s with mask 0x%08x, which leaves out its own lane %u", what, mask, lane);
  size_t which = 0;
  while (which < warp.open.size() && warp.open[which].mask != mask) ++which;
  if (which == warp.open.size()) warp.open.push_back({what, mask, 0, {}, {}, finish});
  Meeting& meeting = warp.open[which];
  if (strcmp(meeting.what, what)) {
    const std::string other = line_of(meeting.at[__builtin_ctz(meeting.arrived)]);
    fail(at, "calls %s while a lane of its mask 0x%08x waits in %s at %s", what, mask, meeting.what, other.c_str());
  }
  meeting.arrived |= 1u << lane;
  meeting.payload[lane] = payload;
  meeting.at[lane] = at;
  self->state = Thread::kWaiting;
  if (meeting.arrived == (mask & warp.live)) complete(warp, which);
  if (self->state == Thread::kWaiting) wait(what, at);
}

static void release(Barrier& barrier) {
  const KnownPtr known = join(barrier.shares);
  for (Thread* thread : barrier.waiting) {
    learn(*thread, known);
    thread->vote = barrier.votes;
    thread->state = Thread::kReady;
  }
  barrier = Barrier{};
  ++machine->progress;
}

// --- the interface's barriers

static void check_same_line(const Barrier& barrier) {
  for (const Thread* thread : barrier.waiting) {
    const void *one = barrier.waiting[0]->at, *other = thread->at;
    if (one == other) continue;
    static std::map<std::pair<const void*, const void*>, bool> same;
    const auto key = std::make_pair(one, other);
    // a compiler may copy a barrier, so the line counts
    if (!same.count(key)) same[key] = line_of(one) == line_of(other);
    if (!same[key]) fail(one, "waits at __syncthreads(), other threads at another one, %s", line_of(other).c_str());
  }
}

int block_barrier(int id, unsigned threads, Vote vote, int predicate) {
  Block& block = *self->block;
  const char* what = id ? "a named barrier" : "__syncthreads()";
  if (id == 0) threads = machine->threads;
  if (id == 0 && block.live != threads) fail(CALLER, "waits at __syncthreads() after other threads have returned");
  if (id && (threads % 32 || threads > machine->threads)) fail(CALLER, "names a barrier of %u threads", threads);
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived && barrier.expected != threads) fail(CALLER, "names another number of threads than before");
  barrier.expected = threads;
  barrier.shares.push_back(share(*self));
  barrier.waiting.push_back(self);
  const int on = predicate != 0;
  if (vote == kAnd)
    barrier.votes = (barrier.arrived ? barrier.votes : 1) & on;
  else if (vote != kNone)
    barrier.votes = vote == kOr ? barrier.votes | on : barrier.votes + on;
  self->at = CALLER;
  self->state = Thread::kWaiting;
  if (++barrier.arrived == threads) {
    if (id == 0) check_same_line(barrier);
    release(barrier);
  } else {
    wait(what, CALLER);
  }
  return self->vote;
}

void named_arrive(int id, unsigned threads) {
  Barrier& barrier = self->block->barriers[id];
  if (barrier.arrived && barrier.expected != threads) fail(CALLER, "names another number of threads than before");
  barrier.expected = threads;
  barrier.shares.push_back(share(*self));
  if (++barrier.arrived == threads) release(barrier);
}

static unsigned live_threads(const Cluster& cluster) {
  unsigned live = 0;
  for (const auto& block : cluster.blocks) live += block->live;
  return live;
}

static void try_release(Cluster& cluster) {
  if (!cluster.barrier.arrived || cluster.barrier.arrived < live_threads(cluster)) return;
  cluster.together = join(cluster.barrier.shares);
  ++cluster.phase;
  for (Thread* thread : cluster.barrier.waiting) thread->state = Thread::kReady;
  cluster.barrier = Barrier{};
  ++machine->progress;
}

void cluster_arrive() {
  Cluster& cluster = *self->block->cluster;
  self->phase = cluster.phase;
  self->arrived_with = self->known;
  cluster.barrier.shares.push_back(share(*self));
  ++cluster.barrier.arrived;
  try_release(cluster);
}

void cluster_wait() {
  Cluster& cluster = *self->block->cluster;
  if (cluster.phase == self->phase) {
    cluster.barrier.waiting.push_back(self);
    wait("the cluster's barrier", CALLER);
  }
  // mostly the thread learned nothing else in between
  if (self->known == self->arrived_with)
    learn(*self, cluster.together);
  else
    learn_more(*self, *cluster.together);
}

uint3 thread_idx() {
  const dim3 d = machine->grid.block;
  const unsigned n = self->number;
  return {n % d.x, n / d.x % d.y, n / d.x / d.y};
}
uint3 block_idx() { return self->block->index; }
unsigned cluster_rank() { return self->block->rank; }
unsigned cluster_size() { return machine->cluster_blocks; }

// --- order of atomic accesses

static void publish(const void* p, Order order) {
  Known& known = machine->released[reinterpret_cast<uintptr_t>(p)];
  if (order & kRelease)
    merge(known, *join({share(*self)}));
  else if (self->fenced)
    merge(known, *self->fenced);
  ++machine->progress;
}

static void notice(const void* p, unsigned bytes, Order order) {
  for (unsigned i = 0; i < bytes; i += 4) {
    const auto found = machine->released.find(reinterpret_cast<uintptr_t>(p) + i);
    if (found == machine->released.end()) continue;
    if (order & kAcquire)
      learn_more(*self, found->second);
    else
      merge(self->seen, found->second);
  }
}

void load(void* to, const void* p, unsigned bytes, Order order) {
  yield(CALLER);
  access(p, bytes, kAtomicRead, CALLER);
  notice(p, bytes, order);
  memcpy(to, p, bytes);
}

void store(void* p, const void* from, unsigned bytes, Order order) {
  access(p, bytes, kAtomicWrite, CALLER);
  publish(p, order);
  memcpy(p, from, bytes);
}

void atomic(void* p, unsigned bytes, void (*apply)(void*, const void*), const void* operand, void* before,
            Order order) {
  access(p, bytes, kAtomicUpdate, CALLER);
  notice(p, bytes, order);
  const uint64_t progress = machine->progress;
  memcpy(before, p, bytes);
  apply(p, operand);
  publish(p, order);
  // one that changes nothing looks for a change
  if (memcmp(before, p, bytes) == 0) {
    machine->progress = progress;
    yield(CALLER);
  }
}

void volatile_access(const void* p, unsigned bytes, bool write, const void* at) {
  if (!self) return;
  if (!write) yield(at);
  access(p, bytes, write ? kAtomicWrite : kAtomicRead, at);
  write ? publish(p, kRelaxed) : notice(p, bytes, kRelaxed);
}

void fence() {
  learn_more(*self, self->seen);
  self->seen.clear();
  self->fenced = join({share(*self)});
}

// --- the launch

static void entry() {
  kernel_body(kernel_context);
  Thread& t = *self;
  Block& block = *t.block;
  t.state = Thread::kDone;
  ++machine->progress;
  --block.live;
  if (block.barriers[0].arrived) {
    fail(block.barriers[0].waiting[0]->at, "has returned while other threads wait at __syncthreads()");
  }
  t.warp->live &= ~(1u << t.number % 32);
  for (size_t i = 0; i < t.warp->open.size(); ++i) {
    const Meeting& meeting = t.warp->open[i];
    if (meeting.arrived == (meeting.mask & t.warp->live)) complete(*t.warp, i--);
  }
  try_release(*block.cluster);
  to_scheduler();
}

static char* take_stack() {
  if (free_stacks.empty()) {
    constexpr size_t kMany = 64;
    char* all = static_cast<char*>(
        mmap(nullptr, kMany * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t i = 0; i < kMany; ++i) free_stacks.push_back(all + i * kStack);
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

Block::~Block() {
  for (const Thread& t : threads) free_stacks.push_back(t.stack);
  free_slot(this);
}

static void start(Block& block, Thread& t, unsigned number) {
  t = Thread{};
  t.stack = take_stack();
  t.block = &block;
  t.warp = &block.warps[number / 32];
  t.number = number;
  t.index = block.rank * (machine->threads + 1) + number;
  t.clock = 1;
  memcpy(t.stack, &kCanary, sizeof kCanary);
  void** sp = reinterpret_cast<void**>(t.stack + kStack - 64);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  t.sp = sp;
}

static std::unique_ptr<Cluster> admit(uint32_t number) {
  const dim3 grid = machine->grid.grid, shape = machine->grid.cluster;
  auto cluster = std::make_unique<Cluster>();
  cluster->number = number;
  const unsigned per_x = grid.x / shape.x, per_y = grid.y / shape.y;
  const uint3 origin = {number % per_x * shape.x, number / per_x % per_y * shape.y, number / per_x / per_y * shape.z};
  for (unsigned rank = 0; rank < machine->cluster_blocks; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->rank = rank;
    block->live = machine->threads;
    block->copy_clock = 1;
    block->index = {origin.x + rank % shape.x, origin.y + rank / shape.x % shape.y,
                    origin.z + rank / shape.x / shape.y};
    take_slot(block.get());
    block->threads.resize(machine->threads);
    block->warps.resize((machine->threads + 31) / 32);
    for (unsigned t = 0; t < machine->threads; ++t) {
      start(*block, block->threads[t], t);
      block->warps[t / 32].block = block.get();
      block->warps[t / 32].live |= 1u << t % 32;
      block->warps[t / 32].lanes.push_back(&block->threads[t]);
    }
    cluster->blocks.push_back(std::move(block));
  }
  ++machine->progress;
  return cluster;
}

static void resume(Thread& t) {
  self = &t;
  emu_switch(&scheduler, t.sp);
  self = nullptr;
  if (!failure.empty()) throw Failure{failure};
  if (memcmp(t.stack, &kCanary, sizeof kCanary)) {
    self = &t;
    fail(t.at, "needs more than the %zu bytes of an emulated stack", kStack);
  }
}

// every thread of a warp that can run, from a lane and in a direction by chance
static bool run_lanes(Warp& warp) {
  const size_t n = warp.lanes.size(), from = dice() % n, step = dice() % 2 ? 1 : n - 1;
  bool ran = false;
  for (size_t i = 0; i < n; ++i) {
    Thread& t = *warp.lanes[(from + i * step) % n];
    if (t.state != Thread::kReady) continue;
    resume(t);
    ran = true;
  }
  return ran;
}

[[noreturn]] static void deadlock(const std::vector<std::unique_ptr<Cluster>>& resident) {
  std::map<std::pair<std::string, const void*>, unsigned> waiting;
  const void* at = nullptr;
  for (const auto& cluster : resident) {
    for (const auto& block : cluster->blocks) {
      for (const Thread& t : block->threads) {
        if (t.state == Thread::kDone) continue;
        ++waiting[{t.waits_for, t.at}];
        if (!at) at = t.at;
      }
    }
  }
  std::string text;
  for (const auto& [place, count] : waiting) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " for " + place.first + " at " + line_of(place.second);
  }
  fail(at, "deadlock: threads wait %s", text.c_str());
}

// some resident clusters that stand still while the others get on; others from time to time
static std::set<const Cluster*> choose_late(const std::vector<std::unique_ptr<Cluster>>& resident) {
  std::set<const Cluster*> late;
  const size_t most = std::min<size_t>(late_blocks, resident.empty() ? 0 : resident.size() - 1);
  while (late.size() < most) late.insert(resident[dice() % resident.size()].get());
  return late;
}

static void run_all() {
  std::vector<uint32_t> queue(machine->clusters);
  for (uint32_t i = 0; i < machine->clusters; ++i) queue[i] = machine->clusters - 1 - i;
  // blocks may start in any order; mostly they start in theirs
  for (size_t i = queue.size(); i > 1; --i) {
    if (dice() % 4 == 0) std::swap(queue[i - 1], queue[dice() % i]);
  }
  std::vector<std::unique_ptr<Cluster>> resident;
  std::set<const Cluster*> late;
  for (int idle = 0, rounds = 0;; ++rounds) {
    while (!queue.empty() && (resident.empty() || (resident.size() + 1) * machine->cluster_blocks <= kWindow)) {
      resident.push_back(admit(queue.back()));
      queue.pop_back();
    }
    if (resident.empty()) return;
    // when nobody else can get on, the late ones must
    if (rounds % 64 == 0) late = choose_late(resident);
    if (idle) late.clear();
    std::vector<Warp*> order;
    for (const auto& cluster : resident) {
      if (late.count(cluster.get())) continue;
      for (const auto& block : cluster->blocks) {
        for (Warp& warp : block->warps) order.push_back(&warp);
      }
    }
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[dice() % i]);
    const uint64_t before = machine->progress;
    for (Warp* warp : order) {
      for (unsigned passes = 1u << dice() % 8; passes && run_lanes(*warp); --passes) {
      }
      if (!machine->bulks.empty() && dice() % 8 == 0) complete_bulk(dice() % machine->bulks.size());
    }
    for (size_t i = resident.size(); i-- > 0;) {
      if (live_threads(*resident[i]) == 0) resident.erase(resident.begin() + i);
    }
    if (machine->progress != before) {
      idle = 0;
    } else if (!machine->bulks.empty()) {
      complete_bulk(dice() % machine->bulks.size());
    } else if (!queue.empty() && slots_left(machine->cluster_blocks)) {
      resident.push_back(admit(queue.back()));
      queue.pop_back();
    } else if (++idle > 20) {
      deadlock(resident);
    }
  }
}

static std::string checked(const Grid& g) {
  const unsigned threads = g.block.x * g.block.y * g.block.z;
  if (!threads || threads > 1024) return "a block must have 1 to 1024 threads, got " + std::to_string(threads);
  if (!g.grid.x || !g.grid.y || !g.grid.z || g.grid.y > 65535 || g.grid.z > 65535) return "invalid grid";
  if (g.grid.x % g.cluster.x || g.grid.y % g.cluster.y || g.grid.z % g.cluster.z) return "clusters must fill the grid";
  if (g.cluster.x * g.cluster.y * g.cluster.z > 16) return "a cluster must have at most 16 blocks";
  if (g.shared > g.max_shared || g.shared > 227 * 1024) return "dynamic shared memory is too large";
  return "";
}

const char* run(const Grid& grid, void (*body)(void*), void* context) {
  static std::mutex one_at_a_time;
  static std::string message;
  static uint32_t launches;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  Machine m{};
  m.grid = grid;
  m.threads = grid.block.x * grid.block.y * grid.block.z;
  m.cluster_blocks = grid.cluster.x * grid.cluster.y * grid.cluster.z;
  m.clusters = grid.grid.x * grid.grid.y * grid.grid.z / m.cluster_blocks;
  m.number = ++launches;
  message = checked(grid);
  if (!message.empty()) return message.c_str();
  emu_block_dim = grid.block;
  emu_grid_dim = grid.grid;
  machine = &m;
  kernel_body = body;
  kernel_context = context;
  failure.clear();
  try {
    run_all();
  } catch (const Failure& f) {
    message = f.text;
  }
  machine = nullptr;
  self = nullptr;
  return message.empty() ? nullptr : message.c_str();
}

extern "C" void emu_late(unsigned blocks) { late_blocks = blocks; }
extern "C" void emu_seed(uint64_t seed) { random_state = seed * 0x9e3779b97f4a7c15u + 1; }

}  // namespace emu
