// The state of a launch, shared by the parts of the runtime.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "include/emulator.h"

namespace emu {

constexpr size_t kStack = 64 * 1024;

// Happens-before by vector clocks: a thread's clock counts what it published (barriers, releases); what a thread knows
// is the clock of every other thread up to which that one's accesses precede its own. A cluster's threads are numbered
// together, block after block, each block with one more for its bulk copies.
typedef std::vector<uint32_t> Clocks;
typedef std::map<uint32_t, std::shared_ptr<const Clocks>> Known;  // cluster -> clocks of its threads
typedef std::shared_ptr<const Known> KnownPtr;

// a thread at one moment: what it knew, and its own clock
struct Share {
  KnownPtr known;
  uint32_t cluster, index, clock;
};
KnownPtr join(const std::vector<Share>& shares);

struct Block;
struct Warp;

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  bool ok;
};

struct Thread {
  void* sp;
  char* stack;
  Block* block;
  Warp* warp;
  unsigned number;  // in the block
  enum State { kReady, kWaiting, kDone } state;
  const char* waits_for;
  const void* at;  // the caller it waits in
  uint32_t index, clock, polls;
  KnownPtr known;
  const Clocks* own;  // of its cluster, within known
  KnownPtr fenced;    // what a relaxed store publishes: all before the last fence
  Known seen;         // what relaxed loads saw, known after the next fence
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
  int vote;
  unsigned phase;      // of the cluster's barrier when the thread arrived there
  KnownPtr arrived_with;
};

struct Meeting;
typedef void (*Finish)(Meeting&);
// lanes of one mask that wait for each other
struct Meeting {
  const char* what;
  unsigned mask, arrived;
  void* payload[32];
  const void* at[32];
  Finish finish;
};

struct Warp {
  Block* block;
  std::vector<Thread*> lanes;
  unsigned live;
  std::vector<Meeting> open;
};

struct Barrier {
  unsigned expected = 0, arrived = 0;
  int votes = 0;
  std::vector<Share> shares;
  std::vector<Thread*> waiting;
};

struct Cluster;
struct Block {
  Cluster* cluster;
  unsigned rank, slot, live, copy_clock;
  uint32_t age;  // distinguishes the blocks that used a slot of shared memory
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<int, Barrier> barriers;
  ~Block();
};

struct Cluster {
  uint32_t number;
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  KnownPtr together;  // of the last phase of the barrier
  unsigned phase = 0;
};

struct Mbarrier {
  unsigned count, pending, phase;
  int64_t bytes;
  std::vector<Share> shares;
  KnownPtr complete;
};

struct Bulk {
  Copy copy;
  uint64_t* barrier;
  Block* block;
  Share issuer;
  const void* at;
};

// one launch
struct Machine {
  Grid grid;
  unsigned threads, cluster_blocks, clusters;
  uint32_t number;  // of the launch
  std::map<uintptr_t, Known> released;
  std::map<uintptr_t, Mbarrier> mbarriers;
  std::vector<Bulk> bulks;
  uint64_t progress = 0;

  uint32_t cluster_threads() const { return cluster_blocks * (threads + 1); }
};

extern Machine* machine;
extern Thread* self;  // the thread that runs, or null

struct Failure {
  std::string text;
};
// kernel, line of `at`, the message, block and thread
std::string kernel_name(const void* kernel);
[[noreturn]] void fail(const void* at, const char* format, ...) __attribute__((format(printf, 2, 3)));
std::string line_of(const void* at);
std::string thread_name(uint32_t cluster, uint32_t index);
uint32_t dice();

Share share(Thread& thread);  // and a new clock
void learn(Thread& thread, const KnownPtr& known);
void meet(const char* what, unsigned mask, void* payload, Finish finish, const void* at);
void volatile_access(const void* p, unsigned bytes, bool write, const void* at);
void wait(const char* what, const void* at);  // until somebody makes the thread ready
void yield(const void* at);

// --- memory.cpp
enum Access { kRead, kWrite, kAtomicRead, kAtomicWrite, kAtomicUpdate };
void access(const void* p, size_t bytes, Access kind, const void* at);
// by a copy that is under way, and the same when it is complete (seen as the access of thread `index`)
void access_pending(void* p, size_t bytes, const void* at);
void access_complete(void* p, size_t bytes, uint32_t index, uint32_t clock, const void* at);
// a slot is the shared memory of one block
bool slots_left(unsigned blocks);
void take_slot(Block* block);
void free_slot(Block* block);
void complete_bulk(size_t which);

}  // namespace emu
