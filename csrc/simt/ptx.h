// The functions of common/ptx.cuh on the host, over simt/runtime.h: what is documented there holds here. Matrix
// collectives compute what the ISA says from all lanes' operands, in its fragment layouts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "simt/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::stackbert::simt::thread_index())
#define blockIdx (::stackbert::simt::block_index())
#define blockDim (::stackbert::simt::block_size())
#define gridDim (::stackbert::simt::grid_size())

using std::fmaxf;
using std::max;
using std::min;

namespace stackbert {
namespace ptx {

#define STACKBERT_DEVICE inline

template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};
using Words4 = Vec<uint32_t, 4>;

inline int lane() { return static_cast<int>(threadIdx.x % 32); }
inline int warp() { return static_cast<int>(threadIdx.x / 32); }

template <typename T>
class Shared {
 public:
  explicit Shared(uint32_t offset) : offset_(offset) {}
  Shared operator+(int i) const { return Shared(offset_ + static_cast<uint32_t>(i * static_cast<int>(sizeof(T)))); }
  T load(int i = 0) const {
    T value;
    simt::read_shared((*this + i).offset_, &value, sizeof value);
    return value;
  }
  void store(int i, T value) const { simt::write_shared((*this + i).offset_, &value, sizeof value); }
  template <typename U>
  Shared<U> as() const {
    return Shared<U>(offset_);
  }
  uint32_t address() const { return offset_; }

 private:
  uint32_t offset_;
};

inline Shared<unsigned char> shared_memory() { return Shared<unsigned char>(0); }

template <typename To, typename From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
T load(const T* p) {
  T value;
  simt::read_global(p, &value, sizeof value);
  return value;
}
template <typename T>
T load_once(const T* p) {
  return load(p);
}
template <typename T>
void store(T* p, T value) {
  simt::write_global(p, &value, sizeof value);
}
template <typename T>
void store_once(T* p, T value) {
  store(p, value);
}

inline void copy_async_16(Shared<unsigned char> to, const void* from, bool valid) {
  simt::copy_async(to.address(), from, 16, valid ? 16 : 0);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kLeft>
void wait_copies() {
  simt::wait_copies(kLeft);
}

inline void block_sync() { simt::block_barrier(); }
inline void warp_sync() { simt::warp_barrier(); }
inline void named_sync(int number, int threads) { simt::named_barrier(number, threads, true); }
inline void named_arrive(int number, int threads) { simt::named_barrier(number, threads, false); }

namespace host {

// The operands of a collective, and its results, by lane.
template <typename Operand, typename Result, void (*compute)(const Operand*, Result*)>
Result meet(const char* name, const Operand& operand) {
  Result result;
  simt::collective(name, &operand, sizeof operand, &result, sizeof result,
                   [](const unsigned char* operands, unsigned char* results) {
                     Operand in[simt::kWarp];
                     Result out[simt::kWarp];
                     std::memcpy(in, operands, sizeof in);
                     compute(in, out);
                     std::memcpy(results, out, sizeof out);
                   });
  return result;
}

struct Shuffle {
  uint32_t value, from;
};
inline void shuffled(const Shuffle* in, uint32_t* out) {
  for (int i = 0; i < simt::kWarp; ++i) out[i] = in[in[i].from % simt::kWarp].value;
}
inline void balloted(const uint32_t* in, uint32_t* out) {
  uint32_t all = 0;
  for (int i = 0; i < simt::kWarp; ++i) all |= (in[i] ? 1u : 0u) << i;
  for (int i = 0; i < simt::kWarp; ++i) out[i] = all;
}

inline uint16_t half_of(uint32_t word, int which) { return static_cast<uint16_t>(word >> (16 * which)); }

// Row r of matrix i, from lane 8i + r.
struct Rows {
  uint16_t element[8];
};
template <bool kTransposed>
void distributed(const Rows* rows, Words4* out) {
  for (int i = 0; i < simt::kWarp; ++i) {
    const int g = i / 4, t = i % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      const Rows* m = rows + 8 * matrix;
      const uint16_t first = kTransposed ? m[2 * t].element[g] : m[g].element[2 * t];
      const uint16_t second = kTransposed ? m[2 * t + 1].element[g] : m[g].element[2 * t + 1];
      out[i].v[matrix] = first | static_cast<uint32_t>(second) << 16;
    }
  }
}
inline Rows row_at(Shared<unsigned char> row) {
  Rows r;
  simt::read_shared(row.address(), &r, sizeof r);
  return r;
}

inline void transposed(const uint32_t* in, uint32_t* out) {
  uint16_t m[8][8];
  for (int i = 0; i < simt::kWarp; ++i)
    for (int k = 0; k < 2; ++k) m[i / 4][i % 4 * 2 + k] = half_of(in[i], k);
  for (int i = 0; i < simt::kWarp; ++i)
    out[i] = m[i % 4 * 2][i / 4] | static_cast<uint32_t>(m[i % 4 * 2 + 1][i / 4]) << 16;
}

inline float to_float(bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31;
  const uint32_t fraction = x.bits & 1023;
  if (exponent == 0) return (sign ? -1.f : 1.f) * std::ldexp(static_cast<float>(fraction), -24);
  return bits_as<float>(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}
inline bfloat16 rounded(float x, bfloat16) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float16 rounded(float x, float16) {
  const uint16_t sign = static_cast<uint16_t>(bits_as<uint32_t>(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (size != size) return {0x7FFF};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7C00)};
  // In units of the last place, whose size is that of the exponent, 2^-24 for subnormals; nearbyint rounds to even.
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = (exponent < -13 ? -13 : exponent) - 11;
  const float units = std::nearbyint(std::ldexp(size, -unit));
  const float value = std::ldexp(units, unit);
  std::frexp(value, &exponent);
  if (value == 0.f) return {sign};
  if (exponent < -13) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(value, 24)))};
  const uint16_t fraction = static_cast<uint16_t>(std::ldexp(value, 11 - exponent)) & 1023;
  return {static_cast<uint16_t>(sign | (exponent + 14) << 10 | fraction)};
}

