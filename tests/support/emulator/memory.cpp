// What memory is whose: allocations, shared memory of blocks, who wrote and read each byte last, copies under way.
#include <dlfcn.h>
#include <link.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

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
std::vector<Variable> variables;  // by offset
Region* last_region;

template <typename T>
T* reserve(size_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(p);
}

const Object& object() {
  static const Object found = [] {
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
  }();
  return found;
}

// the shared memory of blocks: variables, then dynamic memory
struct Slots {
  size_t dynamic = (object().shared_bytes + 127) / 128 * 128;
  size_t bytes = (dynamic + kDynamic + 4095) / 4096 * 4096;
  char* memory = reserve<char>(kSlots * bytes);
  Cell* cells = reserve<Cell>(kSlots * bytes / 2);
  Block* owner[kSlots] = {};
  uint32_t ages = 0;
};
Slots& slots() {
  static Slots all;
  return all;
}

Cell* global_cells() {
  static Cell* const cells = reserve<Cell>(kGlobalCells);
  return cells;
}

uint32_t offset_of(const void* at) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at) - object().base); }
const void* at_of(uint32_t offset) { return reinterpret_cast<const void*>(object().base + offset); }

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
  const size_t dynamic = slots().dynamic;
  if (offset >= dynamic) return "dynamic shared memory + " + std::to_string(offset - dynamic);
  const Variable* nearest = nullptr;
  for (const Variable& v : variables) {
    if (v.offset <= offset) nearest = &v;
  }
  return nearest ? "shared " + nearest->name + " + " + std::to_string(offset - nearest->offset) : "shared memory";
}

std::string name_of(uintptr_t p) {
  const size_t in_slots = p - reinterpret_cast<uintptr_t>(slots().memory);
  if (in_slots < kSlots * slots().bytes) return shared_name(in_slots % slots().bytes);
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

uint32_t my_number(const Thread& t) { return t.block->cluster->number * machine->cluster_threads() + t.index; }

bool before_me(const Trace& trace) {
  if (trace.clock == kPending) return false;
  if (trace.thread == my_number(*self)) return true;
  const uint32_t each = machine->cluster_threads(), cluster = trace.thread / each, index = trace.thread % each;
  if (cluster == self->block->cluster->number) return self->own && (*self->own)[index] >= trace.clock;
  if (!self->known) return false;
  const auto found = self->known->find(cluster);
  return found != self->known->end() && (*found->second)[index] >= trace.clock;
}

void check_order(const Trace& trace, const char* did, uintptr_t p, unsigned bytes, Access kind, const void* at) {
  const bool atomic = kind >= kAtomicRead && trace.atomic;
  if (trace.clock == 0 || !(trace.bytes & bytes) || atomic || before_me(trace)) return;
  const uint32_t each = machine->cluster_threads();
  const std::string other = thread_name(trace.thread / each, trace.thread % each), line = line_of(at_of(trace.at));
  if (trace.clock == kPending) {
    fail(at, "%s %s, which a copy of %s (%s) is still filling: nothing waited for it", verb(kind), name_of(p).c_str(),
         other.c_str(), line.c_str());
  }
  fail(at, "race: %s %s, which %s %s at %s, with no barrier between them", verb(kind), name_of(p).c_str(),
       other.c_str(), did, line.c_str());
}

void touch(Cell& cell, uintptr_t p, unsigned bytes, Access kind, const void* at, bool shared) {
  const bool reads = kind != kWrite && kind != kAtomicWrite, writes = kind != kRead && kind != kAtomicRead;
  if (shared && reads && (cell.written & bytes) != bytes) {
    fail(at, "%s %s, which no thread of the block wrote", verb(kind), name_of(p).c_str());
  }
  check_order(cell.write, "wrote", p, bytes, kind, at);
  const uint8_t atomic = kind >= kAtomicRead;
  const Trace mine{my_number(*self), self->clock, offset_of(at), atomic, static_cast<uint8_t>(bytes)};
  if (!writes) {
    Trace& last = cell.reads[0];
    if (last.thread / 32 != mine.thread / 32) cell.reads[1] = last;
    last = mine;
    return;
  }
  for (Trace& read : cell.reads) {
    check_order(read, "read", p, bytes, kind, at);
    if (!(read.bytes & ~bytes)) read.clock = 0;
  }
  cell.write = mine;
  cell.written |= bytes;
}

Cell& fresh(Cell& cell, uintptr_t key, uint32_t age) {
  if (cell.key != key || cell.age != age) cell = Cell{key, age, 0, {}, {}};
  return cell;
}

Cell& cell_of(uintptr_t p) {
  const size_t in_slots = p - reinterpret_cast<uintptr_t>(slots().memory);
  if (in_slots < kSlots * slots().bytes) {
    return fresh(slots().cells[in_slots / 2], p >> 1, slots().owner[in_slots / slots().bytes]->age);
  }
  return fresh(global_cells()[(p >> 1) % kGlobalCells], p >> 1, machine->number);
}

template <typename Body>
void for_cells(uintptr_t p, size_t bytes, Body body) {
  for (const uintptr_t end = p + bytes; p < end;) {
    const unsigned odd = p & 1, mask = odd ? 2 : end - p == 1 ? 1 : 3;
    body(cell_of(p), p, mask);
    p += odd ? 1 : 2;
  }
}

// the allocation, or null for the object's own variables
Region* check_global(uintptr_t p, size_t bytes, Access kind, const void* at) {
  auto inside = [&](const Region& r) { return p >= r.base && p + bytes <= r.base + r.bytes; };
  if (last_region && inside(*last_region)) return last_region;
  auto after = regions.upper_bound(p);
  if (after != regions.begin() && inside((--after)->second)) return last_region = &after->second;
  for (const auto& [from, to] : object().segments) {
    if (p >= from && p + bytes <= to) return nullptr;
  }
  fail(at, "%s %zu bytes outside of every allocation: %s", verb(kind), bytes, name_of(p).c_str());
}

// whether the address is shared memory; fails where it is nobody's
bool check_shared(uintptr_t p, size_t bytes, Access kind, const void* at) {
  const size_t in_slots = p - reinterpret_cast<uintptr_t>(slots().memory), size = slots().bytes;
  if (in_slots >= kSlots * size) return false;
  const Block* owner = slots().owner[in_slots / size];
  const size_t offset = in_slots % size, dynamic = slots().dynamic;
  if (!owner || owner->cluster != self->block->cluster) fail(at, "%s shared memory of another cluster", verb(kind));
  if (owner->live == 0) fail(at, "%s shared memory of a block that has returned", verb(kind));
  const bool inside = offset >= dynamic ? offset + bytes <= dynamic + machine->grid.shared
                                        : variables.empty() || variable_at(offset, bytes);
  if (!inside) {
    fail(at, "%s %zu bytes outside of every shared variable: %s (%zu bytes of dynamic shared memory)", verb(kind), bytes,
         shared_name(offset).c_str(), machine->grid.shared);
  }
  return true;
}

}  // namespace

