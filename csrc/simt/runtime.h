// A CUDA block on the host: every thread is a fiber, and what a race or a missing barrier would change on a GPU stops
// here with a report.
//
//   order      Fibers switch only where threads synchronise. Which one runs next, and in which order blocks run, is
//              drawn from a seed.
//   races      Each byte of shared memory and of the allowed global memory remembers its last accesses. Two accesses of
//              different threads, one of them a write, must be ordered by a barrier (of the block, a named one, or of
//              the warp), whatever order the fibers happened to run in. Blocks are never ordered.
//   memory     Shared memory must be written before it is read. Global memory must lie in what the caller allowed.
//   copies     An asynchronous copy lands at its wait and not before; until then nobody may touch its target.
//   collectives  A warp's 32 threads must meet at the same one.
//
// Barriers order memory; shuffles, votes and matrix instructions exchange registers and do not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace stackbert {
namespace simt {

constexpr int kWarp = 32;
constexpr int kNamedBarriers = 16;

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// Where a thread stands. Valid only inside a kernel.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();

// Global memory that kernels may touch, until `forget`.
void allow(const void* address, size_t bytes, bool writable, const std::string& name);
void forget();

// The seed of the launches that follow.
void set_seed(uint64_t seed);

// Runs `body` once for every thread of every block. Throws std::runtime_error with kernel, block and thread.
void launch(const char* kernel, Index grid, int threads, int shared_bytes, const std::function<void()>& body);

// Memory. Sizes in bytes, shared memory by its offset in the block's.
void read_shared(uint32_t offset, void* value, uint32_t size);
void write_shared(uint32_t offset, const void* value, uint32_t size);
void read_global(const void* address, void* value, uint32_t size);
void write_global(void* address, const void* value, uint32_t size);

// `size` bytes to shared memory, of which `from_source` are read and the others are zero.
void copy_async(uint32_t to, const void* from, uint32_t size, uint32_t from_source);
void commit_copies();
void wait_copies(int groups_left);

// Synchronisation.
void block_barrier();
void named_barrier(int id, int threads, bool waits);
void warp_barrier();

// A warp's threads meet: when the last has come, `compute` turns the 32 operands into 32 results.
using Compute = void (*)(const unsigned char* operands, unsigned char* results);
void collective(const char* name, const void* operand, size_t operand_size, void* result, size_t result_size,
                Compute compute);

// Stops the kernel with this message about the current thread.
[[noreturn]] void fail(const std::string& message);

}  // namespace simt
}  // namespace stackbert
