// Keys and values in pages: each op once, for one work item, compiled for the host and for CUDA. Bytes are moved and
// not interpreted, except where keys are rotated, so every dtype is the same op. `lanes` threads share an item: a warp
// on CUDA, one on a CPU.
//
// Sequence s holds its token t in slot t % page_size of page block_table[s][t / page_size].
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "widen.h"

namespace sjd {

// 32-bit division: one of 64 bits is a call on CUDA, and spills around it. `run` allows fewer than 2^32 items.
struct Division {
  int64_t quotient, remainder;
};
SJD_INLINE Division divide(int64_t a, int64_t b) {
  const uint32_t quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return {quotient, static_cast<int64_t>(static_cast<uint32_t>(a) - quotient * static_cast<uint32_t>(b))};
}

// S sequences, L layers. A row is the keys or the values of one token in one layer: [KH, D].
struct PagedKV {
  char* pages;                 // [L, num_pages, 2, page_size, row_bytes]
  const int32_t* block_table;  // [S, table_width]; negative where there is no page
  int64_t num_sequences, table_width, num_pages, page_size, row_bytes;

  SJD_INLINE int64_t page_bytes() const { return 2 * page_size * row_bytes; }
  SJD_INLINE char* page(int64_t layer, int64_t number) const {
    return pages + (layer * num_pages + number) * page_bytes();
  }
  // The row of a token's keys (which = 0) or values (1); null where the table has no page for it.
  SJD_INLINE char* row(int64_t layer, int64_t sequence, int64_t token, int64_t which) const {
    const int64_t entry = divide(token, page_size).quotient;
    if (entry >= table_width) return nullptr;
    const int32_t number = block_table[sequence * table_width + entry];
    if (number < 0) return nullptr;
    return page(layer, number) + (which * page_size + token - entry * page_size) * row_bytes;
  }
};

struct alignas(16) Chunk {
  uint32_t word[4];
};

// All addresses and lengths are multiples of a chunk.
inline bool all_wide(std::initializer_list<int64_t> values) {
  return std::all_of(values.begin(), values.end(), [](int64_t value) { return value % sizeof(Chunk) == 0; });
}
inline int64_t number(const void* address) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address)); }

// 16 bytes at a time where `wide` says that all addresses and lengths are multiples of it, else 2.
SJD_INLINE void copy_bytes(char* to, const char* from, int64_t bytes, bool wide, int lane, int lanes) {
  if (wide) {
    for (int64_t i = lane; i < bytes / 16; i += lanes) {
      reinterpret_cast<Chunk*>(to)[i] = reinterpret_cast<const Chunk*>(from)[i];
    }
  } else {
    for (int64_t i = lane; i < bytes / 2; i += lanes) {
      reinterpret_cast<uint16_t*>(to)[i] = reinterpret_cast<const uint16_t*>(from)[i];
    }
  }
}

// 0x7fff is NaN in float16 and in bfloat16, and twice of it is NaN in float32.
SJD_INLINE void fill_words(char* to, uint16_t word, int64_t bytes, int lane, int lanes) {
  for (int64_t i = lane; i < bytes / 2; i += lanes) reinterpret_cast<uint16_t*>(to)[i] = word;
}
constexpr uint16_t kNaNWord = 0x7fff;

// Write the next num_new tokens of every sequence behind its context, keys rotated by their positions where a table is
// given. The lengths do not move.
struct AppendKV {
  PagedKV kv;  // of one layer
  const char *keys, *values;
  int64_t sequence_stride, token_stride;  // of keys and values, in bytes
  const int32_t* context_lens;            // [S]
  const int32_t* num_valid;               // [S] tokens of num_new that exist, or null: all
  const float *cos, *sin;                 // [S, num_new, head_dim] of a rotary table, or null: keys are copied
  DType dtype;
  int64_t num_new, head_dim;
  bool wide;

