#include "verify_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "philox.h"
#include "select.h"
#include "thread_pool.h"

namespace sjd {
namespace {

// A pass over fewer logits than this is finished before a second thread is awake.
constexpr int64_t kLogitsForThreads = 1 << 17;

// Tokens that are worked on while they stand in the first-level cache; a multiple of kBlock.
constexpr int kTile = 1024;

// Values of law_row where the draft's law is no row of the last pass.
constexpr int32_t kUniform = -1, kOneHot = -2, kDrafted = -3;

// Memory for one row, kept by each thread.
struct Scratch {
  std::vector<int32_t> keys;
  std::vector<float> weights;
  std::vector<uint64_t> sums;

  static Scratch& of_this_thread(int vocab_size) {
    thread_local Scratch scratch;
    if (scratch.keys.size() < static_cast<size_t>(vocab_size)) {
      scratch.keys.resize(vocab_size);
      scratch.weights.resize(vocab_size);
      scratch.sums.resize(vocab_size / kBlock + 1);
    }
    return scratch;
  }
};

// What a pass knows of one row of the window.
struct Row {
  Node node;              // the row's slot; its level is the distance of its position from the first row's
  int64_t draft, forced;  // token ids; forced is -1 where the model chooses
  bool has_draft;
  bool sampled;  // inside the image and not forced
  bool scored;   // its law is computed: it is sampled, or an entering draft may be drawn from it
  bool nonfinite, passed, empty_residual;
  float p_draft, q_draft;
  int64_t child;  // the candidate that the accepted path goes on with, from 1; 0 where there is none
  int64_t token;  // recovered, refreshed, an accepted sibling's or, with Accept::kMatch, the target's own draw
  bool has_token;
  RowLaw law;
  uint64_t total;
  Words words;
};

class Pass {
 public:
  explicit Pass(const VerifyParams& params)
      : p_(params),
        num_blocks_((params.vocab_size + kBlock - 1) / kBlock),
        num_rows_(params.window_size + params.tree.num_extra()),
        rows_(params.batch_size * num_rows_),
        last_rows_(params.batch_size),
        sums_(rows_.size() * num_blocks_) {}

  void run() {
    each_row(&Pass::plan_row, num_rows_, 1);
    const int64_t scored = std::count_if(rows_.begin(), rows_.end(), [](const Row& row) { return row.scored; });
    const int num_threads = scored * p_.vocab_size < kLogitsForThreads ? 1 : p_.num_threads;
    each_row(&Pass::score_row, p_.window_size, num_threads);
    ThreadPool::run(p_.batch_size, num_threads, [&](int64_t b) { walk(b); });
    if (p_.accept == Accept::kRatio) each_row(&Pass::draw_row, num_rows_, num_threads);
    for (int64_t b = 0; b < p_.batch_size; ++b) finish(b);
  }

 private:
  void each_row(void (Pass::*task)(int64_t, int64_t), int64_t num_rows, int num_threads) {
    ThreadPool::run(p_.batch_size * num_rows, num_threads,
                    [&](int64_t i) { (this->*task)(i / num_rows, i % num_rows); });
  }

  // ------------------------------------------------------------------------------------------- access to the state

  Row& row(int64_t b, int64_t i) { return rows_[b * num_rows_ + i]; }
  uint64_t* sums(int64_t b, int64_t i) { return sums_.data() + (b * num_rows_ + i) * num_blocks_; }
  // By position.
  int64_t* tokens(int64_t b) { return p_.tokens + b * (1 + p_.num_tokens + 2 * p_.max_window_size) + 1; }
  int32_t* law_row(int64_t b) { return p_.law_row + b * p_.max_window_size; }
  // Candidates 2..K of a level's position; none behind the last level.
  int64_t* siblings(int64_t b, int64_t level) {
    return p_.siblings + (b * (p_.tree.depth - 1) + level - 1) * (p_.tree.candidates - 1);
  }
  const RowLaw& previous_law(int64_t b, int64_t i) { return law_of(p_.iteration[b] + 1, b, i); }
  RowLaw& law_of(int64_t iteration, int64_t b, int64_t i) {
    return p_.laws[((iteration & 1) * p_.batch_size + b) * p_.max_window_size + i];
  }
  int64_t forced_id(int64_t position) const { return p_.forced_ids ? p_.forced_ids[position] : -1; }

