#include "simt/runtime.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace stackbert {
namespace simt {
namespace {

// Fibers: a stack each, and a switch that saves what the calling convention asks a function to keep.

constexpr size_t kStackBytes = 128 << 10;

#if defined(__x86_64__)
extern "C" void stackbert_simt_switch(void** from, void* to);
asm(R"(
.text
.type stackbert_simt_switch,@function
stackbert_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size stackbert_simt_switch,.-stackbert_simt_switch
)");

struct Context {
  void* stack_pointer = nullptr;
};
void switch_context(Context& from, Context& to) { stackbert_simt_switch(&from.stack_pointer, to.stack_pointer); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  // The switch pops six registers and returns into `entry`, which finds its stack aligned as after a call.
  uintptr_t top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 2;
  *frame = reinterpret_cast<void*>(entry);
  context.stack_pointer = frame - 6;
  std::memset(context.stack_pointer, 0, 6 * sizeof(void*));
}
#else
struct Context {
  ucontext_t context;
};
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t below(uint32_t n) {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * n >> 32);
  }

 private:
  uint64_t state_;
};

// What a byte of memory remembers.

struct Access {
  uint64_t launch = 0;  // 0: none
  uint32_t block = 0, clock = 0, lanes = 0;
  int warp = 0;
};
struct Cell {
  Access writer;
  std::array<Access, 4> readers;
  bool written = false;    // shared memory only
  bool in_flight = false;  // an asynchronous copy has begun and not landed
};

struct Region {
  unsigned char* begin;
  size_t bytes;
  bool writable;
  std::string name;
  std::vector<Cell> cells;
};

struct Copy {
  uint32_t to;
  std::vector<unsigned char> bytes;
};

enum class State { kReady, kWaiting, kDone };

struct Thread {
  Index index;
  int number = 0, warp = 0, lane = 0;
  State state = State::kReady;
  Context context;
  const char* waits_for = "";
  std::vector<std::vector<Copy>> groups;  // committed
  std::vector<Copy> open;                 // not yet
};

struct Meeting {  // of a warp at a collective
  const char* name = nullptr;
  uint32_t arrived = 0;
  uint64_t generation = 0;
  std::vector<unsigned char> operands;
  std::vector<unsigned char> results[2];  // of this meeting and of the last, which some may still have to read
};

struct Barrier {
  int arrived = 0, wanted = 0;
  uint64_t generation = 0;
  std::vector<uint32_t> released;  // seen[] of all who came, together
  std::vector<int> waiting;        // warps
};
struct Arrival {  // of a warp
  Barrier* barrier;
  int wanted;
  bool waits;
  const char* what;
};

struct Block {
  const char* kernel;
  uint64_t launch;
  uint32_t number;
  Index index, grid, size;
  const std::function<void()>* body;
  std::vector<Thread> threads;
  std::vector<int> ready;
  std::vector<Meeting> meetings;
  std::array<Barrier, kNamedBarriers> barriers;
  // clock[w] counts the barriers of warp w; seen[w][v]: what warp v did before that count is ordered before warp w.
  std::vector<uint32_t> clock;
  std::vector<std::vector<uint32_t>> seen;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  Context scheduler;
  Thread* running = nullptr;
  std::string error;
};

Block* block = nullptr;
std::vector<Region> regions;
std::vector<std::unique_ptr<unsigned char[]>> stacks;
uint64_t launches = 0;
uint64_t launch_seed = 0;

Thread& self() { return *block->running; }

void suspend() { switch_context(self().context, block->scheduler); }

void wake(Thread& thread) {
  thread.state = State::kReady;
  block->ready.push_back(thread.number);
}

template <typename Condition>
void wait_until(const char* what, Condition done) {
  while (!done()) {
    self().state = State::kWaiting;
    self().waits_for = what;
    suspend();
  }
}

void wake_warp(int warp) {
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread& thread = block->threads[warp * kWarp + lane];
    if (thread.state == State::kWaiting) wake(thread);
  }
}

std::string where(const Thread& thread) {
  std::ostringstream text;
  text << block->kernel << ": block (" << block->index.x << ", " << block->index.y << ", " << block->index.z
       << "), thread " << thread.number;
  return text.str();
}

struct Failure {};  // unwinds a fiber

void entry() {
  try {
    (*block->body)();
    Meeting& meeting = block->meetings[self().warp];
    if (meeting.arrived) fail(std::string("ends while its warp waits at ") + meeting.name);
    if (!self().open.empty() || !self().groups.empty()) fail("ends with asynchronous copies under way");
  } catch (const Failure&) {
  } catch (const std::exception& error) {
    block->error = where(self()) + ": " + error.what();
  }
  self().state = State::kDone;
  suspend();
}