  SJD_INLINE int64_t count() const { return kv.num_sequences * num_new * 2; }
  SJD_INLINE int64_t bytes() const { return count() * kv.row_bytes; }
  SJD_INLINE void operator()(int64_t item, int lane, int lanes) const {
    const auto [s, i] = divide(item >> 1, num_new);
    const int64_t which = item & 1;
    if (num_valid && i >= num_valid[s]) return;
    char* to = kv.row(0, s, context_lens[s] + i, which);
    if (to == nullptr) return;
    const char* from = (which ? values : keys) + s * sequence_stride + i * token_stride;
    if (which == 1 || cos == nullptr) return copy_bytes(to, from, kv.row_bytes, wide, lane, lanes);
    if (dtype == DType::kFloat32) {
      rotate<Float32>(to, from, s * num_new + i, lane, lanes);
    } else if (dtype == DType::kFloat16) {
      rotate<Float16>(to, from, s * num_new + i, lane, lanes);
    } else {
      rotate<BFloat16>(to, from, s * num_new + i, lane, lanes);
    }
  }

  // x * cos + roll(x, head_dim / 2) * sin of every head x of a row, in float32, rounded once.
  template <class T>
  SJD_INLINE void rotate(char* to, const char* from, int64_t table_row, int lane, int lanes) const {
    using Storage = typename T::Storage;
    const int half = static_cast<int>(head_dim / 2), head_bytes = static_cast<int>(head_dim * sizeof(Storage));
    for (int64_t head = 0; head < kv.row_bytes; head += head_bytes) {
      for (int side = 0; side < 2; ++side) {
        const Storage* x = reinterpret_cast<const Storage*>(from + head) + side * half;
        const Storage* other = reinterpret_cast<const Storage*>(from + head) + (1 - side) * half;
        Storage* y = reinterpret_cast<Storage*>(to + head) + side * half;
        const float *c = cos + table_row * head_dim + side * half, *s = sin + table_row * head_dim + side * half;
        for (int j = lane; j < half; j += lanes) y[j] = T::narrow(T::widen(x[j]) * c[j] + T::widen(other[j]) * s[j]);
      }
    }
  }
};

// context_lens[s] = prefix_lens[s] + num_committed[s / copies]: after a verified pass the cache is valid up to the
// token before the anchor, the last committed one. What lies behind is overwritten by the next pass.
struct AdvanceRollback {
  int32_t* context_lens;         // [S]
  const int32_t* prefix_lens;    // [S] prompt tokens but the last
  const int64_t* num_committed;  // [S / copies]
  int64_t num_sequences, copies;

  SJD_INLINE int64_t count() const { return num_sequences; }
  SJD_INLINE int64_t bytes() const { return num_sequences * 16; }
  SJD_INLINE void operator()(int64_t s, int lane, int) const {
    if (lane == 0) context_lens[s] = prefix_lens[s] + static_cast<int32_t>(num_committed[divide(s, copies).quotient]);
  }
};

// Token context_lens[s] + from_slots[s / copies][l] becomes token context_lens[s] + 1 + l, in all layers: the accepted
// path of a tree joins its context. No slot that is read is written.
struct CompactKV {
  PagedKV kv;
  const int32_t* context_lens;  // [S]
  const int64_t* from_slots;    // [S / copies, num_levels]
  int64_t copies, num_levels, num_layers;
  bool wide;

  SJD_INLINE int64_t count() const { return num_layers * kv.num_sequences * num_levels * 2; }
  SJD_INLINE int64_t bytes() const { return count() * kv.row_bytes; }
  SJD_INLINE void operator()(int64_t item, int lane, int lanes) const {
    const auto [table, level] = divide(item >> 1, num_levels);
    const auto [layer, s] = divide(table, kv.num_sequences);
    const int64_t which = item & 1, slot = from_slots[divide(s, copies).quotient * num_levels + level];
    if (slot == level + 1) return;
    const char* from = kv.row(layer, s, context_lens[s] + slot, which);
    char* to = kv.row(layer, s, context_lens[s] + 1 + level, which);
    if (from != nullptr && to != nullptr) copy_bytes(to, from, kv.row_bytes, wide, lane, lanes);
  }
};