  int32_t combine_row(const Logits& logits, int64_t b, int64_t i, int first_id, int n, int32_t* keys) {
    const int64_t offset = b * logits.batch_stride + i * logits.row_stride + first_id * logits.vocab_stride;
    const float scale = p_.guidance_scale ? p_.guidance_scale[b] : 1.0f;
    const double temperature = p_.temperature ? p_.temperature[b] : 1.0;
    return combine(logits, offset, n, scale, static_cast<float>(1.0 / temperature), keys);
  }

  // Unscaled weights of tokens first_id .. first_id + n - 1.
  void weigh_row(const Logits& logits, const RowLaw& law, int64_t b, int64_t i, int first_id, int n, int32_t* keys,
                 float* weights) {
    combine_row(logits, b, i, first_id, n, keys);
    weigh(keys, first_id, n, law, weights);
  }

  // Block sums and the total of a row whose weights `weights_of(first_id, n)` computes.
  template <class WeightsOf>
  uint64_t sum_tiles(uint64_t* sums, WeightsOf weights_of) {
    uint64_t total = 0;
    for (int first = 0; first < p_.vocab_size; first += kTile) {
      const int n = std::min(kTile, p_.vocab_size - first);
      total += sum_blocks(weights_of(first, n), n, sums + first / kBlock);
    }
    return total;
  }

  // The first token whose cumulative weight exceeds its share of the total: `reference.draw`, block sums first.
  template <class WeightsOf>
  int64_t draw(const uint64_t* sums, uint64_t total, uint32_t word, WeightsOf weights_of) {
    uint64_t left = share(word, total);
    int first = 0;
    for (; left >= *sums; first += kBlock) left -= *sums++;
    const float* weights = weights_of(first, std::min(kBlock, p_.vocab_size - first));
    int64_t id = first;
    for (; left >= fixed_point(*weights); ++id) left -= fixed_point(*weights++);
    return id;
  }

  // ------------------------------------------------------------------------------------------------- before logits

  void plan_row(int64_t b, int64_t i) {
    Row& row = this->row(b, i);
    row = Row{};
    row.node = p_.tree.node(i, p_.window_size);
    const int64_t position = p_.num_committed[b] + row.node.level;
    const bool inside = position < p_.num_tokens;
    const bool has_child = i < p_.window_size ? i < p_.window_size - 1 : row.node.level < p_.tree.depth - 1;
    row.forced = inside ? forced_id(position) : -1;
    row.has_draft = inside && has_child;
    row.sampled = inside && row.forced < 0;
    row.scored = row.sampled || (inside && (p_.init == Init::kLeftSample || p_.init == Init::kAboveSample));
    row.draft = inside ? tokens(b)[position] : -1;
    row.words = philox(p_.seeds[b], position, p_.iteration[b], kWindow);
  }

  // ---------------------------------------------------------------------------------------- the law, and the test

  // An extra row is scored where the accepted path comes to it.
  void score_row(int64_t b, int64_t i) {
    Row& row = this->row(b, i);
    if (!row.scored) return;
    Scratch& scratch = Scratch::of_this_thread(p_.vocab_size);
    const int32_t peak = combine_row(p_.logits, b, i, 0, p_.vocab_size, scratch.keys.data());
    row.nonfinite = peak == kNegativeInfinityKey;
    row.law = find_law(b, i, peak, scratch);
    if (i < p_.window_size) law_of(p_.iteration[b], b, i) = row.law;
    if (p_.accept == Accept::kMatch) {
      row.token = coupled_draw(b, i, scratch);
      row.passed = row.token == row.draft;
    } else if (row.has_draft && row.sampled) {
      const int64_t id = std::clamp<int64_t>(row.draft, 0, p_.vocab_size - 1);
      row.p_draft = scratch.weights[id] * row.law.scale;
      float q_draft;
      const float q_scale = draft_weights(b, i, static_cast<int>(id), 1, scratch.keys.data(), &q_draft);
      row.q_draft = q_draft * q_scale;
      row.passed = uniform(row.words.word[kAccept]) * row.q_draft < row.p_draft;
    }
  }

