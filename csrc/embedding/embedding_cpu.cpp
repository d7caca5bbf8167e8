#include "embedding/embedding.h"
#include "layer_norm/statistics.h"
#include "layer_norm/sum_row.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

// What a token reads.
template <typename T>
struct Sources {
  const T* rows[kTables];
};

template <typename T>
inline Sources<T> sources(const EmbeddingInputs& a, int64_t token) {
  Sources<T> s;
  for (int i = 0; i < kTables; ++i) s.rows[i] = static_cast<const T*>(a.tables[i]) + a.ids[i][token] * a.columns;
  return s;
}

// z [C] of a token; returns its sum lane by lane.
template <typename T>
inline Floats sum_sources(const Sources<T>& s, int64_t columns, float* z) {
  Floats total = {};
  for_vectors(0, columns, [&](int64_t c, auto part) {
    Floats v = load(s.rows[0] + c, part);
    for (int i = 1; i < kTables; ++i) v += load(s.rows[i] + c, part);
    total += v;
    store(z + c, v, part);
  });
  return total;
}

template <typename T, typename Y>
void forward(const EmbeddingFwd& a) {
  const int64_t columns = a.in.columns;
  const Mask mask = mask_of(a.in.rng, a.in.site, a.in.threshold);
  parallel_row_chunks(a.threads, a.in.tokens, [&](int64_t chunk, int64_t begin, int64_t end) {
    const ChunkSpace space = chunk_space(a.workspace, chunk, columns, 0);
    for (int64_t token = begin; token < end; ++token) {
      const Floats total = sum_sources(sources<T>(a.in, token), columns, space.z);
      const T* next = sources<T>(a.in, token + 1 < end ? token + 1 : token).rows[0];
      Y* y = static_cast<Y*>(a.y) + token * columns;
      const Statistics s = statistics(space.z, columns, total, a.eps, [&](int64_t c) {
        prefetch(next + c);
        prefetch(y + c);
      });
      if (a.in.threshold) mask_row(mask, token, columns, space.bytes);
      for_vectors(0, columns, [&](int64_t c, auto part) {
        const Floats normed = (load(space.z + c, part) - s.mean) * s.rstd;
        const Floats out = normed * load(a.weight + c, part) + load(a.bias + c, part);
        store(y + c, a.in.threshold ? keep(out, space.bytes + c, mask) : out, part);
      });
      if (a.mean) a.mean[token] = s.mean, a.rstd[token] = s.rstd;
    }
  });
}

// dz of every token, and each chunk's part of dweight and dbias.
template <typename T, typename Y>
void backward_rows(const EmbeddingBwd& a, float* workspace) {
  const int64_t columns = a.in.columns;
  const Mask mask = mask_of(a.in.rng, a.in.site, a.in.threshold);
  const float share = 1.f / static_cast<float>(columns);
  parallel_row_chunks(a.threads, a.in.tokens, [&](int64_t chunk, int64_t begin, int64_t end) {
    const ChunkSpace space = chunk_space(workspace, chunk, columns, 3);
    float* const dweight = space.extra;
    float* const dbias = dweight + padded(columns);
    float* const g_row = dbias + padded(columns);
    std::memset(space.extra, 0, 2 * padded(columns) * sizeof(float));
    for (int64_t token = begin; token < end; ++token) {
      sum_sources(sources<T>(a.in, token), columns, space.z);
      if (a.in.threshold) mask_row(mask, token, columns, space.bytes);
      const T* next = sources<T>(a.in, token + 1 < end ? token + 1 : token).rows[0];
      const Y* dy = static_cast<const Y*>(a.dy) + token * columns;
      float* dz = a.dz + token * columns;
      const float mean = a.mean[token], rstd = a.rstd[token];
      Floats sum_g = {}, sum_g_normed = {};
      for_vectors(0, columns, [&](int64_t c, auto part) {
        prefetch(next + c), prefetch(dz + c);
        Floats up = load(dy + c, part);
        if (a.in.threshold) up = keep(up, space.bytes + c, mask);
        const Floats normed = (load(space.z + c, part) - mean) * rstd;
        const Floats g = up * load(a.weight + c, part);  // zero past the end, as both factors are
        sum_g += g;
        sum_g_normed += g * normed;
        store(dweight + c, load(dweight + c, part) + up * normed, part);
        store(dbias + c, load(dbias + c, part) + up, part);
        store(space.z + c, normed, part);
        store(g_row + c, g, part);
      });
      const float mean_g = sum(sum_g) * share, mean_g_normed = sum(sum_g_normed) * share;
      for_vectors(0, columns, [&](int64_t c, auto part) {
        prefetch(dy + columns + c);
        store(dz + c, (load(g_row + c, part) - mean_g - load(space.z + c, part) * mean_g_normed) * rstd, part);
      });
    }
  });
}

// The tokens in the order of the rows that they read of a table.
struct Sorted {
  const int64_t* ids;
  int64_t *tokens, *ends;  // [T]; [rows]: where the tokens of a row end

  int64_t row(int64_t place) const { return ids[tokens[place]]; }
};

void sort_tokens(const Sorted& s, int64_t tokens, int64_t rows) {
  // ends counts, then tells where a row's tokens begin, and has moved on to where they end when all are placed.
  std::memset(s.ends, 0, rows * sizeof(int64_t));
  for (int64_t t = 0; t < tokens; ++t) ++s.ends[s.ids[t]];
  int64_t begin = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t count = s.ends[row];
    s.ends[row] = begin;
    begin += count;
  }
  for (int64_t t = 0; t < tokens; ++t) s.tokens[s.ends[s.ids[t]]++] = t;
}

