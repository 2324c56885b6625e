// sjd.h on top of the ops: what a decoding batch and a cache carry from call to call, and exceptions as error codes.
#include "sjd.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "attention_cpu.h"
#include "check.h"
#include "page_allocator.h"
#include "paged_kv.h"
#include "philox.h"
#include "verify_cpu.h"

namespace {

using namespace sjd;

constexpr int64_t kMost = INT32_MAX;

thread_local char last_error[512] = "";

sjd_status failed(sjd_status status, const char* what) {
  std::snprintf(last_error, sizeof last_error, "%s", what);
  return status;
}

// What `body` throws as an error code.
template <class Body>
sjd_status guarded(Body body) noexcept {
  try {
    body();
    return SJD_OK;
  } catch (const std::invalid_argument& error) {
    return failed(SJD_INVALID_ARGUMENT, error.what());
  } catch (const PagesExhausted& error) {
    return failed(SJD_OUT_OF_PAGES, error.what());
  } catch (const std::bad_alloc&) {
    return failed(SJD_OUT_OF_MEMORY, "the system has no more memory");
  } catch (const std::exception& error) {
    return failed(SJD_FAILURE, error.what());
  }
}

template <class T>
T* required(const char* op, const char* argument, T* pointer) {
  check(pointer != nullptr, op, argument, "an address", "null");
  return pointer;
}

// A struct of the caller's version: what this one has behind it is 0.
template <class T>
T read_struct(const char* op, const char* argument, const T* given) {
  const size_t size = required(op, argument, given)->size;
  check(size >= sizeof(size_t) && size <= sizeof(T), op, argument,
        "a struct of at most " + text(sizeof(T)) + " bytes that begins with its size", text(size),
        "set `size` to sizeof it, and link the library that the header came with or a later one");
  T known{};
  std::memcpy(&known, given, size);
  return known;
}

// `value`, or what 0 stands for.
template <class T>
T or_default(T value, T fallback) {
  return value == 0 ? fallback : value;
}

void check_above_zero(const char* op, const char* argument, float value) {
  check(value > 0 && std::isfinite(value), op, argument, "> 0 and finite", text(value));
}

DType dtype_of(const char* op, int32_t dtype) {
  check_range(op, "dtype", dtype, SJD_FLOAT32, SJD_BFLOAT16);
  return static_cast<DType>(dtype);
}

struct Rule {
  Accept accept;
  Refresh refresh;
};

// By sjd_method: the twin of sjd_engine/methods.py.
constexpr Rule kRules[] = {
    {Accept::kRatio, Refresh::kMaximal}, {Accept::kMatch, Refresh::kGumbel}, {Accept::kMatch, Refresh::kArgmax},
    {Accept::kRatio, Refresh::kFresh},   {Accept::kRatio, Refresh::kReuse},  {Accept::kRatio, Refresh::kGumbel},
    {Accept::kMatch, Refresh::kGumbel},
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------- decoder

struct sjd_decoder {
  explicit sjd_decoder(const sjd_decoder_options& options) {
    constexpr const char* kOp = "sjd_decoder_create";
    batch_size = or_default<int64_t>(options.batch_size, 1);
    num_tokens = options.num_tokens;
    const int64_t window = options.method == SJD_AR ? 1 : or_default<int64_t>(options.window_size, 1);
    check_range(kOp, "batch_size", batch_size, 1, kMost);
    check_range(kOp, "num_tokens", num_tokens, 1, kMost);
    check_range(kOp, "window_size", window, 1, kMost);
    check_range(kOp, "vocab_size", options.vocab_size, 2, 1 << 18);
    check_range(kOp, "method", options.method, SJD_MAXIMAL, SJD_EXACT);
    check_range(kOp, "init", options.init, SJD_RANDOM, SJD_ABOVE_SAMPLE);
    check_range(kOp, "top_k", options.top_k, 0, INT64_MAX);
    check_range(kOp, "num_threads", options.num_threads, 0, kMost);
    set_warping(kOp, options);
    set_grid(kOp, options);
    seeds.resize(batch_size);
    for (int64_t b = 0; b < batch_size; ++b) seeds[b] = options.seeds ? options.seeds[b] : b;
    set_state(window);

    params.batch_size = batch_size;
    params.num_tokens = num_tokens;
    params.window_size = params.next_window_size = params.max_window_size = window;
    params.vocab_size = static_cast<int>(options.vocab_size);
    params.tree = {1, 1};
    params.seeds = seeds.data();
    params.accept = kRules[options.method].accept;
    params.refresh = kRules[options.method].refresh;
    params.init = static_cast<Init>(options.init);
    params.num_threads = or_default<int>(options.num_threads, 1);
    draw_first_drafts();
  }

  sjd_decoder(const sjd_decoder&) = delete;

  int64_t* row_tokens(int64_t b) { return tokens.data() + b * (1 + num_tokens + 2 * params.max_window_size) + 1; }
  const int64_t* row_tokens(int64_t b) const { return const_cast<sjd_decoder*>(this)->row_tokens(b); }
  bool guided() const { return params.guidance_scale != nullptr; }
  bool done() const {
    return std::all_of(num_committed.begin(), num_committed.end(), [this](int64_t n) { return n == num_tokens; });
  }

  // What the caller's logits are to the op; throws where they cannot be read, or where the last ones are lost.
  Logits view(const char* op, const sjd_logits& logits) const {
    required(op, "logits.data", logits.data);
    const DType dtype = dtype_of(op, logits.dtype);
    int64_t strides[4];
    std::copy_n(logits.strides, 4, strides);
    if (std::all_of(strides, strides + 4, [](int64_t stride) { return stride == 0; })) {
      strides[3] = 1;
      strides[2] = params.vocab_size;
      strides[1] = strides[2] * params.window_size;
      strides[0] = strides[1] * batch_size;
    }
    const Logits& last = params.previous_logits;
    check(!last.data || last.data != logits.data, op, "logits.data",
          "memory of its own, for the last pass's is still read", "the last pass's", "let two buffers take turns");
    check(!last.data || last.dtype == dtype, op, "logits.dtype", "that of the last pass", text(logits.dtype));
    return {logits.data, dtype, guided(), strides[0], strides[1], strides[2], strides[3]};
  }

  void verify(const Logits& logits) {
    params.logits = logits;
    verify_cpu(params);
    if (params.accept == Accept::kRatio && params.max_window_size > 1) params.previous_logits = logits;
  }

  // Parameters that change nothing stay null, as `SamplingParams.warp_arguments` has it.
  void set_warping(const char* op, const sjd_decoder_options& options) {
    const float scale = or_default(options.guidance_scale, 1.0f), heat = or_default(options.temperature, 1.0f);
    const float mass = or_default(options.top_p, 1.0f), threshold = or_default(options.reuse_threshold, 0.5f);
    check(scale >= 1 && std::isfinite(scale), op, "guidance_scale", ">= 1 and finite", text(scale));
    check_above_zero(op, "temperature", heat);
    check_above_zero(op, "reuse_threshold", threshold);
    check(mass > 0 && mass <= 1, op, "top_p", "in (0, 1]", text(mass));
    const auto column = [this](auto& values, auto value, bool in_use) {
      if (in_use) values.assign(batch_size, value);
      return in_use ? values.data() : nullptr;
    };
    params.guidance_scale = column(guidance_scale, scale, scale > 1);
    params.temperature = column(temperature, heat, heat != 1);
    params.top_k = column(top_k, options.top_k, 0 < options.top_k && options.top_k < options.vocab_size);
    params.top_p = column(top_p, mass, mass < 1);
    params.reuse_threshold = column(reuse_threshold, threshold, true);
  }

  // The twin of `Schedule.grid`.
  void set_grid(const char* op, const sjd_decoder_options& options) {
    std::vector<int64_t> positions;  // of image tokens
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (!options.forced_ids || options.forced_ids[t] < 0) positions.push_back(t);
    }
    const int64_t num_image_tokens = static_cast<int64_t>(positions.size());
    const int64_t cols = or_default(options.cols, std::max<int64_t>(1, num_image_tokens));
    check(cols > 0 && num_image_tokens > 0 && num_image_tokens % cols == 0, op, "cols",
          "a divisor of the " + text(num_image_tokens) + " tokens that are not forced", text(options.cols));
    row_start.assign(num_tokens, -1);
    above.assign(num_tokens, -1);
    for (int64_t i = 0; i < num_image_tokens; ++i) {
      row_start[positions[i]] = positions[i / cols * cols];
      if (i >= cols) above[positions[i]] = positions[i - cols];
    }
    if (options.forced_ids) forced_ids.assign(options.forced_ids, options.forced_ids + num_tokens);
    params.forced_ids = options.forced_ids ? forced_ids.data() : nullptr;
    params.row_start = row_start.data();
    params.above = above.data();
  }

  void set_state(int64_t window) {
    const int64_t width = 1 + num_tokens + 2 * window;
    tokens.assign(batch_size * width, 0);
    for (int64_t b = 0; b < batch_size; ++b) tokens[b * width] = -1;
    for (auto* counter : {&num_committed, &iteration, &counters[0], &counters[1], &counters[2], &num_accepted}) {
      counter->assign(batch_size, 0);
    }
    commit_pass.assign(batch_size * (num_tokens + window), -1);
    law_row.assign(batch_size * window, -1);  // uniform
    laws.assign(2 * batch_size * window, RowLaw{});
    params.tokens = tokens.data();
    params.num_committed = num_committed.data();
    params.iteration = iteration.data();
    params.commit_pass = commit_pass.data();
    params.law_row = law_row.data();
    params.laws = laws.data();
    params.zero_residual = counters[0].data();
    params.nonfinite_rows = counters[1].data();
    params.zero_draft_prob = counters[2].data();
    params.num_accepted = num_accepted.data();
  }

  // Uniform, whatever the init: the twin of `reference.start`.
  void draw_first_drafts() {
    for (int64_t b = 0; b < batch_size; ++b) {
      for (int64_t t = 0; t < std::min(params.window_size - 1, num_tokens); ++t) {
        const uint64_t word = philox(seeds[b], t, 0, kWindow).word[kInit];
        const bool is_forced = params.forced_ids && params.forced_ids[t] >= 0;
        row_tokens(b)[t] = is_forced ? params.forced_ids[t] : static_cast<int64_t>((word * params.vocab_size) >> 32);
      }
    }
  }

  int64_t batch_size, num_tokens;
  VerifyParams params{};  // its pointers are those of the vectors below
  std::vector<int64_t> tokens, num_committed, iteration, commit_pass, counters[3], num_accepted;
  std::vector<int64_t> seeds, forced_ids, row_start, above, top_k;
  std::vector<float> guidance_scale, temperature, top_p, reuse_threshold;
  std::vector<int32_t> law_row;
  std::vector<RowLaw> laws;
};

// ------------------------------------------------------------------------------------------------------------ cache

struct sjd_cache {
  explicit sjd_cache(const sjd_cache_options& options)
      : num_threads(or_default<int>(options.num_threads, 1)),
        dtype(dtype_of(kCreate, options.dtype)),
        num_layers(positive("num_layers", or_default<int64_t>(options.num_layers, 1))),
        num_kv_heads(positive("num_kv_heads", options.num_kv_heads)),
        head_dim(positive("head_dim", options.head_dim)),
        num_sequences(positive("num_sequences", or_default<int64_t>(options.num_sequences, 1))),
        page_size(positive("page_size", or_default<int64_t>(options.page_size, 64))),
        table_width((positive("capacity", options.capacity) + page_size - 1) / page_size),
        allocator(positive("num_pages", or_default(options.num_pages, num_sequences * table_width)), page_size),
        block_table(num_sequences * table_width, -1),
        lengths(num_sequences, 0),
        sequences(num_sequences, kNone) {
    check_range(kCreate, "num_threads", num_threads, 1, kMost);
    const int64_t size = dtype == DType::kFloat32 ? 4 : 2, num_pages = allocator.num_pages();
    const double bytes = 2.0 * size * num_layers * num_pages * page_size * num_kv_heads * head_dim;
    check(bytes < 0x1p47, kCreate, "the cache", "smaller than 2^47 bytes", text(bytes));
    const int64_t row_bytes = num_kv_heads * head_dim * size;
    kv = {nullptr, block_table.data(), num_sequences, table_width, num_pages, page_size, row_bytes};
    pages.reset(new (std::align_val_t{kAlignment}) char[num_layers * num_pages * kv.page_bytes()]);
    kv.pages = pages.get();
  }