  // The law of a row whose keys stand in the scratch; leaves its weights there and their block sums in sums(b, i).
  RowLaw find_law(int64_t b, int64_t i, int32_t peak, Scratch& scratch) {
    const int n = p_.vocab_size;
    const int32_t* keys = scratch.keys.data();
    float* weights = scratch.weights.data();
    RowLaw law = {key_value(peak), 0.0f, -INFINITY, -1.0f};
    const auto weigh_and_sum = [&] {
      return sum_tiles(sums(b, i), [&](int first, int count) {
        weigh(keys + first, first, count, law, weights + first);
        return weights + first;
      });
    };
    const auto set_cut = [&](int32_t key, int64_t which) {
      law.cut = key_value(key);
      law.cut_id = key == kNegativeInfinityKey ? -1.0f : static_cast<float>(nth_equal(keys, n, key, which));
    };
    const int32_t from = law_row(b)[row(b, i).node.level];
    const auto guess = [&](double share) {
      return row(b, i).has_draft && from >= 0 ? order_key(previous_law(b, from).cut) : guess_cut(keys, n, share);
    };
    const int64_t k = p_.top_k ? p_.top_k[b] : 0;
    if (k > 0 && k < n) {
      const Cut cut = find_cut(k, n, 1, peak, guess(static_cast<double>(k) / n),
                               [&](int32_t threshold) { return split_count(keys, n, threshold); });
      set_cut(cut.key, k - static_cast<int64_t>(cut.above));
    }
    uint64_t total = weigh_and_sum();
    if (p_.top_p && p_.top_p[b] < 1 && !law.nonfinite()) {
      const double share = static_cast<double>(p_.top_p[b]);
      const uint64_t enough = std::max<int64_t>(1, static_cast<int64_t>(share * static_cast<double>(total)));
      const Cut cut = find_cut(enough, total, uint64_t{1} << kWeightBits, peak, guess(share / 8),
                               [&](int32_t threshold) { return split_mass(keys, weights, n, threshold); });
      const uint64_t each = fixed_point(exp_of(key_value(cut.key) - law.peak));
      const int64_t ties = (enough - cut.above + each - 1) / each;
      if (static_cast<int64_t>(split_count(keys, n, cut.key + 1).measure) + ties < n) {
        set_cut(cut.key, ties);
        total = weigh_and_sum();
      }
    }
    row(b, i).total = total;
    law.scale = static_cast<float>(0x1p44 / static_cast<double>(total));
    return law;
  }

  // q of row i's draft: unscaled weights of n tokens from first_id on; returns their scale. `keys` is overwritten.
  float draft_weights(int64_t b, int64_t i, int first_id, int n, int32_t* keys, float* weights) {
    const int32_t from = law_row(b)[row(b, i).node.level];
    if (from >= 0 && p_.previous_logits.data) {
      const RowLaw& law = previous_law(b, from);
      weigh_row(p_.previous_logits, law, b, from, first_id, n, keys, weights);
      return law.scale;
    }
    if (from == kDrafted) {
      const int64_t at = b * p_.max_window_size + row(b, i).node.level;
      std::copy_n(p_.drafted + at * p_.vocab_size + first_id, n, weights);
      return p_.drafted_scale[at];
    }
    std::fill_n(weights, n, from == kUniform ? 1.0f : 0.0f);
    const int64_t hot = row(b, i).draft - first_id;
    if (from == kOneHot && 0 <= hot && hot < n) weights[hot] = 1.0f;
    return from == kUniform ? static_cast<float>(1.0 / p_.vocab_size) : 1.0f;
  }

  // ------------------------------------------------------------------------------------------------ the accepted path

