// What memory is whose: allocations, shared memory of blocks, who wrote and read each byte last, copies under way.
#include <dlfcn.h>
#include <link.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <mutex>

#include "runtime.h"

#define CALLER __builtin_return_address(0)

namespace emu {
namespace {

constexpr uint32_t kPending = 0xffffffff;  // the clock of a copy that is under way
constexpr unsigned kSlots = 64;
constexpr size_t kDynamic = 228 * 1024;
constexpr size_t kGlobalCells = 1 << 21;

struct Trace {
  uint32_t thread, clock, at;  // at: from the object's base; clock 0: nobody
  uint8_t atomic, bytes;       // bytes: a bit each
};

// two bytes of memory
struct Cell {
  uintptr_t key;
  uint32_t age;
  uint8_t written;
  Trace write, reads[2];  // the last reader, and the last one of another warp
};

struct Region {
  uintptr_t base;
  size_t bytes;
  std::string name;
  std::vector<uint32_t> writers;  // of an output: where each byte was written, 0: nowhere
  const void* kernel;             // that wrote last
};

struct Variable {
  size_t offset, bytes;
  std::string name;
};

struct Object {
  uintptr_t base;
  std::vector<std::pair<uintptr_t, uintptr_t>> segments;
  size_t shared_bytes = 0;  // its thread-local storage: the shared variables of all kernels
};

std::map<uintptr_t, Region> regions;
std::mutex region_lock;  // tensors are made by any thread
std::atomic<uint64_t> region_version;
std::vector<Variable> variables;  // by offset

template <typename T>
T* reserve(size_t count) {
  void* p =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(p);
}

Object find_object() {
  Object o;
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&run), &info);
  o.base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        Object& o = *static_cast<Object*>(out);
        if (info->dlpi_addr != o.base) return 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const uintptr_t from = o.base + segment.p_vaddr;
          if (segment.p_type == PT_LOAD) o.segments.emplace_back(from, from + segment.p_memsz);
          if (segment.p_type == PT_TLS) o.shared_bytes = segment.p_memsz;
        }
        return 1;
      },
      &o);
  return o;
}
const Object object = find_object();

// the shared memory of blocks, a slot each: variables, then dynamic memory
const size_t kDynamicAt = (object.shared_bytes + 127) / 128 * 128;
const size_t kSlotBytes = (kDynamicAt + kDynamic + 4095) / 4096 * 4096;
char* const slots = reserve<char>(kSlots * kSlotBytes);
Cell* const slot_cells = reserve<Cell>(kSlots * kSlotBytes / 2);
Cell* const global_cells = reserve<Cell>(kGlobalCells);
Block* owners[kSlots];
uint32_t ages;

size_t in_slots(uintptr_t p) { return p - reinterpret_cast<uintptr_t>(slots); }
bool is_shared(uintptr_t p) { return in_slots(p) < kSlots * kSlotBytes; }

uint32_t offset_of(const void* at) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at) - object.base); }
const void* at_of(uint32_t offset) { return reinterpret_cast<const void*>(object.base + offset); }

const char* verb(Access kind) {
  return kind == kRead || kind == kAtomicRead ? "reads" : kind == kAtomicUpdate ? "updates" : "writes";
}

const Variable* variable_at(size_t offset, size_t bytes) {
  static const Variable* last;
  if (last && last >= variables.data() && last < variables.data() + variables.size() && offset >= last->offset &&
      offset + bytes <= last->offset + last->bytes)
    return last;
  auto after = std::upper_bound(variables.begin(), variables.end(), offset,
                                [](size_t at, const Variable& v) { return at < v.offset; });
  if (after == variables.begin()) return nullptr;
  last = &*--after;
  return offset + bytes <= last->offset + last->bytes ? last : nullptr;
}

std::string shared_name(size_t offset) {
  if (offset >= kDynamicAt) return "dynamic shared memory + " + std::to_string(offset - kDynamicAt);
  const Variable* nearest = nullptr;
  for (const Variable& v : variables) {
    if (v.offset <= offset) nearest = &v;
  }
  return nearest ? "shared " + nearest->name + " + " + std::to_string(offset - nearest->offset) : "shared memory";
}

