// The device primitives that kernels are written in: all inline PTX and all intrinsics are behind the functions of this
// file. csrc/simt/ptx.h has the same functions for the host, so that the same kernels run, and are raced, without a
// GPU.
//
// Blocks are one-dimensional and made of whole warps; a collective is called by all 32 lanes of a warp together.
// Section numbers are those of the PTX ISA, version 9.0.
//
// Fragments of mma.sync.m16n8k16 (9.7.14.5.8), g = lane / 4, t = lane % 4; a register holds two 16-bit elements, the
// one of the lower column (of A, C) or row (of B) in its lower half:
//
//   A [16, 16]   a[0] (g, 2t)   a[1] (g + 8, 2t)   a[2] (g, 2t + 8)   a[3] (g + 8, 2t + 8)    and the column after each
//   B [16, 8]    b[0] (2t, g)   b[1] (2t + 8, g)                                              and the row after each
//   C [16, 8]    c[0] (g, 2t)   c[1] (g, 2t + 1)   c[2] (g + 8, 2t)   c[3] (g + 8, 2t + 1)    fp32
//
// Two neighbouring C tiles of 8 columns, packed to 16 bits, are an A operand without moving anything: a[0], a[1] from
// the first tile's rows g and g + 8, a[2], a[3] from the second's.
#pragma once

#ifdef STACKBERT_SIMT
#include "simt/ptx.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace stackbert {
namespace ptx {

#define STACKBERT_DEVICE __device__ __forceinline__

// N elements that one instruction moves: 16 bytes at most, aligned to their size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};
using Words4 = Vec<uint32_t, 4>;

STACKBERT_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
STACKBERT_DEVICE int warp() { return static_cast<int>(threadIdx.x / 32); }

// A place in the block's shared memory, by its address there: half the registers of a generic pointer.
template <typename T>
class Shared {
 public:
  explicit STACKBERT_DEVICE Shared(uint32_t address) : address_(address) {}
  STACKBERT_DEVICE Shared operator+(int i) const {
    return Shared(address_ + static_cast<uint32_t>(i * static_cast<int>(sizeof(T))));
  }
  STACKBERT_DEVICE T load(int i = 0) const { return *(*this + i).generic(); }
  STACKBERT_DEVICE void store(int i, T value) const { *(*this + i).generic() = value; }
  template <typename U>
  STACKBERT_DEVICE Shared<U> as() const {
    return Shared<U>(address_);
  }
  STACKBERT_DEVICE uint32_t address() const { return address_; }

 private:
  STACKBERT_DEVICE T* generic() const { return static_cast<T*>(__cvta_shared_to_generic(address_)); }
  uint32_t address_;
};

STACKBERT_DEVICE Shared<unsigned char> shared_memory() {
  extern __shared__ __align__(128) unsigned char stackbert_shared[];
  return Shared<unsigned char>(static_cast<uint32_t>(__cvta_generic_to_shared(stackbert_shared)));
}

// Global memory. T is 1, 2, 4, 8 or 16 bytes, and aligned to them. "once": it is not read again soon, so that what is
// stays in the cache (ld.global.cs, st.global.cs; 9.7.9.1).
template <int kBytes>
struct Bits;
template <>
struct Bits<1> {
  using type = unsigned char;
};
template <>
struct Bits<2> {
  using type = unsigned short;
};
template <>
struct Bits<4> {
  using type = unsigned int;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};

template <typename To, typename From>
STACKBERT_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// A copy of bytes to or from the place itself would have no alignment and be an instruction a byte; the compiler splits
// a store of 8 or 16 bytes from C++ where threads may skip it.
template <typename B>
STACKBERT_DEVICE void store_bits(B* p, B bits) {
  *p = bits;
}
STACKBERT_DEVICE void store_bits(uint2* p, uint2 bits) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(bits.x), "r"(bits.y)
               : "memory");
}
STACKBERT_DEVICE void store_bits(uint4* p, uint4 bits) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(bits.x), "r"(bits.y),
               "r"(bits.z), "r"(bits.w)
               : "memory");
}