  // The pages of one layer.
  PagedKV layer(const char* op, int64_t number) const {
    check_range(op, "layer", number, 0, num_layers - 1);
    PagedKV one = kv;
    one.pages = kv.page(number, 0);
    return one;
  }

  // The sequence in `row`; kNone where there should be none.
  int64_t sequence(const char* op, int64_t row, bool taken = true) const {
    check_range(op, "row", row, 0, num_sequences - 1);
    check((sequences[row] != kNone) == taken, op, "row", taken ? "taken" : "free", text(row));
    return sequences[row];
  }

  // Tokens that the pages of `row` hold.
  int64_t room(int64_t row) const {
    return sequences[row] == kNone ? 0 : static_cast<int64_t>(allocator.pages(sequences[row]).size()) * page_size;
  }

  void check_capacity(const char* op, int64_t capacity) const {
    check_range(op, "capacity", capacity, 1, table_width * page_size);
  }

  void seat(int64_t row, int64_t sequence, int64_t length) {
    sequences[row] = sequence;
    lengths[row] = static_cast<int32_t>(length);
    write_table(row);
  }

  void write_table(int64_t row) {
    int32_t* table = block_table.data() + row * table_width;
    std::fill_n(table, table_width, -1);
    if (sequences[row] == kNone) return;
    const std::vector<int32_t>& numbers = allocator.pages(sequences[row]);
    std::copy(numbers.begin(), numbers.end(), table);
  }

