// The C++ of csrc without Python, for AddressSanitizer and UndefinedBehaviorSanitizer: random calls against the
// simplest model of each part. Every buffer has exactly the size that is promised. Prints what differs and exits
// with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <optional>
#include <random>
#include <vector>

#include "attention_cpu.h"
#include "layers_cpu.h"
#include "linear_cpu.h"
#include "page_allocator.h"
#include "paged_kv.h"
#include "verify_cpu.h"

using namespace sjd;

namespace {

std::mt19937_64 generator;

int64_t integer(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }
template <class T>
T pick(std::initializer_list<T> values) {
  return *std::next(values.begin(), integer(0, values.size() - 1));
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "differs: %s\n", what);
  std::exit(1);
}

// ------------------------------------------------------------------------------------------------- page allocator

// A sequence as the list of what it wrote, against the slots of the pool.
class Books {
 public:
  Books() : size_(integer(1, 4)), pool_(integer(1, 12), size_), slots_(pool_.num_pages() * size_) {}

  void step() {
    const auto chosen = sequences_.empty() ? sequences_.end() : std::next(sequences_.begin(), integer(0, count() - 1));
    try {
      switch (chosen == sequences_.end() ? 0 : integer(0, 3)) {
        case 0:
          admit();
          break;
        case 1:
          fork(chosen->first, integer(0, chosen->second.size()));
          break;
        case 2:
          write(chosen->first, integer(0, chosen->second.size()));
          break;
        case 3:
          pool_.release(chosen->first);
          sequences_.erase(chosen);
      }
    } catch (const PagesExhausted&) {
      require(pool_.num_free() < needed_, "PagesExhausted where pages are free");
    }
    check();
  }

 private:
  using Values = std::vector<int64_t>;

  int64_t count() const { return static_cast<int64_t>(sequences_.size()); }
  int64_t capacity(int64_t least) const {
    return std::min(std::max<int64_t>(1, least) + integer(0, 8), pool_.num_pages() * size_);
  }
  int64_t& slot(int64_t sequence, int64_t token) {
    return slots_[pool_.pages(sequence)[token / size_] * size_ + token % size_];
  }

  void admit() {
    std::vector<int64_t> prompt(integer(0, std::min<int64_t>(9, pool_.num_pages() * size_)));
    for (int64_t& token : prompt) token = integer(0, 1);
    const int64_t length = static_cast<int64_t>(prompt.size()), most = capacity(length);
    needed_ = pool_.pages_needed(prompt, most);
    const auto [sequence, cached] = pool_.admit(prompt, most);
    Values values(pool_.pages(sequence).size() * size_);
    // The value of a prompt token is the prompt up to it, as keys and values are.
    int64_t value = 1;
    for (int64_t t = 0; t < length; ++t) values[t] = value = 2 * value + prompt[t];
    for (int64_t t = cached; t < static_cast<int64_t>(values.size()); ++t) slot(sequence, t) = values[t];
    sequences_[sequence] = values;
    pool_.publish(sequence, length);
  }

  void fork(int64_t parent, int64_t length) {
    const int64_t most = capacity(length);
    needed_ = pool_.pages_needed_to_fork(length, most);
    const auto [child, copies] = pool_.fork(parent, length, most);
    copy(copies);
    Values values(sequences_[parent].begin(), sequences_[parent].begin() + length);
    values.resize(pool_.pages(child).size() * size_);
    for (int64_t t = length; t < static_cast<int64_t>(values.size()); ++t) slot(child, t) = 0;
    sequences_[child] = values;
  }

  void write(int64_t sequence, int64_t first) {
    needed_ = pool_.num_pages() + 1;
    copy(pool_.own(sequence, first));
    Values& values = sequences_[sequence];
    for (int64_t t = first; t < static_cast<int64_t>(values.size()); ++t) {
      require(pool_.references(pool_.pages(sequence)[t / size_]) == 1, "a shared page is written");
      slot(sequence, t) = values[t] = ++fresh_;
    }
  }

  void copy(const PageAllocator::Copies& copies) {
    for (const auto& [from, to] : copies) std::copy_n(&slots_[from * size_], size_, &slots_[to * size_]);
  }