template <typename T>
STACKBERT_DEVICE T load(const T* p) {
  const typename Bits<sizeof(T)>::type bits = *reinterpret_cast<const typename Bits<sizeof(T)>::type*>(p);
  return bits_as<T>(bits);
}
template <typename T>
STACKBERT_DEVICE T load_once(const T* p) {
  const typename Bits<sizeof(T)>::type bits = __ldcs(reinterpret_cast<const typename Bits<sizeof(T)>::type*>(p));
  return bits_as<T>(bits);
}
template <typename T>
STACKBERT_DEVICE void store(T* p, T value) {
  using B = typename Bits<sizeof(T)>::type;
  store_bits(reinterpret_cast<B*>(p), bits_as<B>(value));
}
template <typename T>
STACKBERT_DEVICE void store_once(T* p, T value) {
  using B = typename Bits<sizeof(T)>::type;
  __stcs(reinterpret_cast<B*>(p), bits_as<B>(value));
}

// Asynchronous copies (9.7.9.25.3): 16 bytes past the registers and L1. With valid false nothing is read and zeros are
// written. A thread sees its own after the wait, others after a barrier that follows it.
STACKBERT_DEVICE void copy_async_16(Shared<unsigned char> to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}
STACKBERT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kLeft of the groups committed by this thread are under way.
template <int kLeft>
STACKBERT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Barriers: execution and memory.
STACKBERT_DEVICE void block_sync() { __syncthreads(); }
STACKBERT_DEVICE void warp_sync() { __syncwarp(); }
// Number 1 to 15 (9.7.13.1); `threads` counts all who come, those who only arrive included.
STACKBERT_DEVICE void named_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
STACKBERT_DEVICE void named_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Registers across a warp (9.7.9.6, 9.7.13.3): they order no memory. T is 4 bytes.
template <typename T>
STACKBERT_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
}
template <typename T>
STACKBERT_DEVICE T shuffle(T value, int from_lane) {
  return __shfl_sync(0xFFFFFFFFu, value, from_lane);
}
STACKBERT_DEVICE uint32_t ballot(bool condition) { return __ballot_sync(0xFFFFFFFFu, condition); }
STACKBERT_DEVICE bool any(bool condition) { return __any_sync(0xFFFFFFFFu, condition); }

// Matrices of 8 x 8 16-bit elements.

// Four of them (9.7.14.5.15): lane 8i + r gives the place of row r of matrix i, 16 bytes aligned to 16. Register i
// receives elements (g, 2t) and (g, 2t + 1) of matrix i, transposed: (2t, g) and (2t + 1, g).
STACKBERT_DEVICE Words4 load_matrices(Shared<unsigned char> row) {
  Words4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "r"(row.address())
               : "memory");
  return r;
}
STACKBERT_DEVICE Words4 load_matrices_transposed(Shared<unsigned char> row) {
  Words4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "r"(row.address())
               : "memory");
  return r;
}

// One matrix, (g, 2t) and (g, 2t + 1) in each lane, to its transpose in the same layout (9.7.14.5.17).
STACKBERT_DEVICE uint32_t transpose_matrix(uint32_t matrix) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(matrix));
  return r;
}

// c += A B, fragments as at the top of this file.
template <typename T>
STACKBERT_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
STACKBERT_DEVICE void multiply_add<bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
STACKBERT_DEVICE void multiply_add<float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats as two 16-bit elements, rounded to nearest, `low` in the lower half; and back.
struct Pair {
  float low, high;
};
template <typename T>
STACKBERT_DEVICE uint32_t pack(float low, float high);
template <>
STACKBERT_DEVICE uint32_t pack<bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
STACKBERT_DEVICE uint32_t pack<float16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <typename T>
STACKBERT_DEVICE Pair unpack(uint32_t elements);
template <>
STACKBERT_DEVICE Pair unpack<bfloat16>(uint32_t elements) {
  return {__uint_as_float(elements << 16), __uint_as_float(elements & 0xFFFF0000u)};
}
template <>
STACKBERT_DEVICE Pair unpack<float16>(uint32_t elements) {
  Pair r;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(r.low), "=f"(r.high)
      : "r"(elements));
  return r;
}

// To about 2 ulp, 1 for the reciprocal, subnormals flushed (9.7.3.21, 9.7.3.20, 9.7.3.13, 9.7.3.16).
STACKBERT_DEVICE float exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
STACKBERT_DEVICE float log2(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
STACKBERT_DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
STACKBERT_DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }
// Rounded to nearest (sqrt.rn; 9.7.3.15).
STACKBERT_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
STACKBERT_DEVICE double square_root(double x) { return __dsqrt_rn(x); }

}  // namespace ptx
}  // namespace stackbert

#endif