  void copy(const PageAllocator::Copies& copies) {
    if (copies.empty()) return;
    std::vector<int32_t> pairs;
    for (const auto& [from, to] : copies) pairs.insert(pairs.end(), {from, to});
    const bool wide = all_wide({number(kv.pages), kv.row_bytes});
    run(CopyPages{kv, pairs.data(), static_cast<int64_t>(copies.size()), num_layers, wide});
  }

  template <class Op>
  void run(const Op& op) const {
    check_range("sjd_cache", "the number of rows", op.count(), 0, UINT32_MAX);
    run_cpu(op, num_threads);
  }

  static constexpr int64_t kNone = -1;
  static constexpr size_t kAlignment = 64;
  static constexpr const char* kCreate = "sjd_cache_create";
  static int64_t positive(const char* argument, int64_t value) {
    check_range(kCreate, argument, value, 1, kMost);
    return value;
  }
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{kAlignment}); }
  };

  int num_threads;
  DType dtype;
  int64_t num_layers, num_kv_heads, head_dim, num_sequences, page_size, table_width;
  PageAllocator allocator;
  std::vector<int32_t> block_table, lengths;
  std::vector<int64_t> sequences;
  std::unique_ptr<char[], Free> pages;
  PagedKV kv;  // of all layers
};

// ------------------------------------------------------------------------------------------------------ the functions