std::string name_of(uintptr_t p) {
  if (is_shared(p)) return shared_name(in_slots(p) % kSlotBytes);
  auto after = regions.upper_bound(p);
  if (after == regions.begin()) return "an address below every allocation";
  --after;
  const size_t offset = p - after->first;
  std::string text = after->second.name + " + " + std::to_string(offset);
  if (offset >= after->second.bytes)
    text += ", " + std::to_string(offset - after->second.bytes) + " behind the end of its " +
            std::to_string(after->second.bytes) + " bytes";
  return text;
}

uint32_t number_of(const Thread& t) { return t.block->cluster->number * machine->cluster_threads() + t.index; }

// an access of the running thread
struct Seen {
  Access kind;
  const void* at;
  bool shared, reads, writes;
  uint32_t first, threads;  // the numbers of the cluster's threads
  Trace mine;

  Seen(Access kind, const void* at, bool shared)
      : kind(kind),
        at(at),
        shared(shared),
        reads(kind != kWrite && kind != kAtomicWrite),
        writes(kind != kRead && kind != kAtomicRead),
        threads(machine->cluster_threads()) {
    first = self->block->cluster->number * threads;
    mine = {first + self->index, self->clock, offset_of(at), kind >= kAtomicRead, 3};
  }
};

bool before_me(const Trace& trace, const Seen& seen) {
  if (trace.clock == kPending) return false;
  if (trace.thread == seen.mine.thread) return true;
  const uint32_t index = trace.thread - seen.first;
  if (index < seen.threads) return self->own && (*self->own)[index] >= trace.clock;
  if (!self->known) return false;
  const auto found = self->known->find(trace.thread / seen.threads);
  return found != self->known->end() && (*found->second)[trace.thread % seen.threads] >= trace.clock;
}

bool conflict(const Trace& trace, unsigned bytes, const Seen& seen) {
  return trace.clock && (trace.bytes & bytes) && !(trace.atomic && seen.mine.atomic) && !before_me(trace, seen);
}

[[noreturn]] void fail_race(const Trace& trace, const char* did, uintptr_t p, const Seen& seen) {
  const std::string other = thread_name(trace.thread / seen.threads, trace.thread % seen.threads);
  const std::string line = line_of(at_of(trace.at)), name = name_of(p);
  if (trace.clock == kPending) {
    fail(seen.at, "%s %s, which a copy of %s (%s) is still filling: nothing waited for it", verb(seen.kind),
         name.c_str(), other.c_str(), line.c_str());
  }
  fail(seen.at, "race: %s %s, which %s %s at %s, with no barrier between them", verb(seen.kind), name.c_str(),
       other.c_str(), did, line.c_str());
}

void touch(Cell& cell, uintptr_t p, uint8_t bytes, const Seen& seen) {
  if (seen.shared && seen.reads && (cell.written & bytes) != bytes) {
    fail(seen.at, "%s %s, which no thread of the block wrote", verb(seen.kind), name_of(p).c_str());
  }
  if (conflict(cell.write, bytes, seen)) fail_race(cell.write, "wrote", p, seen);
  if (!seen.writes) {
    // a warp's numbers are neighbours: another 32 of them is mostly another warp
    if ((cell.reads[0].thread ^ seen.mine.thread) >> 5) cell.reads[1] = cell.reads[0];
    cell.reads[0] = seen.mine;
    cell.reads[0].bytes = bytes;
    return;
  }
  for (Trace& read : cell.reads) {
    if (conflict(read, bytes, seen)) fail_race(read, "read", p, seen);
    if (!(read.bytes & ~bytes)) read.clock = 0;
  }
  cell.write = seen.mine;
  cell.write.bytes = bytes;
  cell.written |= bytes;
}

// body(cell, address, bytes) for every two bytes; what an earlier launch or block left in a cell is forgotten
template <typename Body>
void for_cells(uintptr_t p, size_t size, Body body) {
  const bool shared = is_shared(p);
  const uint32_t age = shared ? owners[in_slots(p) / kSlotBytes]->age : machine->number;
  for (const uintptr_t end = p + size; p < end;) {
    Cell& cell = shared ? slot_cells[in_slots(p) / 2] : global_cells[(p >> 1) % kGlobalCells];
    if (cell.age != age || cell.key != p >> 1) cell = Cell{p >> 1, age, 0, {}, {}};
    const uint8_t bytes = p & 1 ? 2 : end - p == 1 ? 1 : 3;
    body(cell, p, bytes);
    p += 2 - (p & 1);
  }
}