// Whether the access was made before what the current thread does now, by the program and not by luck.
bool ordered(const Access& access) {
  if (access.launch != block->launch) return true;
  if (access.block != block->number) return false;
  const Thread& me = self();
  if (access.warp == me.warp) return access.lanes == 1u << me.lane || access.clock < block->clock[me.warp];
  return access.clock < block->seen[me.warp][access.warp];
}

std::string other(const Access& access) {
  std::ostringstream text;
  if (access.block != block->number)
    text << "block number " << access.block;
  else
    text << "warp " << access.warp;
  return text.str();
}

template <typename Place>
void note(Cell& cell, bool write, const Place& place) {
  if (cell.in_flight) fail((write ? "writes " : "reads ") + place() + " while an asynchronous copy to it is under way");
  if (!ordered(cell.writer))
    fail((write ? "writes " : "reads ") + place() + ", which " + other(cell.writer) +
         " wrote with no barrier in between");
  const Thread& me = self();
  const Access now{block->launch, block->number, block->clock[me.warp], 1u << me.lane, me.warp};
  if (write) {
    for (Access& reader : cell.readers) {
      if (!ordered(reader)) fail("writes " + place() + ", which " + other(reader) + " read with no barrier in between");
      reader = Access();
    }
    cell.writer = now;
    cell.written = true;
    return;
  }
  Access* slot = nullptr;
  for (Access& reader : cell.readers) {
    if (reader.launch == now.launch && reader.block == now.block && reader.warp == now.warp &&
        reader.clock == now.clock) {
      reader.lanes |= now.lanes;
      return;
    }
    if (!slot && ordered(reader)) slot = &reader;
  }
  // More warps than slots read it unordered: any of them will do to catch a writer that waits for none.
  *(slot ? slot : &cell.readers[0]) = now;
}

std::string shared_place(uint32_t offset) { return "byte " + std::to_string(offset) + " of shared memory"; }

void check_shared(uint32_t offset, uint32_t size) {
  if (offset % size) fail(shared_place(offset) + " is not aligned to " + std::to_string(size) + " bytes");
  if (offset + size > block->shared.size())
    fail(shared_place(offset) + " is past its end, " + std::to_string(block->shared.size()));
}

Region& region_of(const void* address, uint32_t size, bool write) {
  const unsigned char* first = static_cast<const unsigned char*>(address);
  std::ostringstream text;
  text << (write ? "writes " : "reads ") << size << " bytes of global memory at " << address;
  if (reinterpret_cast<uintptr_t>(address) % size) fail(text.str() + ", which is not aligned to them");
  for (Region& region : regions)
    if (first >= region.begin && first + size <= region.begin + region.bytes) {
      if (write && !region.writable) fail(text.str() + ", in " + region.name + ", which is an input");
      return region;
    }
  const Region* nearest = nullptr;
  int64_t least = 0;
  for (const Region& region : regions) {
    const int64_t before = region.begin - first, after = first - (region.begin + region.bytes);
    const int64_t distance = std::max(before, after);
    if (!nearest || distance < least) nearest = &region, least = distance;
  }
  if (nearest) {
    const int64_t offset = first - nearest->begin;
    text << ", outside everything allowed; nearest is " << nearest->name << ", at byte " << offset << " of "
         << nearest->bytes;
  }
  fail(text.str());
}

void note_global(Region& region, const void* address, uint32_t size, bool write) {
  const size_t offset = static_cast<const unsigned char*>(address) - region.begin;
  for (uint32_t i = 0; i < size; ++i)
    note(region.cells[offset + i], write, [&] { return "byte " + std::to_string(offset + i) + " of " + region.name; });
}

void wake_all() {
  for (Thread& thread : block->threads)
    if (thread.state == State::kWaiting) wake(thread);
}

// Once a warp. What it did before is ordered before what the waiting warps do once all have come.
void come(const Arrival& a) {
  const int warp = self().warp;
  Barrier& barrier = *a.barrier;
  if (barrier.arrived == 0) {
    barrier.wanted = a.wanted;
    barrier.released.assign(block->clock.size(), 0);
    barrier.waiting.clear();
  }
  if (barrier.wanted != a.wanted)
    fail(std::string("comes to ") + a.what + " for " + std::to_string(a.wanted) + " threads, where others came for " +
         std::to_string(barrier.wanted));
  block->seen[warp][warp] = ++block->clock[warp];
  for (size_t v = 0; v < barrier.released.size(); ++v)
    barrier.released[v] = std::max(barrier.released[v], block->seen[warp][v]);
  if (a.waits) barrier.waiting.push_back(warp);
  if ((barrier.arrived += kWarp) < barrier.wanted) return;
  for (const int waiting : barrier.waiting)
    for (size_t v = 0; v < barrier.released.size(); ++v)
      block->seen[waiting][v] = std::max(block->seen[waiting][v], barrier.released[v]);
  barrier.arrived = 0;
  ++barrier.generation;
  wake_all();
}