  // Find it, and commit its tokens.
  void walk(int64_t b) {
    const Tree& tree = p_.tree;
    int64_t* slots = p_.accepted_slots + b * (tree.depth - 1);
    for (int64_t level = 1; level < tree.depth; ++level) slots[level - 1] = level;
    int64_t i = 0;
    while (accepts_candidate(b, i)) {
      const Row& row = this->row(b, i);
      if (p_.most_accepted && row.node.level == p_.most_accepted[b]) break;
      const int64_t accepted = row.child == 1 ? row.draft : row.token;
      tokens(b)[p_.num_committed[b] + row.node.level] = row.forced >= 0 ? row.forced : accepted;
      const Node next = {row.node.level + 1, row.node.path * tree.candidates + row.child - 1};
      i = tree.slot(next, p_.window_size);
      if (next.level < tree.depth) slots[next.level - 1] = i;
    }
    last_rows_[b] = i;
    p_.num_accepted[b] = row(b, i).node.level;
  }

  // Row i of the path accepts a candidate for its position: sets its `child`.
  bool accepts_candidate(int64_t b, int64_t i) {
    Row& row = this->row(b, i);
    if (i >= p_.window_size) score_row(b, i);
    row.child = row.has_draft && (!row.sampled || (row.passed && !row.nonfinite));
    if (row.child == 0 && row.sampled && tries_siblings(b, row)) {
      row.token = recovered_token(b, i);
      row.has_token = true;
    }
    return row.child > 0;
  }

  bool tries_siblings(int64_t b, const Row& row) {
    const int64_t level = row.node.level + 1;
    return level < p_.tree.depth && row.has_draft && !row.nonfinite && law_row(b)[level - 1] >= 0 &&
           siblings(b, level)[0] >= 0;
  }

  // -------------------------------------------------------------------------------------------------------- draws

  // The token of a row that is not accepted, where Accept::kRatio draws one.
  void draw_row(int64_t b, int64_t i) {
    Row& row = this->row(b, i);
    const bool last = i == last_rows_[b], refreshed = i < p_.window_size && i > p_.num_accepted[b];
    if (!row.sampled || row.has_token || !(last || refreshed)) return;
    const bool comparable = row.has_draft && !row.nonfinite;
    if (last) {  // a draft that passes stands behind the most that may be accepted
      row.token = row.child == 1 ? row.draft : recovered_token(b, i);
    } else if (p_.refresh == Refresh::kMaximal) {
      row.token = comparable && row.passed ? row.draft : recovered_token(b, i);
    } else if (p_.refresh == Refresh::kFresh) {
      row.token = draw_from_target(b, i, row.words.word[kFresh]);
    } else if (p_.refresh == Refresh::kReuse) {
      const bool reused = comparable && row.p_draft > p_.reuse_threshold[b] * row.q_draft;
      row.token = reused ? row.draft : draw_from_target(b, i, row.words.word[kFresh]);
    } else {
      Scratch& scratch = Scratch::of_this_thread(p_.vocab_size);
      weigh_row(p_.logits, row.law, b, i, 0, p_.vocab_size, scratch.keys.data(), scratch.weights.data());
      row.token = coupled_draw(b, i, scratch);
    }
  }

  // What a row that tries siblings has tried: the candidate before each, and the scales of both laws without it.
  struct Trial {
    int64_t token;
    float target_scale, draft_scale;
  };