// A piece's partial sums: of the row that the piece before began, and of the one that goes on in the next.
struct Parts {
  float *head, *tail;  // [C]
};

inline Parts parts_of(float* parts, int64_t piece, int64_t columns) {
  float* const head = parts + 2 * piece * padded(columns);
  return {head, head + padded(columns)};
}

template <typename T>
void sum_piece(const Sorted& s, const EmbeddingBwd& a, int64_t piece, const Parts& parts, T* dtable) {
  const int64_t columns = a.in.columns, begin = piece * kPieceTokens;
  const int64_t end = begin + kPieceTokens < a.in.tokens ? begin + kPieceTokens : a.in.tokens;
  for (int64_t place = begin; place < end;) {
    const int64_t row = s.row(place), stop = s.ends[row] < end ? s.ends[row] : end;
    const bool goes_on = s.ends[row] > end, is_head = place == begin && begin > 0 && s.row(begin - 1) == row;
    float* const total = is_head ? parts.head : parts.tail;
    for (int64_t first_of_row = place; place < stop; ++place) {
      const float* dz = a.dz + s.tokens[place] * columns;
      const float* next = a.dz + s.tokens[place + 1 < end ? place + 1 : place] * columns;
      for_vectors(0, columns, [&](int64_t c, auto part) {
        prefetch(next + c);
        const Floats v = load(dz + c, part);
        store(total + c, place > first_of_row ? load(total + c, part) + v : v, part);
      });
    }
    if (!is_head && !goes_on)
      for_vectors(0, columns,
                  [&](int64_t c, auto part) { store(dtable + row * columns + c, load(total + c, part), part); });
  }
}

// Columns [begin, end) of the rows that go on over a border.
template <typename T>
void join_pieces(const Sorted& s, const EmbeddingBwd& a, float* parts, T* dtable, int64_t begin, int64_t end) {
  const int64_t columns = a.in.columns, pieces = embedding_pieces(a.in.tokens);
  for (int64_t piece = 1; piece < pieces;) {
    const int64_t place = piece * kPieceTokens, row = s.row(place);
    int64_t last = piece;  // behind the last piece that has a head of this row
    while (last < pieces && s.row(last * kPieceTokens) == row && s.row(last * kPieceTokens - 1) == row) ++last;
    if (last == piece) {
      ++piece;
      continue;
    }
    for_vectors(begin, end, [&](int64_t c, auto part) {
      Floats total = load(parts_of(parts, piece - 1, columns).tail + c, part);
      for (int64_t i = piece; i < last; ++i) total += load(parts_of(parts, i, columns).head + c, part);
      store(dtable + row * columns + c, total, part);
    });
    piece = last;
  }
}

template <typename T, typename Y>
void backward(const EmbeddingBwd& a) {
  const int64_t columns = a.in.columns, pieces = embedding_pieces(a.in.tokens);
  float* const row_space = a.workspace + 2 * kTables * pieces * padded(columns);
  Sorted sorted[kTables];
  int64_t* space = a.order;
  for (int i = 0; i < kTables; ++i) {
    sorted[i] = {a.in.ids[i], space, space + a.in.tokens};
    space += a.in.tokens + a.in.table_rows[i];
  }
  parallel_tasks(a.threads, kTables, [&](int64_t i) { sort_tokens(sorted[i], a.in.tokens, a.in.table_rows[i]); });
  backward_rows<T, Y>(a, row_space);

  for (int i = 0; i < kTables; ++i) {
    const Sorted& s = sorted[i];
    T* const dtable = static_cast<T*>(a.dtables[i]);
    float* const parts = a.workspace + 2 * i * pieces * padded(columns);
    parallel_tasks(a.threads, pieces,
                   [&](int64_t piece) { sum_piece(s, a, piece, parts_of(parts, piece, columns), dtable); });
    parallel_chunks(a.threads, a.in.table_rows[i], 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        if (s.ends[row] == (row > 0 ? s.ends[row - 1] : 0))
          std::memset(static_cast<void*>(dtable + row * columns), 0, columns * sizeof(T));
    });
    parallel_chunks(a.threads, columns, 64,
                    [&](int64_t begin, int64_t end) { join_pieces(s, a, parts, dtable, begin, end); });
  }
  const int64_t stride = chunk_workspace(columns, 3), chunks = row_chunks(a.in.tokens).count;
  add_partial_sums(a.threads, row_space, stride, chunks, columns, a.dweight);
  add_partial_sums(a.threads, row_space + padded(columns), stride, chunks, columns, a.dbias);
}

template <typename T>
void forward(const EmbeddingFwd& a) {
  a.in.dtype == DType::kFloat32 ? forward<T, float>(a) : forward<T, bfloat16>(a);
}

template <typename T>
void backward(const EmbeddingBwd& a) {
  a.in.dtype == DType::kFloat32 ? backward<T, float>(a) : backward<T, bfloat16>(a);
}

}  // namespace

void embedding_fwd(const EmbeddingFwd& a) {
  a.in.table_dtype == DType::kFloat32 ? forward<float>(a) : forward<bfloat16>(a);
}

void embedding_bwd(const EmbeddingBwd& a) {
  a.in.table_dtype == DType::kFloat32 ? backward<float>(a) : backward<bfloat16>(a);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