void arrive(Barrier& barrier, int wanted, const char* what, bool waits) {
  const uint64_t generation = barrier.generation;
  Arrival arrival;
  std::memset(&arrival, 0, sizeof arrival);  // its padding is compared too
  arrival.barrier = &barrier, arrival.wanted = wanted, arrival.waits = waits, arrival.what = what;
  collective(what, &arrival, sizeof arrival, nullptr, 0, [](const unsigned char* operands, unsigned char*) {
    Arrival first;
    std::memcpy(&first, operands, sizeof first);
    for (int lane = 1; lane < kWarp; ++lane)
      if (std::memcmp(operands, operands + lane * sizeof first, sizeof first) != 0)
        fail(std::string("its warp comes to different barriers at once, one of them ") + first.what);
    come(first);
  });
  if (waits) wait_until(what, [&] { return barrier.generation != generation; });
}

// Which of the ready threads runs next. Besides a plain draw: all of a warp first, so that warps run far apart.
size_t choose(Random& random, uint64_t seed, const std::vector<int>& ready, int last_warp) {
  if (seed % 4 == 0) return random.below(static_cast<uint32_t>(ready.size()));
  if (seed % 4 == 1) {
    for (size_t i = 0; i < ready.size(); ++i)
      if (ready[i] / kWarp == last_warp) return i;
    return random.below(static_cast<uint32_t>(ready.size()));
  }
  const auto extreme =
      seed % 4 == 2 ? std::max_element(ready.begin(), ready.end()) : std::min_element(ready.begin(), ready.end());
  return static_cast<size_t>(extreme - ready.begin());
}

void run_block(Block& b, Random& random, uint64_t seed) {
  block = &b;
  while (stacks.size() < b.threads.size()) stacks.emplace_back(new unsigned char[kStackBytes]);
  for (Thread& thread : b.threads) {
    prepare(thread.context, stacks[thread.number].get(), entry);
    b.ready.push_back(thread.number);
  }
  int last_warp = 0;
  while (!b.ready.empty() && b.error.empty()) {
    const size_t chosen = choose(random, seed, b.ready, last_warp);
    b.running = &b.threads[b.ready[chosen]];
    b.ready[chosen] = b.ready.back();
    b.ready.pop_back();
    last_warp = b.running->warp;
    switch_context(b.scheduler, b.running->context);
    if (b.running->state == State::kReady) b.ready.push_back(b.running->number);
  }
  if (b.error.empty())
    for (const Thread& thread : b.threads)
      if (thread.state != State::kDone) {
        const long done =
            std::count_if(b.threads.begin(), b.threads.end(), [](const Thread& t) { return t.state == State::kDone; });
        b.error = where(thread) + ": waits for ever at " + thread.waits_for + "; " + std::to_string(done) + " of " +
                  std::to_string(b.threads.size()) + " threads have ended";
        break;
      }
  block = nullptr;
  if (!b.error.empty()) throw std::runtime_error(b.error);
}

}  // namespace

const Index& thread_index() { return self().index; }
const Index& block_index() { return block->index; }
const Index& block_size() { return block->size; }
const Index& grid_size() { return block->grid; }

void allow(const void* address, size_t bytes, bool writable, const std::string& name) {
  unsigned char* begin = static_cast<unsigned char*>(const_cast<void*>(address));
  regions.push_back({begin, bytes, writable, name, std::vector<Cell>(bytes)});
}
void forget() { regions.clear(); }
void set_seed(uint64_t seed) { launch_seed = seed; }