  void check() {
    pool_.check_invariants();
    for (const auto& [sequence, values] : sequences_) {
      for (size_t t = 0; t < values.size(); ++t) require(slot(sequence, t) == values[t], "what a sequence reads");
    }
  }

  int64_t size_;
  PageAllocator pool_;
  Values slots_;
  std::map<int64_t, Values> sequences_;
  int64_t needed_ = 0, fresh_ = int64_t{1} << 32;
};

// ------------------------------------------------------------------------------------------------------------ pages

std::vector<char> noise(int64_t bytes) {
  std::vector<char> result(bytes);
  for (char& byte : result) byte = static_cast<char>(integer(0, 255));
  return result;
}

// Pages of 16-bit or 32-bit elements, and tables with holes.
struct Cache {
  int64_t element = pick({2, 4}), layers = integer(1, 2), sequences = integer(1, 3), width = integer(1, 4);
  int64_t page_size = pick({1, 3, 16}), kv_heads = integer(1, 2), head_dim = 2 * pick<int64_t>({1, 4, 12, 16, 40});
  int64_t row = kv_heads * head_dim * element, num_pages = sequences * width;
  std::vector<int32_t> table = std::vector<int32_t>(num_pages), lens = std::vector<int32_t>(sequences);
  std::vector<char> pages = noise(layers * num_pages * 2 * page_size * row);

  Cache() {
    for (int64_t i = 0; i < num_pages; ++i) table[i] = static_cast<int32_t>(integer(0, 4) ? i : -1);
    for (int32_t& length : lens) length = static_cast<int32_t>(integer(0, width * page_size));
  }
  DType dtype() const { return element == 4 ? DType::kFloat32 : DType::kBFloat16; }
  bool wide() const { return row % 16 == 0; }
  PagedKV kv() { return {pages.data(), table.data(), sequences, width, num_pages, page_size, row}; }
  // Where a row lies in a copy of the pages; nothing where it has no page.
  std::optional<int64_t> offset(int64_t layer, int64_t s, int64_t token, int64_t which) const {
    if (token >= width * page_size || table[s * width + token / page_size] < 0) return std::nullopt;
    const int64_t page = layer * num_pages + table[s * width + token / page_size];
    return ((page * 2 + which) * page_size + token % page_size) * row;
  }
};

float value_at(const char* row, DType dtype, int64_t i) {
  if (dtype == DType::kBFloat16) {
    uint16_t x;
    std::memcpy(&x, row + 2 * i, sizeof x);
    return BFloat16::widen(x);
  }
  float x;
  std::memcpy(&x, row + 4 * i, sizeof x);
  return x;
}