// the allocation, or null for the object's own variables
Region* check_global(uintptr_t p, size_t bytes, Access kind, const void* at) {
  // a line of a kernel mostly stays in one tensor
  static struct {
    const void* at;
    uint64_t version;
    Region* region;
  } last[1024];
  auto inside = [&](const Region& r) { return p >= r.base && p + bytes <= r.base + r.bytes; };
  auto& hit = last[reinterpret_cast<uintptr_t>(at) % 1021];
  if (hit.at == at && hit.version == region_version && inside(*hit.region)) return hit.region;
  {
    // never held by fail(), which does not return
    const std::lock_guard<std::mutex> guard(region_lock);
    auto after = regions.upper_bound(p);
    if (after != regions.begin() && inside((--after)->second)) {
      hit = {at, region_version, &after->second};
      return hit.region;
    }
  }
  for (const auto& [from, to] : object.segments) {
    if (p >= from && p + bytes <= to) return nullptr;
  }
  fail(at, "%s %zu bytes outside of every allocation: %s", verb(kind), bytes, name_of(p).c_str());
}

void check_shared(uintptr_t p, size_t bytes, Access kind, const void* at) {
  const Block* owner = owners[in_slots(p) / kSlotBytes];
  const size_t offset = in_slots(p) % kSlotBytes;
  if (!owner || owner->cluster != self->block->cluster) fail(at, "%s shared memory of another cluster", verb(kind));
  if (owner->live == 0) fail(at, "%s shared memory of a block that has returned", verb(kind));
  const bool inside = offset >= kDynamicAt ? offset + bytes <= kDynamicAt + machine->grid.shared
                                           : variables.empty() || variable_at(offset, bytes);
  if (inside) return;
  fail(at, "%s %zu bytes outside of every shared variable: %s (%zu bytes of dynamic shared memory)", verb(kind), bytes,
       shared_name(offset).c_str(), machine->grid.shared);
}

}  // namespace

void access(const void* address, size_t size, Access kind, const void* at) {
  if (!self || !size) return;
  const uintptr_t p = reinterpret_cast<uintptr_t>(address);
  if (p - reinterpret_cast<uintptr_t>(self->stack) < kStack) return;
  const bool shared = is_shared(p);
  Region* region = nullptr;
  if (shared)
    check_shared(p, size, kind, at);
  else
    region = check_global(p, size, kind, at);
  const Seen seen(kind, at, shared);
  for_cells(p, size, [&](Cell& cell, uintptr_t q, uint8_t bytes) { touch(cell, q, bytes, seen); });
  if (!seen.writes) return;
  ++machine->progress;
  if (!region || region->writers.empty()) return;
  region->kernel = machine->grid.kernel;
  std::fill_n(region->writers.begin() + static_cast<ptrdiff_t>(p - region->base), size, seen.mine.at);
}

void access_pending(void* p, size_t bytes, const void* at) {
  access(p, bytes, kWrite, at);
  for_cells(reinterpret_cast<uintptr_t>(p), bytes,
            [](Cell& cell, uintptr_t, unsigned) { cell.write.clock = kPending; });
}

void access_complete(void* p, size_t bytes, uint32_t number, uint32_t clock, const void* at) {
  for_cells(reinterpret_cast<uintptr_t>(p), bytes, [&](Cell& cell, uintptr_t, unsigned mask) {
    cell.write = {number, clock, offset_of(at), 0, static_cast<uint8_t>(mask)};
  });
  ++machine->progress;
}

// --- shared memory

bool slots_left(unsigned blocks) { return std::count(owners, owners + kSlots, nullptr) >= static_cast<long>(blocks); }

void take_slot(Block* block) {
  block->slot = std::find(owners, owners + kSlots, nullptr) - owners;
  block->age = ++ages;
  owners[block->slot] = block;
}

void free_slot(Block* block) { owners[block->slot] = nullptr; }

static char* slot_of(const Block& block) { return slots + block.slot * kSlotBytes; }

void* dynamic_shared() { return slot_of(*self->block) + kDynamicAt; }