  // Drawn from max(p - q, 0); from p where there is no draft, no finite logit or no mass left. Where the row has
  // siblings, the first of them that it accepts, and sets its `child`; see `tree.try_siblings`.
  int64_t recovered_token(int64_t b, int64_t i) {
    Row& row = this->row(b, i);
    const uint32_t word = row.words.word[kResidual];
    if (row.has_draft && !row.nonfinite) {
      int32_t keys[kTile];
      float rest[kTile], q[kTile];
      Trial trials[kMostCandidates];
      int num_trials = 0;
      const auto residual = [&](int first, int n) {
        weigh_row(p_.logits, row.law, b, i, first, n, keys, rest);
        const float q_scale = draft_weights(b, i, first, n, keys, q);
        subtract_draft(rest, row.law.scale, q, q_scale, n);
        for (const Trial* trial = trials; trial < trials + num_trials; ++trial) {
          if (first <= trial->token && trial->token < first + n) q[trial->token - first] = 0.0f;
          subtract_counted(rest, trial->target_scale, q, trial->draft_scale, n);
        }
        return rest;
      };
      uint64_t* sums = Scratch::of_this_thread(p_.vocab_size).sums.data();
      uint64_t total = sum_tiles(sums, residual);
      if (tries_siblings(b, row)) {
        const int64_t* siblings = this->siblings(b, row.node.level + 1);
        const auto draft = [&](int first, int n) {
          draft_weights(b, i, first, n, keys, q);
          return q;
        };
        uint64_t untried = sum_tiles(sums, draft);
        const Words words = philox(p_.seeds[b], p_.num_committed[b] + row.node.level, p_.iteration[b], kTrySiblings);
        int64_t before = std::clamp<int64_t>(row.draft, 0, p_.vocab_size - 1);
        for (int64_t j = 0; j < p_.tree.candidates - 1 && siblings[j] >= 0; ++j) {
          untried -= fixed_point(*draft(static_cast<int>(before), 1));
          const Trial trial = {before, scale_of(total), scale_of(untried)};
          const int id = static_cast<int>(siblings[j]);
          const float p_sibling = counted(*residual(id, 1)) * trial.target_scale;
          const float q_sibling = counted(*draft(id, 1)) * trial.draft_scale;
          if (uniform(words.word[j]) * q_sibling < p_sibling) {
            row.child = j + 2;
            return id;
          }
          trials[num_trials++] = trial;
          before = id;
          total = sum_tiles(sums, residual);
        }
      }
      if (total > 0) return draw(sums, total, word, residual);
      row.empty_residual = true;
    }
    return draw_from_target(b, i, word);
  }

  int64_t draw_from_target(int64_t b, int64_t i, uint32_t word) {
    int32_t keys[kBlock];
    float weights[kBlock];
    return draw(sums(b, i), row(b, i).total, word, [&](int first, int n) {
      weigh_row(p_.logits, row(b, i).law, b, i, first, n, keys, weights);
      return weights;
    });
  }

  // The arg-max under the position's fixed noise, or under none. The row's keys and weights stand in the scratch.
  int64_t coupled_draw(int64_t b, int64_t i, Scratch& scratch) {
    const int n = p_.vocab_size;
    int32_t* keys = scratch.keys.data();
    if (row(b, i).nonfinite) std::fill_n(keys, n, 0);  // every token scores 0 before the noise
    if (p_.refresh == Refresh::kGumbel) {
      return gumbel_argmax(keys, scratch.weights.data(), n, p_.seeds[b], p_.num_committed[b] + i);
    }
    return nth_equal(keys, n, row(b, i).nonfinite ? 0 : order_key(row(b, i).law.peak), 1);
  }

  // ---------------------------------------------------------------------------------------------- to the next pass

  void finish(int64_t b) {
    const int64_t committed = p_.num_committed[b], iteration = p_.iteration[b], num_accepted = p_.num_accepted[b];
    const int64_t num_new = std::min(num_accepted + 1, p_.num_tokens - committed);
    if (num_new == 0) return;
    p_.zero_residual[b] += row(b, last_rows_[b]).empty_residual;
    for (int64_t i = 0; i < std::min(p_.window_size, p_.num_tokens - committed); ++i) {
      const Row& row = this->row(b, i);
      p_.nonfinite_rows[b] += row.sampled && row.nonfinite;
      if (p_.accept == Accept::kRatio) p_.zero_draft_prob[b] += row.has_draft && row.sampled && row.q_draft <= 0;
      if (i < num_new) p_.commit_pass[b * (p_.num_tokens + p_.max_window_size) + committed + i] = iteration;
      if (i < num_accepted) continue;
      const Row& out = i == num_accepted ? this->row(b, last_rows_[b]) : row;
      tokens(b)[committed + i] = out.forced >= 0 ? out.forced : out.token;
    }
    fill_window(b, num_new);
    for (int64_t level = 1; level < p_.tree.depth; ++level) draw_siblings(b, num_new + level - 1, siblings(b, level));
    p_.iteration[b] += 1;
    p_.num_committed[b] += num_new;
  }