void move_pages() {
  Cache cache;
  std::vector<char> expected = cache.pages;
  const int64_t num_new = integer(1, 9);
  const auto keys = noise(cache.sequences * num_new * cache.row), values = noise(keys.size());
  std::vector<int32_t> num_valid(cache.sequences);
  for (int32_t& valid : num_valid) valid = static_cast<int32_t>(integer(0, num_new));
  run_cpu(AppendKV{cache.kv(), keys.data(), values.data(), num_new * cache.row, cache.row, cache.lens.data(),
                   num_valid.data(), nullptr, nullptr, cache.dtype(), num_new, cache.head_dim, cache.wide()},
          2);
  for (int64_t s = 0; s < cache.sequences; ++s) {
    for (int64_t i = 0; i < num_valid[s]; ++i) {
      for (int64_t which : {0, 1}) {
        const auto to = cache.offset(0, s, cache.lens[s] + i, which);
        const auto& from = which ? values : keys;
        if (to) std::copy_n(&from[(s * num_new + i) * cache.row], cache.row, &expected[*to]);
      }
    }
  }
  require(cache.pages == expected, "append_kv");

  if (cache.num_pages > 1) {
    const std::vector<int32_t> copies{0, static_cast<int32_t>(cache.num_pages - 1)};
    run_cpu(CopyPages{cache.kv(), copies.data(), 1, cache.layers, cache.wide()}, 2);
    const int64_t bytes = 2 * cache.page_size * cache.row;
    for (int64_t layer = 0; layer < cache.layers; ++layer) {
      const auto first = expected.begin() + layer * cache.num_pages * bytes;
      std::copy_n(first, bytes, first + copies[1] * bytes);
    }
    require(cache.pages == expected, "copy_pages");
  }

  // Every level moves, or stays where it is; both tables of a slot may have holes.
  const int64_t levels = integer(1, 3);
  std::vector<int64_t> slots_of_path(levels);
  for (int64_t l = 0; l < levels; ++l) slots_of_path[l] = integer(0, 2) ? 4 + 3 * l + integer(0, 2) : l + 1;
  run_cpu(CompactKV{cache.kv(), cache.lens.data(), slots_of_path.data(), cache.sequences, levels, cache.layers,
                    cache.wide()},
          2);
  for (int64_t item = 0; item < cache.layers * cache.sequences * levels * 2; ++item) {
    const int64_t l = item / 2 % levels, table = item / 2 / levels;
    const int64_t s = table % cache.sequences, layer = table / cache.sequences;
    const auto from = cache.offset(layer, s, cache.lens[s] + slots_of_path[l], item % 2);
    const auto to = cache.offset(layer, s, cache.lens[s] + 1 + l, item % 2);
    if (from && to) std::copy_n(&expected[*from], cache.row, &expected[*to]);
  }
  require(cache.pages == expected, "compact_kv");

  const int64_t span = integer(1, cache.width * cache.page_size + 5);
  std::vector<char> out(2 * cache.sequences * span * cache.row), dense(out.size());
  run_cpu(GatherKV{cache.kv(), out.data(), cache.lens.data(), num_new, span, cache.wide()}, 2);
  for (int64_t item = 0; item < 2 * cache.sequences * span; ++item) {
    const int64_t which = item / span / cache.sequences, s = item / span % cache.sequences, token = item % span;
    const auto from = token < cache.lens[s] + num_new ? cache.offset(0, s, token, which) : std::nullopt;
    if (from) std::copy_n(&expected[*from], cache.row, &dense[item * cache.row]);
  }
  require(out == dense, "gather_kv");

  std::vector<int32_t> prefix(cache.sequences, 3);
  const std::vector<int64_t> committed(1, integer(0, 4));
  run_cpu(AdvanceRollback{cache.lens.data(), prefix.data(), committed.data(), cache.sequences, cache.sequences}, 2);
  require(cache.lens == std::vector<int32_t>(cache.sequences, static_cast<int32_t>(3 + committed[0])),
          "advance_rollback");

  const int64_t slots = integer(1, 20);
  run_cpu(PoisonKV{cache.kv(), cache.lens.data(), slots, cache.layers}, 2);
  for (int64_t layer = 0; layer < cache.layers; ++layer) {
    for (int64_t s = 0; s < cache.sequences; ++s) {
      for (int64_t i = 0; i < 2 * slots; ++i) {
        const auto to = cache.offset(layer, s, cache.lens[s] + i / 2, i % 2);
        if (!to) continue;
        for (int64_t e = 0; e < cache.row / cache.element; ++e) {
          require(std::isnan(value_at(&cache.pages[*to], cache.dtype(), e)), "poison_kv leaves a number");
        }
        std::copy_n(&cache.pages[*to], cache.row, &expected[*to]);
      }
    }
  }
  require(cache.pages == expected, "poison_kv");
}

// ----------------------------------------------------------------------------------------- rotation and attention

std::vector<char> normals(int64_t count, DType dtype) {
  std::vector<char> result(count * (dtype == DType::kFloat32 ? 4 : 2));
  for (int64_t i = 0; i < count; ++i) {
    const float x = normal();
    const uint16_t narrow = BFloat16::narrow(x);
    if (dtype == DType::kFloat32) std::memcpy(&result[4 * i], &x, 4);
    if (dtype == DType::kBFloat16) std::memcpy(&result[2 * i], &narrow, 2);
  }
  return result;
}