void* cluster_map(const void* shared, unsigned rank) {
  const size_t offset = static_cast<const char*>(shared) - slot_of(*self->block);
  if (offset >= kSlotBytes) fail(CALLER, "maps an address that is not its own shared memory into the cluster");
  if (rank >= machine->cluster_blocks) fail(CALLER, "names block %u of a cluster of %u", rank, machine->cluster_blocks);
  return slot_of(*self->block->cluster->blocks[rank]) + offset;
}

// --- copies

static void check_aligned(const void* p, unsigned bytes, const void* at) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    fail(at, "misaligned: %s is not on %u bytes", name_of(reinterpret_cast<uintptr_t>(p)).c_str(), bytes);
  }
}

void cp_async(void* shared, const void* global, unsigned bytes, bool ok) {
  check_aligned(shared, bytes, CALLER);
  if (ok) check_aligned(global, bytes, CALLER);
  if (ok) access(global, bytes, kRead, CALLER);
  access_pending(shared, bytes, CALLER);
  self->copies.push_back({shared, global, bytes, ok});
  self->at = CALLER;
}

void cp_async_commit() {
  self->groups.push_back(std::move(self->copies));
  self->copies.clear();
}

void cp_async_wait(unsigned groups) {
  for (; self->groups.size() > groups; self->groups.pop_front()) {
    for (const Copy& copy : self->groups.front()) {
      copy.ok ? memcpy(copy.to, copy.from, copy.bytes) : memset(copy.to, 0, copy.bytes);
      access_complete(copy.to, copy.bytes, number_of(*self), self->clock, CALLER);
    }
  }
}

static Mbarrier& mbarrier_at(uint64_t* barrier, const void* at) {
  access(barrier, sizeof *barrier, kAtomicUpdate, at);
  const auto found = machine->mbarriers.find(reinterpret_cast<uintptr_t>(barrier));
  if (found == machine->mbarriers.end()) fail(at, "uses an mbarrier that was not initialised");
  return found->second;
}

static void mbarrier_advance(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.complete = join(barrier.shares);
  barrier.shares = {{barrier.complete, barrier.shares[0].cluster, 0, 0}};
  barrier.pending = barrier.count;
  ++barrier.phase;
  ++machine->progress;
}

void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  check_aligned(barrier, 8, CALLER);
  access(barrier, sizeof *barrier, kWrite, CALLER);
  machine->mbarriers[reinterpret_cast<uintptr_t>(barrier)] = {arrivals, arrivals, 0, 0, {}, {}};
}

void mbarrier_arrive(uint64_t* p, int bytes) {
  Mbarrier& barrier = mbarrier_at(p, CALLER);
  if (!barrier.pending) fail(CALLER, "arrives at an mbarrier more often than its %u times a phase", barrier.count);
  barrier.bytes += bytes;
  --barrier.pending;
  barrier.shares.push_back(share(*self));
  mbarrier_advance(barrier);
}

bool mbarrier_test(uint64_t* p, unsigned parity) {
  Mbarrier& barrier = mbarrier_at(p, CALLER);
  if ((barrier.phase & 1) == parity) return yield(CALLER), false;
  if (barrier.complete)
    learn(*self, join({{self->known, self->block->cluster->number, self->index, self->clock},
                       {barrier.complete, self->block->cluster->number, self->index, 0}}));
  return true;
}

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  check_aligned(shared, 16, CALLER);
  check_aligned(global, 16, CALLER);
  if (bytes % 16) fail(CALLER, "copies %u bytes, not a multiple of 16", bytes);
  mbarrier_at(barrier, CALLER);
  access(global, bytes, kRead, CALLER);
  access_pending(shared, bytes, CALLER);
  machine->bulks.push_back({{shared, global, bytes, true}, barrier, self->block, share(*self), CALLER});
}

void complete_bulk(size_t which) {
  const Bulk bulk = machine->bulks[which];
  machine->bulks.erase(machine->bulks.begin() + which);
  const uint32_t index = bulk.block->rank * (machine->threads + 1) + machine->threads;
  const uint32_t cluster = bulk.block->cluster->number, clock = bulk.block->copy_clock++;
  memcpy(bulk.copy.to, bulk.copy.from, bulk.copy.bytes);
  access_complete(bulk.copy.to, bulk.copy.bytes, cluster * machine->cluster_threads() + index, clock, bulk.at);
  Mbarrier& barrier = machine->mbarriers[reinterpret_cast<uintptr_t>(bulk.barrier)];
  barrier.bytes -= bulk.copy.bytes;
  barrier.shares.push_back(bulk.issuer);
  barrier.shares.push_back({bulk.issuer.known, cluster, index, clock});
  mbarrier_advance(barrier);
}