  // The law of every draft of the next window, and new drafts at its right edge: `reference.fill_window`.
  void fill_window(int64_t b, int64_t num_new) {
    const int64_t kept = p_.window_size - num_new, drafts = p_.next_window_size - 1;
    const int64_t after = p_.num_committed[b] + p_.window_size;
    for (int64_t i = 0; i < std::min(kept, drafts); ++i) law_row(b)[i] = static_cast<int32_t>(num_new + i);
    for (int64_t j = 0; j < drafts && after + j < p_.num_tokens; ++j) {
      const int32_t from = enter(b, after + j);
      if (kept + j < drafts) law_row(b)[kept + j] = from;
    }
  }

  // Candidates 2..K of the position of row i, whose draft, candidate 1, stands in the tokens: `tree.draw_siblings`.
  void draw_siblings(int64_t b, int64_t i, int64_t* siblings) {
    const int num_siblings = static_cast<int>(p_.tree.candidates) - 1;
    std::fill_n(siblings, num_siblings, -1);
    const int64_t position = p_.num_committed[b] + i;
    if (i >= p_.window_size || !row(b, i).sampled) return;
    int32_t keys[kBlock];
    float weights[kBlock];
    int64_t tried[kMostCandidates] = {std::clamp<int64_t>(tokens(b)[position], 0, p_.vocab_size - 1)};
    int num_tried = 0;
    const auto untried = [&](int first, int n) {
      weigh_row(p_.logits, row(b, i).law, b, i, first, n, keys, weights);
      for (int j = 0; j < num_tried; ++j) {
        if (first <= tried[j] && tried[j] < first + n) weights[tried[j] - first] = 0.0f;
      }
      return weights;
    };
    uint64_t* left = Scratch::of_this_thread(p_.vocab_size).sums.data();
    std::copy_n(sums(b, i), num_blocks_, left);
    uint64_t total = row(b, i).total;
    const Words words = philox(p_.seeds[b], position, p_.iteration[b], kDrawSiblings);
    for (int j = 0; j < num_siblings; ++j) {
      const uint64_t weight = fixed_point(*untried(static_cast<int>(tried[j]), 1));
      left[tried[j] / kBlock] -= weight;
      total -= weight;
      num_tried = j + 1;
      if (total == 0) return;
      siblings[j] = tried[j + 1] = draw(left, total, words.word[j], untried);
    }
  }

  // Write the draft of a position right of the window; returns its law's row.
  int32_t enter(int64_t b, int64_t position) {
    const int64_t first = p_.num_committed[b];
    const int64_t source = neighbour(position, first, first + p_.window_size - 1);
    const uint32_t word = philox(p_.seeds[b], position, p_.iteration[b], kWindow).word[kInit];
    int32_t from = kUniform;
    int64_t token = static_cast<int64_t>((static_cast<uint64_t>(word) * p_.vocab_size) >> 32);
    const bool repeats = p_.init == Init::kLeftRepeat || p_.init == Init::kAboveRepeat;
    if (repeats && source >= 0) {
      token = tokens(b)[source];
      from = kOneHot;
    } else if (!repeats && source >= 0) {
      token = draw_from_target(b, source - first, word);
      from = static_cast<int32_t>(source - first);
    }
    tokens(b)[position] = forced_id(position) >= 0 ? forced_id(position) : token;
    return from;
  }

  // The nearest position to the left or above that is not right of `last`; -1 where there is none, and for kRandom. For
  // kAboveSample not left of `first` either; then the left one.
  int64_t neighbour(int64_t position, int64_t first, int64_t last) const {
    if (p_.init == Init::kRandom) return -1;
    const int64_t row_start = p_.row_start[position];
    const int64_t left = row_start >= 0 && row_start <= last ? last : -1;
    if (p_.init == Init::kLeftRepeat || p_.init == Init::kLeftSample) return left;
    int64_t source = p_.above[position];
    while (source > last) source = p_.above[source];
    return p_.init == Init::kAboveSample && source < first ? left : source;
  }

  const VerifyParams& p_;
  const int64_t num_blocks_, num_rows_;
  std::vector<Row> rows_;
  std::vector<int64_t> last_rows_;  // behind the accepted path of each sequence
  std::vector<uint64_t> sums_;
};

}  // namespace

void verify_cpu(const VerifyParams& params) { Pass(params).run(); }

}  // namespace sjd
