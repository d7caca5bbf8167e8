#include <cstring>

#include "common/parallel.h"
#include "duplicate_layers/duplicate_layers.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

// A slice of a source row stays in the first two cache levels while every row that wants it is written.
constexpr int64_t kSliceBytes = 64 << 10;

// From here on what is written is not read again before it would have left the caches: stores go round them, which also
// spares the read of each line that an ordinary store begins with.
constexpr int64_t kStreamingBytes = 8 << 20;

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
inline void stream_vector(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
inline void stream_vector(char* to, const char* from) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__x86_64__)
constexpr int64_t kVectorBytes = 16;
inline void stream_vector(char* to, const char* from) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

#if defined(__x86_64__)
// Whole cache lines past the caches; the ends, which share their lines with a neighbour, as usual.
void stream(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const int64_t to_border = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & (kLine - 1));
  const int64_t head = to_border < bytes ? to_border : bytes;
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine)
    for (int64_t j = 0; j < kLine; j += kVectorBytes) stream_vector(to + i + j, from + i + j);
  std::memcpy(to + i, from + i, bytes - i);
}
// Streamed stores are ordered with nothing: whoever reads the bank next must find them.
void finish_streams() { _mm_sfence(); }
#else
void stream(char* to, const char* from, int64_t bytes) { std::memcpy(to, from, bytes); }
void finish_streams() {}
#endif

}  // namespace

void duplicate_layers(const DuplicateLayers& a) {
  int64_t moves = 0;
  for (int64_t i = 0; i < a.n; ++i) moves += a.map[i] != i;
  if (moves == 0) return;
  const bool streaming = moves * a.row_bytes >= kStreamingBytes;
  parallel_chunks(a.threads, a.row_bytes, kSliceBytes, [&](int64_t begin, int64_t end) {
    char* slice = static_cast<char*>(a.bank) + begin;
    for (int64_t i = a.n - 1; i > 0; --i) {
      if (a.map[i] == i) continue;
      char* to = slice + i * a.row_stride;
      const char* from = slice + a.map[i] * a.row_stride;
      if (streaming)
        stream(to, from, end - begin);
      else
        std::memcpy(to, from, end - begin);
    }
    if (streaming) finish_streams();
  });
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