// A window is appended with rotated keys and attends to what stands before it; double sums over the model's rows.
void attend() {
  Cache cache;
  const DType dtype = cache.dtype();
  const int64_t num_new = integer(1, 20), group = integer(1, 3), heads = cache.kv_heads * group, dim = cache.head_dim;
  const double tolerance = dtype == DType::kFloat32 ? 1e-4 : 3e-2;
  cache.pages = normals(static_cast<int64_t>(cache.pages.size()) / cache.element, dtype);
  const int64_t tokens = cache.sequences * num_new;
  const auto keys = normals(tokens * cache.kv_heads * dim, dtype),
             values = normals(tokens * cache.kv_heads * dim, dtype);
  std::vector<float> cos(tokens * dim), sin(tokens * dim), bias(tokens * num_new);
  for (float& x : cos) x = normal();
  for (float& x : sin) x = normal();
  for (float& x : bias) x = integer(0, 2) ? normal() : -INFINITY;
  run_cpu(AppendKV{cache.kv(), keys.data(), values.data(), num_new * cache.row, cache.row, cache.lens.data(), nullptr,
                   cos.data(), sin.data(), dtype, num_new, dim, cache.wide()},
          2);
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t s = token / num_new;
    const auto to = cache.offset(0, s, cache.lens[s] + token % num_new, 0);
    for (int64_t i = 0; to && i < cache.kv_heads * dim; ++i) {
      const int64_t j = i % dim, other = j < dim / 2 ? i + dim / 2 : i - dim / 2;
      const char* key = &keys[token * cache.row];
      const double rotated = value_at(key, dtype, i) * static_cast<double>(cos[token * dim + j]) +
                             value_at(key, dtype, other) * static_cast<double>(sin[token * dim + j]);
      require(std::abs(value_at(&cache.pages[*to], dtype, i) - rotated) <= tolerance * (1 + std::abs(rotated)),
              "append_kv with rotation");
    }
  }

  const auto queries = normals(tokens * heads * dim, dtype);
  std::vector<char> out(queries.size());
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  const bool biased = integer(0, 1);
  attend_cpu({cache.kv(), dtype, queries.data(), num_new * heads * dim, heads * dim, dim, out.data(), cache.lens.data(),
              biased ? bias.data() : nullptr, num_new * num_new, num_new, heads, cache.kv_heads, dim, scale},
             2);
  for (int64_t row = 0; row < tokens * heads; ++row) {
    const int64_t token = row / heads, s = token / num_new, i = token % num_new, kv_head = row % heads / group;
    const char* query = &queries[row * dim * cache.element];
    std::vector<double> sums(dim);
    double total = 0;
    for (int64_t key = 0; key < cache.lens[s] + num_new; ++key) {
      const auto k = cache.offset(0, s, key, 0), v = cache.offset(0, s, key, 1);
      const int64_t in_window = key - cache.lens[s];
      if (!k || (!biased && in_window > i)) continue;
      double score = 0;
      for (int64_t e = 0; e < dim; ++e) {
        score += static_cast<double>(value_at(query, dtype, e)) * value_at(&cache.pages[*k], dtype, kv_head * dim + e);
      }
      const double added = biased && in_window >= 0 ? bias[(s * num_new + i) * num_new + in_window] : 0;
      const double weight = std::exp(score * scale + added);
      total += weight;
      for (int64_t e = 0; e < dim; ++e) sums[e] += weight * value_at(&cache.pages[*v], dtype, kv_head * dim + e);
    }
    for (int64_t e = 0; e < dim; ++e) {
      const double expected = total > 0 ? sums[e] / total : 0;
      const float got = value_at(&out[row * dim * cache.element], dtype, e);
      require(std::abs(got - expected) <= tolerance * (1 + std::abs(expected)), "window_attention");
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- layers

// What stands between products, in place and not, against double sums.
void layers() {
  const DType dtype = pick({DType::kFloat32, DType::kBFloat16});
  const int64_t rows = integer(1, 5), width = 2 * integer(1, 20), size = dtype == DType::kFloat32 ? 4 : 2;
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 2e-2;
  const auto x = normals(rows * width, dtype), y = normals(rows * width, dtype), weight = normals(width, dtype);
  const auto near = [&](const std::vector<char>& got, int64_t i, double expected, const char* what) {
    require(std::abs(value_at(got.data(), dtype, i) - expected) <= tolerance * (1 + std::abs(expected)), what);
  };
  std::vector<char> sum(x.size()), out(x.size());
  add_rms_norm_cpu({x.data(), y.data(), weight.data(), sum.data(), out.data(), dtype, rows, width, 1e-6f}, 2);
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (int64_t i = row * width; i < (row + 1) * width; ++i) {
      near(sum, i, static_cast<double>(value_at(x.data(), dtype, i)) + value_at(y.data(), dtype, i), "a sum");
      squares += std::pow(value_at(sum.data(), dtype, i), 2);
    }
    const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + 1e-6);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = row * width + i;
      near(out, at, value_at(sum.data(), dtype, at) * scale * value_at(weight.data(), dtype, i), "add_rms_norm");
    }
  }

  auto heads = x;  // one head a token
  rotate_cpu({heads.data(), rows * width, width, y.data(), sum.data(), dtype, 1, rows, 1, width}, 2);
  for (int64_t i = 0; i < rows * width; ++i) {
    const int64_t other = i % width < width / 2 ? i + width / 2 : i - width / 2;
    near(heads, i,
         static_cast<double>(value_at(x.data(), dtype, i)) * value_at(y.data(), dtype, i) +
             static_cast<double>(value_at(x.data(), dtype, other)) * value_at(sum.data(), dtype, i),
         "rotate");
  }

  std::vector<char> product(rows * width / 2 * size);
  silu_mul_cpu({x.data(), product.data(), dtype, rows, width / 2}, 2);
  for (int64_t i = 0; i < rows * width / 2; ++i) {
    const int64_t at = i / (width / 2) * width + i % (width / 2);
    const double gate = value_at(x.data(), dtype, at);
    near(product, i, gate / (1 + std::exp(-gate)) * value_at(x.data(), dtype, at + width / 2), "silu_mul");
  }
}