extern "C" {

const char* sjd_last_error(void) { return last_error; }

sjd_status sjd_decoder_create(const sjd_decoder_options* options, sjd_decoder** decoder) {
  return guarded([&] {
    *required("sjd_decoder_create", "decoder", decoder) =
        new sjd_decoder(read_struct("sjd_decoder_create", "options", options));
  });
}

void sjd_decoder_destroy(sjd_decoder* decoder) { delete decoder; }

int sjd_decoder_done(const sjd_decoder* decoder) { return decoder->done(); }

sjd_status sjd_decoder_window(const sjd_decoder* decoder, int64_t* ids, int64_t* positions) {
  return guarded([&] {
    const sjd_decoder& self = *required("sjd_decoder_window", "decoder", decoder);
    required("sjd_decoder_window", "ids", ids);
    required("sjd_decoder_window", "positions", positions);
    const int64_t window = self.params.window_size;
    for (int64_t b = 0; b < self.batch_size; ++b) {
      for (int64_t i = 0; i < window; ++i) {
        const int64_t position = self.num_committed[b] + i - 1;
        const bool past = position >= self.num_tokens;
        ids[b * window + i] = past ? 0 : self.row_tokens(b)[position];
        positions[b * window + i] = past ? self.num_tokens : position;
      }
    }
  });
}

sjd_status sjd_decoder_verify(sjd_decoder* decoder, const sjd_logits* logits, int64_t* num_committed) {
  return guarded([&] {
    sjd_decoder& self = *required("sjd_decoder_verify", "decoder", decoder);
    self.verify(self.view("sjd_decoder_verify", read_struct("sjd_decoder_verify", "logits", logits)));
    if (num_committed) std::copy(self.num_committed.begin(), self.num_committed.end(), num_committed);
  });
}

sjd_status sjd_decoder_read(const sjd_decoder* decoder, int64_t* tokens, int64_t* passes) {
  return guarded([&] {
    const sjd_decoder& self = *required("sjd_decoder_read", "decoder", decoder);
    for (int64_t b = 0; tokens && b < self.batch_size; ++b) {
      std::copy_n(self.row_tokens(b), self.num_committed[b], tokens + b * self.num_tokens);
      std::fill_n(tokens + b * self.num_tokens + self.num_committed[b], self.num_tokens - self.num_committed[b], -1);
    }
    if (passes) std::copy(self.iteration.begin(), self.iteration.end(), passes);
  });
}

sjd_status sjd_cache_create(const sjd_cache_options* options, sjd_cache** cache) {
  return guarded([&] {
    *required("sjd_cache_create", "cache", cache) = new sjd_cache(read_struct("sjd_cache_create", "options", options));
  });
}

void sjd_cache_destroy(sjd_cache* cache) { delete cache; }

sjd_status sjd_cache_admit(sjd_cache* cache, int64_t row, const int64_t* prompt, int64_t prompt_size, int64_t capacity,
                           int64_t* num_cached) {
  return guarded([&] {
    constexpr const char* kOp = "sjd_cache_admit";
    sjd_cache& self = *required(kOp, "cache", cache);
    self.sequence(kOp, row, false);
    self.check_capacity(kOp, capacity);
    check_range(kOp, "prompt_size", prompt_size, 0, capacity);
    if (prompt_size > 0) required(kOp, "prompt", prompt);
    const auto [sequence, cached] = self.allocator.admit({prompt, prompt + prompt_size}, capacity);
    self.seat(row, sequence, cached);
    if (num_cached) *num_cached = cached;
  });
}

sjd_status sjd_cache_publish(sjd_cache* cache, int64_t row, int64_t num_tokens) {
  return guarded([&] {
    sjd_cache& self = *required("sjd_cache_publish", "cache", cache);
    self.allocator.publish(self.sequence("sjd_cache_publish", row), num_tokens);
  });
}

sjd_status sjd_cache_fork(sjd_cache* cache, int64_t row, int64_t into, int64_t num_tokens, int64_t capacity) {
  return guarded([&] {
    constexpr const char* kOp = "sjd_cache_fork";
    sjd_cache& self = *required(kOp, "cache", cache);
    const int64_t parent = self.sequence(kOp, row);
    self.sequence(kOp, into, false);
    self.check_capacity(kOp, capacity);
    const auto [child, copies] = self.allocator.fork(parent, num_tokens, capacity);
    self.copy(copies);
    self.seat(into, child, num_tokens);
  });
}

sjd_status sjd_cache_own(sjd_cache* cache, int64_t row, int64_t first) {
  return guarded([&] {
    sjd_cache& self = *required("sjd_cache_own", "cache", cache);
    self.copy(self.allocator.own(self.sequence("sjd_cache_own", row), first));
    self.write_table(row);
  });
}

sjd_status sjd_cache_release(sjd_cache* cache, int64_t row) {
  return guarded([&] {
    sjd_cache& self = *required("sjd_cache_release", "cache", cache);
    self.allocator.release(self.sequence("sjd_cache_release", row));
    self.seat(row, sjd_cache::kNone, 0);
  });
}

sjd_status sjd_cache_append(sjd_cache* cache, int64_t layer, const void* keys, const void* values, int64_t num_new) {
  return guarded([&] {
    constexpr const char* kOp = "sjd_cache_append";
    sjd_cache& self = *required(kOp, "cache", cache);
    check_range(kOp, "num_new", num_new, 1, kMost);
    AppendKV op{};
    op.kv = self.layer(kOp, layer);
    op.keys = static_cast<const char*>(keys);
    op.values = static_cast<const char*>(values);
    required(kOp, "keys", op.keys);
    required(kOp, "values", op.values);
    op.token_stride = op.kv.row_bytes;
    op.sequence_stride = num_new * op.token_stride;
    op.context_lens = self.lengths.data();
    op.dtype = self.dtype;
    op.num_new = num_new;
    op.head_dim = self.head_dim;
    op.wide = all_wide({number(op.kv.pages), op.kv.row_bytes, number(op.keys), number(op.values)});
    self.run(op);
  });
}

sjd_status sjd_cache_attend(const sjd_cache* cache, int64_t layer, const void* queries, int64_t num_heads,
                            int64_t num_new, float scale, void* out) {
  return guarded([&] {
    constexpr const char* kOp = "sjd_cache_attend";
    const sjd_cache& self = *required(kOp, "cache", cache);
    check_range(kOp, "num_new", num_new, 1, kMost);
    check(num_heads > 0 && num_heads % self.num_kv_heads == 0, kOp, "num_heads",
          "a multiple of num_kv_heads = " + text(self.num_kv_heads), text(num_heads));
    check(queries && out, kOp, "queries and out", "addresses", "null");
    WindowAttention op{};
    op.kv = self.layer(kOp, layer);
    op.dtype = self.dtype;
    op.queries = queries;
    op.head_stride = self.head_dim;
    op.token_stride = num_heads * op.head_stride;
    op.sequence_stride = num_new * op.token_stride;
    op.out = out;
    op.context_lens = self.lengths.data();
    op.num_new = num_new;
    op.num_heads = num_heads;
    op.num_kv_heads = self.num_kv_heads;
    op.head_dim = self.head_dim;
    op.scale = or_default(scale, static_cast<float>(1 / std::sqrt(static_cast<double>(self.head_dim))));
    attend_cpu(op, self.num_threads);
  });
}

sjd_status sjd_cache_gather(const sjd_cache* cache, int64_t layer, int64_t num_new, int64_t span, void* out) {
  return guarded([&] {
    constexpr const char* kOp = "sjd_cache_gather";
    const sjd_cache& self = *required(kOp, "cache", cache);
    check_range(kOp, "num_new", num_new, 0, kMost);
    check_range(kOp, "span", span, 1, kMost);
    GatherKV op{self.layer(kOp, layer), static_cast<char*>(out), self.lengths.data(), num_new, span, false};
    required(kOp, "out", op.out);
    op.wide = all_wide({number(op.kv.pages), op.kv.row_bytes, number(op.out)});
    self.run(op);
  });
}

sjd_status sjd_cache_rollback(sjd_cache* cache, const int64_t* lengths) {
  return guarded([&] {
    sjd_cache& self = *required("sjd_cache_rollback", "cache", cache);
    required("sjd_cache_rollback", "lengths", lengths);
    for (int64_t s = 0; s < self.num_sequences; ++s) {
      check_range("sjd_cache_rollback", "every length", lengths[s], 0, self.room(s));
    }
    std::copy_n(lengths, self.num_sequences, self.lengths.begin());
  });
}

sjd_status sjd_cache_read(const sjd_cache* cache, int64_t* lengths, int64_t* num_free_pages) {
  return guarded([&] {
    const sjd_cache& self = *required("sjd_cache_read", "cache", cache);
    if (lengths) std::copy(self.lengths.begin(), self.lengths.end(), lengths);
    if (num_free_pages) *num_free_pages = self.allocator.num_free();
  });
}

}  // extern "C"