// --- what tests say about memory

extern "C" {

void emu_region(void* base, size_t bytes, const char* name, int output) {
  const std::lock_guard<std::mutex> guard(region_lock);
  const uintptr_t p = reinterpret_cast<uintptr_t>(base);
  // what overlaps it has been freed
  auto old = regions.lower_bound(p);
  if (old != regions.begin() && std::prev(old)->first + std::prev(old)->second.bytes > p) --old;
  while (old != regions.end() && old->first < p + bytes) old = regions.erase(old);
  regions[p] = {p, bytes, name, std::vector<uint32_t>(output ? bytes : 0), nullptr};
  ++region_version;
}

void emu_forget(void* base) {
  const std::lock_guard<std::mutex> guard(region_lock);
  regions.erase(reinterpret_cast<uintptr_t>(base));
  ++region_version;
}

// what no launch wrote of an output, or null
const char* emu_unwritten(void* base) {
  static std::string text;
  const Region& region = regions.at(reinterpret_cast<uintptr_t>(base));
  const std::vector<uint32_t>& writers = region.writers;
  const auto from = std::find(writers.begin(), writers.end(), 0u);
  if (from == writers.end()) return nullptr;
  const auto to = std::find_if(from, writers.end(), [](uint32_t at) { return at != 0; });
  text = region.kernel ? kernel_name(region.kernel) + ": " : "no kernel wrote " + region.name;
  const auto nearest = from == writers.begin() ? to : from - 1;
  if (nearest != writers.end()) {
    text += line_of(at_of(*nearest)) + ": the stores end beside bytes " + std::to_string(from - writers.begin()) +
            " to " + std::to_string(to - writers.begin() - 1) + " of " + region.name + ", which nothing wrote";
  }
  return text.c_str();
}

void emu_variable(size_t offset, size_t bytes, const char* name) {
  const Variable variable{offset, bytes, name};
  variables.insert(std::upper_bound(variables.begin(), variables.end(), variable,
                                    [](const Variable& a, const Variable& b) { return a.offset < b.offset; }),
                   variable);
}

// thread-local storage of the kernels: shared memory of the block (linked with --wrap=__tls_get_addr)
struct TlsIndex {
  unsigned long module, offset;
};
void* __wrap___tls_get_addr(const TlsIndex* variable) {
  if (!self) abort();
  return slot_of(*self->block) + variable->offset;
}

// --- the compiler's hooks (-fsanitize=thread)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, kRead, CALLER); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, kWrite, CALLER); }
#define HOOKS(BYTES)                                                                                \
  void __tsan_read##BYTES(void* p) {                                                                \
    if (self && BYTES > 1) check_aligned(p, BYTES, CALLER);                                         \
    access(p, BYTES, kRead, CALLER);                                                                \
  }                                                                                                 \
  void __tsan_write##BYTES(void* p) {                                                               \
    if (self && BYTES > 1) check_aligned(p, BYTES, CALLER);                                         \
    access(p, BYTES, kWrite, CALLER);                                                               \
  }                                                                                                 \
  void __tsan_unaligned_read##BYTES(void* p) { access(p, BYTES, kRead, CALLER); }                   \
  void __tsan_unaligned_write##BYTES(void* p) { access(p, BYTES, kWrite, CALLER); }                 \
  void __tsan_volatile_read##BYTES(void* p) { volatile_access(p, BYTES, false, CALLER); }           \
  void __tsan_volatile_write##BYTES(void* p) { volatile_access(p, BYTES, true, CALLER); }           \
  void __tsan_unaligned_volatile_read##BYTES(void* p) { volatile_access(p, BYTES, false, CALLER); } \
  void __tsan_unaligned_volatile_write##BYTES(void* p) { volatile_access(p, BYTES, true, CALLER); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

}  // extern "C"
}  // namespace emu