// A product with a matrix in panels, with and without bias, against double sums.
void linear() {
  const DType dtype = multiplies_panels() ? pick({DType::kFloat32, DType::kBFloat16}) : DType::kFloat32;
  const int64_t rows = integer(0, 8), depth = integer(1, 40), cols = integer(1, 150);
  const int64_t together = dtype == DType::kFloat32 ? 1 : 2, steps = (depth + together - 1) / together;
  const int64_t size = 4 / together;
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 2e-2;
  const auto x = normals(rows * depth, dtype), weight = normals(cols * depth, dtype), bias = normals(cols, dtype);
  std::vector<char> panels((cols + kPanel - 1) / kPanel * steps * kPanel * 4), out(rows * cols * size);
  for (int64_t col = 0; col < cols; ++col) {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t unit = (col / kPanel * steps + k / together) * kPanel + col % kPanel;
      std::memcpy(panels.data() + unit * 4 + k % together * size, weight.data() + (col * depth + k) * size, size);
    }
  }
  const bool biased = integer(0, 1);
  linear_cpu({x.data(), panels.data(), biased ? bias.data() : nullptr, out.data(), dtype, rows, depth, cols}, 2);
  for (int64_t i = 0; i < rows * cols; ++i) {
    double sum = biased ? value_at(bias.data(), dtype, i % cols) : 0.0, scale = 1.0;
    for (int64_t k = 0; k < depth; ++k) {
      const double product = static_cast<double>(value_at(x.data(), dtype, i / cols * depth + k)) *
                             value_at(weight.data(), dtype, i % cols * depth + k);
      sum += product;
      scale += std::abs(product);
    }
    require(std::abs(value_at(out.data(), dtype, i) - sum) <= tolerance * scale, "linear");
  }
}

// ----------------------------------------------------------------------------------------------------------- verify