void launch(const char* kernel, Index grid, int threads, int shared_bytes, const std::function<void()>& body) {
  if (threads < kWarp || threads > 1024 || threads % kWarp)
    throw std::runtime_error(std::string(kernel) + ": a block must have 32, 64, ... or 1024 threads, got " +
                             std::to_string(threads));
  Random random(launch_seed);
  ++launches;
  const uint32_t blocks = grid.x * grid.y * grid.z;
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
  for (uint32_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  const int warps = threads / kWarp;
  for (const uint32_t number : order) {
    Block b{};
    b.kernel = kernel, b.launch = launches, b.number = number, b.grid = grid, b.body = &body;
    b.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    b.size = {static_cast<unsigned>(threads), 1, 1};
    b.threads = std::vector<Thread>(threads);
    for (int t = 0; t < threads; ++t) {
      Thread& thread = b.threads[t];
      thread.index = {static_cast<unsigned>(t), 0, 0};
      thread.number = t, thread.warp = t / kWarp, thread.lane = t % kWarp;
    }
    b.meetings = std::vector<Meeting>(warps);
    b.clock.assign(warps, 1);
    b.seen.assign(warps, std::vector<uint32_t>(warps, 0));
    b.shared.assign(shared_bytes, 0xFF);  // NaN in every floating type
    b.cells = std::vector<Cell>(shared_bytes);
    run_block(b, random, launch_seed);
  }
}

void read_shared(uint32_t offset, void* value, uint32_t size) {
  check_shared(offset, size);
  for (uint32_t i = offset; i < offset + size; ++i) {
    if (!block->cells[i].written && !block->cells[i].in_flight)
      fail("reads " + shared_place(i) + ", which nobody has written");
    note(block->cells[i], false, [&] { return shared_place(i); });
  }
  std::memcpy(value, &block->shared[offset], size);
}

void write_shared(uint32_t offset, const void* value, uint32_t size) {
  check_shared(offset, size);
  for (uint32_t i = offset; i < offset + size; ++i) note(block->cells[i], true, [&] { return shared_place(i); });
  std::memcpy(&block->shared[offset], value, size);
}

void read_global(const void* address, void* value, uint32_t size) {
  note_global(region_of(address, size, false), address, size, false);
  std::memcpy(value, address, size);
}

void write_global(void* address, const void* value, uint32_t size) {
  note_global(region_of(address, size, true), address, size, true);
  std::memcpy(address, value, size);
}

void copy_async(uint32_t to, const void* from, uint32_t size, uint32_t from_source) {
  check_shared(to, size);
  Copy copy{to, std::vector<unsigned char>(size, 0)};
  if (from_source > 0) {
    region_of(from, size, false);  // the hardware may fetch all of it, and wants it aligned
    read_global(from, copy.bytes.data(), from_source);
  }
  for (uint32_t i = to; i < to + size; ++i) {
    note(block->cells[i], true, [&] { return shared_place(i); });
    block->cells[i].in_flight = true;
  }
  self().open.push_back(std::move(copy));
}

void commit_copies() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void wait_copies(int groups_left) {
  std::vector<std::vector<Copy>>& groups = self().groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(&block->shared[copy.to], copy.bytes.data(), copy.bytes.size());
      for (uint32_t i = copy.to; i < copy.to + copy.bytes.size(); ++i) {
        block->cells[i].in_flight = false;
        note(block->cells[i], true, [&] { return shared_place(i); });
      }
    }
    groups.erase(groups.begin());
  }
}

void block_barrier() { arrive(block->barriers[0], static_cast<int>(block->threads.size()), "block_sync", true); }

void named_barrier(int id, int threads, bool waits) {
  if (id < 1 || id >= kNamedBarriers) fail("a named barrier must be 1 to 15, got " + std::to_string(id));
  if (threads % kWarp) fail("a named barrier is for whole warps, got " + std::to_string(threads) + " threads");
  arrive(block->barriers[id], threads, "a named barrier", waits);
}

void warp_barrier() {
  collective("warp_sync", nullptr, 0, nullptr, 0, [](const unsigned char*, unsigned char*) {
    const int warp = self().warp;
    block->seen[warp][warp] = ++block->clock[warp];
  });
}

void collective(const char* name, const void* operand, size_t operand_size, void* result, size_t result_size,
                Compute compute) {
  Thread& me = self();
  Meeting& meeting = block->meetings[me.warp];
  const uint64_t generation = meeting.generation;
  std::vector<unsigned char>& results = meeting.results[generation % 2];
  if (meeting.arrived == 0) {
    meeting.name = name;
    meeting.operands.assign(kWarp * operand_size, 0);
    results.assign(kWarp * result_size, 0);
  } else if (std::strcmp(meeting.name, name) != 0) {
    fail(std::string("comes to ") + name + " while others of its warp wait at " + meeting.name);
  }
  if (operand_size) std::memcpy(&meeting.operands[me.lane * operand_size], operand, operand_size);
  meeting.arrived |= 1u << me.lane;
  if (meeting.arrived == 0xFFFFFFFF) {
    meeting.arrived = 0;
    ++meeting.generation;
    compute(meeting.operands.data(), results.data());
    wake_warp(me.warp);
  } else {
    wait_until(name, [&] { return meeting.generation != generation; });
  }
  if (result_size) std::memcpy(result, &results[me.lane * result_size], result_size);
}

void fail(const std::string& message) {
  block->error = where(self()) + ": " + message;
  throw Failure();
}

}  // namespace simt
}  // namespace stackbert