// Copy whole pages in all layers: what PageAllocator's fork and own ask for.
struct CopyPages {
  PagedKV kv;
  const int32_t* copies;  // [num_copies, 2]: from, to
  int64_t num_copies, num_layers;
  bool wide;

  SJD_INLINE int64_t count() const { return num_copies * num_layers; }
  SJD_INLINE int64_t bytes() const { return count() * kv.page_bytes(); }
  SJD_INLINE void operator()(int64_t item, int lane, int lanes) const {
    const auto [layer, copy] = divide(item, num_copies);
    const int32_t* pair = copies + copy * 2;
    copy_bytes(kv.page(layer, pair[1]), kv.page(layer, pair[0]), kv.page_bytes(), wide, lane, lanes);
  }
};

// out[which][s][t] = the row of token t < context_lens[s] + num_new; zeros from there to `span`.
struct GatherKV {
  PagedKV kv;                   // of one layer
  char* out;                    // [2, S, span, row_bytes]
  const int32_t* context_lens;  // [S]
  int64_t num_new, span;
  bool wide;

  SJD_INLINE int64_t count() const { return 2 * kv.num_sequences * span; }
  SJD_INLINE int64_t bytes() const { return count() * kv.row_bytes; }
  SJD_INLINE void operator()(int64_t item, int lane, int lanes) const {
    const auto [table, token] = divide(item, span);
    const auto [which, s] = divide(table, kv.num_sequences);
    const char* from = token < context_lens[s] + num_new ? kv.row(0, s, token, which) : nullptr;
    char* to = out + item * kv.row_bytes;
    if (from != nullptr) {
      copy_bytes(to, from, kv.row_bytes, wide, lane, lanes);
    } else {
      fill_words(to, 0, kv.row_bytes, lane, lanes);
    }
  }
};

// NaN into the `num_slots` slots behind every sequence's context: whatever reads a rejected token shows it.
struct PoisonKV {
  PagedKV kv;
  const int32_t* context_lens;  // [S]
  int64_t num_slots, num_layers;

  SJD_INLINE int64_t count() const { return num_layers * kv.num_sequences * num_slots * 2; }
  SJD_INLINE int64_t bytes() const { return count() * kv.row_bytes; }
  SJD_INLINE void operator()(int64_t item, int lane, int lanes) const {
    const auto [table, i] = divide(item >> 1, num_slots);
    const auto [layer, s] = divide(table, kv.num_sequences);
    const int64_t which = item & 1;
    char* to = kv.row(layer, s, context_lens[s] + i, which);
    if (to != nullptr) fill_words(to, kNaNWord, kv.row_bytes, lane, lanes);
  }
};

// On `num_threads` threads of the CPU.
void run_cpu(const AppendKV& op, int num_threads);
void run_cpu(const AdvanceRollback& op, int num_threads);
void run_cpu(const CompactKV& op, int num_threads);
void run_cpu(const CopyPages& op, int num_threads);
void run_cpu(const GatherKV& op, int num_threads);
void run_cpu(const PoisonKV& op, int num_threads);

// One launch on a stream of a CUDA device, which is not waited for. Throws std::runtime_error with CUDA's own message.
void run_cuda(const AppendKV& op, int device, void* stream);
void run_cuda(const AdvanceRollback& op, int device, void* stream);
void run_cuda(const CompactKV& op, int device, void* stream);
void run_cuda(const CopyPages& op, int device, void* stream);
void run_cuda(const GatherKV& op, int device, void* stream);
void run_cuda(const PoisonKV& op, int device, void* stream);

}  // namespace sjd