// Whole images under random laws, with and without a tree: every pass commits a token at least, and only tokens of the
// vocabulary. Windows change from pass to pass.
void verify() {
  const bool match = integer(0, 1);
  const Tree tree = match || integer(0, 1) ? Tree{1, 1} : Tree{integer(2, 4), integer(2, 3)};
  const int64_t batch = integer(1, 3), total = integer(1, 9), vocab = pick({2, 33, 300});
  const int64_t most = integer(tree.depth, 6), levels = tree.depth - 1;
  std::vector<int64_t> tokens(batch * (1 + total + 2 * most)), committed(batch), iteration(batch), accepted(batch);
  std::vector<int64_t> commit_pass(batch * (total + most), -1), counters[3];
  for (auto& counter : counters) counter.resize(batch);
  std::vector<int32_t> law_row(batch * most, -1);
  std::vector<RowLaw> laws(2 * batch * most);
  std::vector<int64_t> siblings(batch * levels * (tree.candidates - 1), -1), accepted_slots(batch * levels);
  std::vector<int64_t> row_start(total), above(total, -1), seeds(batch), top_k(batch, vocab / 2 + 1);
  std::vector<float> guidance(batch, 3.0f), temperature(batch, 0.8f), top_p(batch, 0.9f), threshold(batch, 0.5f);
  for (int64_t& seed : seeds) seed = integer(0, 1000);
  std::vector<float> logits[2];
  Logits previous{};
  int64_t window = most;
  for (int64_t pass = 0; pass < total; ++pass) {
    const int64_t rows = window + tree.num_extra(), next_window = integer(tree.depth, most);
    logits[pass % 2].resize(2 * batch * rows * vocab);
    for (float& x : logits[pass % 2]) x = integer(0, 50) ? normal() : pick({NAN, INFINITY, -INFINITY});
    const Logits now = {logits[pass % 2].data(), DType::kFloat32, true, batch * rows * vocab, rows * vocab, vocab, 1};
    const std::vector<int64_t> before = committed;
    VerifyParams p{};
    p.logits = now;
    p.previous_logits = previous;
    p.batch_size = batch;
    p.num_tokens = total;
    p.window_size = window;
    p.next_window_size = next_window;
    p.max_window_size = most;
    p.vocab_size = static_cast<int>(vocab);
    p.tree = tree;
    p.tokens = tokens.data();
    p.num_committed = committed.data();
    p.iteration = iteration.data();
    p.commit_pass = commit_pass.data();
    p.law_row = law_row.data();
    p.laws = laws.data();
    p.zero_residual = counters[0].data();
    p.nonfinite_rows = counters[1].data();
    p.zero_draft_prob = counters[2].data();
    p.siblings = siblings.data();
    p.num_accepted = accepted.data();
    p.accepted_slots = accepted_slots.data();
    p.row_start = row_start.data();
    p.above = above.data();
    p.seeds = seeds.data();
    p.guidance_scale = guidance.data();
    p.temperature = temperature.data();
    p.top_k = top_k.data();
    p.top_p = top_p.data();
    p.reuse_threshold = threshold.data();
    p.most_accepted = nullptr;
    p.accept = match ? Accept::kMatch : Accept::kRatio;
    p.refresh = match ? pick({Refresh::kGumbel, Refresh::kArgmax})
                      : pick({Refresh::kFresh, Refresh::kReuse, Refresh::kMaximal, Refresh::kGumbel});
    p.init = pick({Init::kRandom, Init::kLeftRepeat, Init::kAboveRepeat, Init::kLeftSample, Init::kAboveSample});
    p.num_threads = 2;
    verify_cpu(p);
    for (int64_t b = 0; b < batch; ++b) {
      require(committed[b] > before[b] || before[b] == total, "a pass commits a token");
      for (int64_t t = 1; t <= committed[b]; ++t) {
        const int64_t token = tokens[b * (1 + total + 2 * most) + t];
        require(0 <= token && token < vocab, "a token of the vocabulary");
      }
      for (int64_t level = 1; level <= levels; ++level) {
        const int64_t slot = accepted_slots[b * levels + level - 1];
        require(slot < rows && tree.node(slot, window).level == level, "a slot of the level");
      }
    }
    for (const int64_t sibling : siblings) require(-1 <= sibling && sibling < vocab, "a sibling of the vocabulary");
    previous = now;
    window = next_window;
  }
}

}  // namespace

int main() {
  for (int i = 0; i < 500; ++i) {
    Books books;
    for (int step = 0; step < 30; ++step) books.step();
  }
  for (int i = 0; i < 500; ++i) move_pages();
  for (int i = 0; i < 200; ++i) attend();
  for (int i = 0; i < 200; ++i) layers();
  for (int i = 0; i < 200; ++i) linear();
  for (int i = 0; i < 200; ++i) verify();
}