struct Product {
  uint32_t a[4], b[2];
  float c[4];
};
struct Accumulator {
  float c[4];
};
template <typename T>
void multiplied(const Product* in, Accumulator* out) {
  float a[16][16], b[16][8];
  for (int i = 0; i < simt::kWarp; ++i) {
    const int g = i / 4, t = i % 4;
    for (int r = 0; r < 4; ++r)
      for (int k = 0; k < 2; ++k) a[g + r % 2 * 8][2 * t + r / 2 * 8 + k] = to_float(T{half_of(in[i].a[r], k)});
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 2; ++k) b[2 * t + r * 8 + k][g] = to_float(T{half_of(in[i].b[r], k)});
  }
  for (int i = 0; i < simt::kWarp; ++i)
    for (int r = 0; r < 4; ++r) {
      const int row = i / 4 + r / 2 * 8, column = i % 4 * 2 + r % 2;
      double sum = in[i].c[r];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      out[i].c[r] = static_cast<float>(sum);
    }
}

}  // namespace host

template <typename T>
T shuffle(T value, int from_lane) {
  const host::Shuffle operand{bits_as<uint32_t>(value), static_cast<uint32_t>(from_lane)};
  return bits_as<T>(host::meet<host::Shuffle, uint32_t, host::shuffled>("shuffle", operand));
}
template <typename T>
T shuffle_xor(T value, int lanes) {
  return shuffle(value, lane() ^ lanes);
}
inline uint32_t ballot(bool condition) {
  return host::meet<uint32_t, uint32_t, host::balloted>("ballot", condition ? 1u : 0u);
}
inline bool any(bool condition) { return ballot(condition) != 0; }

inline Words4 load_matrices(Shared<unsigned char> row) {
  return host::meet<host::Rows, Words4, host::distributed<false>>("load_matrices", host::row_at(row));
}
inline Words4 load_matrices_transposed(Shared<unsigned char> row) {
  return host::meet<host::Rows, Words4, host::distributed<true>>("load_matrices_transposed", host::row_at(row));
}
inline uint32_t transpose_matrix(uint32_t matrix) {
  return host::meet<uint32_t, uint32_t, host::transposed>("transpose_matrix", matrix);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const host::Product operand{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const host::Accumulator r =
      host::meet<host::Product, host::Accumulator, host::multiplied<T>>("multiply_add", operand);
  for (int i = 0; i < 4; ++i) c[i] = r.c[i];
}

struct Pair {
  float low, high;
};
template <typename T>
uint32_t pack(float low, float high) {
  return host::rounded(low, T{}).bits | static_cast<uint32_t>(host::rounded(high, T{}).bits) << 16;
}
template <typename T>
Pair unpack(uint32_t elements) {
  return {host::to_float(T{host::half_of(elements, 0)}), host::to_float(T{host::half_of(elements, 1)})};
}

inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float reciprocal_sqrt(float x) { return 1.f / std::sqrt(x); }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }

}  // namespace ptx
}  // namespace stackbert