void access(const void* address, size_t bytes, Access kind, const void* at) {
  if (!self || !bytes) return;
  const uintptr_t p = reinterpret_cast<uintptr_t>(address);
  if (p - reinterpret_cast<uintptr_t>(self->stack) < kStack) return;
  const bool shared = check_shared(p, bytes, kind, at);
  Region* region = shared ? nullptr : check_global(p, bytes, kind, at);
  for_cells(p, bytes, [&](Cell& cell, uintptr_t at_byte, unsigned mask) { touch(cell, at_byte, mask, kind, at, shared); });
  if (kind == kRead || kind == kAtomicRead) return;
  ++machine->progress;
  if (!region || region->writers.empty()) return;
  region->kernel = machine->grid.kernel;
  std::fill_n(region->writers.begin() + static_cast<ptrdiff_t>(p - region->base), bytes, offset_of(at));
}

void access_pending(void* p, size_t bytes, const void* at) {
  access(p, bytes, kWrite, at);
  for_cells(reinterpret_cast<uintptr_t>(p), bytes, [](Cell& cell, uintptr_t, unsigned) { cell.write.clock = kPending; });
}

void access_complete(void* p, size_t bytes, uint32_t number, uint32_t clock, const void* at) {
  for_cells(reinterpret_cast<uintptr_t>(p), bytes, [&](Cell& cell, uintptr_t, unsigned mask) {
    cell.write = {number, clock, offset_of(at), 0, static_cast<uint8_t>(mask)};
  });
  ++machine->progress;
}

// --- shared memory

bool slots_left(unsigned blocks) {
  return std::count(slots().owner, slots().owner + kSlots, nullptr) >= static_cast<long>(blocks);
}

void take_slot(Block* block) {
  block->slot = std::find(slots().owner, slots().owner + kSlots, nullptr) - slots().owner;
  block->age = ++slots().ages;
  slots().owner[block->slot] = block;
}

void free_slot(Block* block) { slots().owner[block->slot] = nullptr; }

static char* slot_of(const Block& block) { return slots().memory + block.slot * slots().bytes; }

void* dynamic_shared() { return slot_of(*self->block) + slots().dynamic; }

void* cluster_map(const void* shared, unsigned rank) {
  const size_t offset = static_cast<const char*>(shared) - slot_of(*self->block);
  if (offset >= slots().bytes) fail(CALLER, "maps an address that is not its own shared memory into the cluster");
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
      access_complete(copy.to, copy.bytes, my_number(*self), self->clock, CALLER);
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
  if (barrier.complete) learn(*self, join({{self->known, self->block->cluster->number, self->index, self->clock},
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
  const uintptr_t p = reinterpret_cast<uintptr_t>(base);
  regions[p] = {p, bytes, name, std::vector<uint32_t>(output ? bytes : 0), nullptr};
  last_region = nullptr;
}

void emu_forget(void* base) {
  regions.erase(reinterpret_cast<uintptr_t>(base));
  last_region = nullptr;
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
    text += line_of(at_of(*nearest)) + ": the stores end beside bytes " + std::to_string(from - writers.begin()) + " to " +
            std::to_string(to - writers.begin() - 1) + " of " + region.name + ", which nothing wrote";
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
