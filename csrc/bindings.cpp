// The module sjd_engine._C: the only file that knows Python. Tensors come as addresses, so that neither building nor
// loading it needs torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <sstream>
#include <utility>

#include "attention_cpu.h"
#include "check.h"
#include "denoise_cpu.h"
#include "device_info.h"
#include "layers_cpu.h"
#include "linear_cpu.h"
#include "page_allocator.h"
#include "paged_kv.h"
#include "verify_cpu.h"

namespace py = pybind11;

namespace sjd {
namespace {

constexpr const char* kVerify = "verify_cpu";

template <class T>
using Names = std::initializer_list<std::pair<const char*, T>>;

// The value called `name`.
template <class T>
T named(const char* op, const char* argument, const std::string& name, Names<T> known) {
  for (const auto& [key, value] : known) {
    if (name == key) return value;
  }
  std::string expected = "one of";
  for (const auto& [key, value] : known) expected += std::string(expected.back() == 'f' ? " " : ", ") + key;
  check(false, op, argument, expected, "'" + name + "'");
  return known.begin()->second;
}

template <class T>
T* required(const char* op, const char* argument, uintptr_t address) {
  check(address != 0, op, argument, "the address of a tensor", "0");
  return reinterpret_cast<T*>(address);
}

template <class T>
const T* optional(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

DType dtype_of(const char* op, const std::string& name) {
  return named<DType>(op, "dtype", name,
                      {{"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}});
}

using Strides = std::array<int64_t, 4>;  // pair, batch, row, vocab

Logits logits_at(uintptr_t address, DType dtype, bool guided, const Strides& strides) {
  return {optional<void>(address), dtype, guided, strides[0], strides[1], strides[2], strides[3]};
}

void verify(uintptr_t logits, const std::string& dtype, bool guided, const Strides& strides, uintptr_t previous_logits,
            const Strides& previous_strides, int64_t batch_size, int64_t window_size, int64_t next_window_size,
            int64_t max_window_size, int64_t vocab_size, int64_t num_tokens, uintptr_t tokens, uintptr_t num_committed,
            uintptr_t iteration, uintptr_t commit_pass, uintptr_t law_row, uintptr_t laws, uintptr_t zero_residual,
            uintptr_t nonfinite_rows, uintptr_t zero_draft_prob, int64_t candidates, int64_t depth, uintptr_t siblings,
            uintptr_t num_accepted, uintptr_t accepted_slots, uintptr_t drafted, uintptr_t drafted_scale,
            uintptr_t forced_ids, uintptr_t row_start, uintptr_t above, uintptr_t seeds, uintptr_t guidance_scale,
            uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t reuse_threshold, uintptr_t most_accepted,
            const std::string& accept, const std::string& refresh, const std::string& init, int num_threads) {
  constexpr int64_t kMost = INT32_MAX;
  check_range(kVerify, "batch_size", batch_size, 1, kMost);
  check_range(kVerify, "max_window_size", max_window_size, 1, kMost);
  check_range(kVerify, "window_size", window_size, 1, max_window_size);
  check_range(kVerify, "next_window_size", next_window_size, 1, max_window_size);
  check_range(kVerify, "num_tokens", num_tokens, 1, kMost);
  check_range(kVerify, "vocab_size", vocab_size, 2, 1 << 18, "sums of more weights would not fit 64 bits");
  check_range(kVerify, "num_threads", num_threads, 1, kMost);
  const DType type = dtype_of(kVerify, dtype);
  required<void>(kVerify, "logits", logits);

  VerifyParams p;
  p.logits = logits_at(logits, type, guided, strides);
  p.previous_logits = logits_at(previous_logits, type, guided, previous_strides);
  p.batch_size = batch_size;
  p.window_size = window_size;
  p.next_window_size = next_window_size;
  p.max_window_size = max_window_size;
  p.num_tokens = num_tokens;
  p.vocab_size = static_cast<int>(vocab_size);
  p.tokens = required<int64_t>(kVerify, "tokens", tokens);
  p.num_committed = required<int64_t>(kVerify, "num_committed", num_committed);
  p.iteration = required<int64_t>(kVerify, "iteration", iteration);
  p.commit_pass = required<int64_t>(kVerify, "commit_pass", commit_pass);
  p.law_row = required<int32_t>(kVerify, "law_row", law_row);
  p.laws = required<RowLaw>(kVerify, "laws", laws);
  p.zero_residual = required<int64_t>(kVerify, "zero_residual", zero_residual);
  p.nonfinite_rows = required<int64_t>(kVerify, "nonfinite_rows", nonfinite_rows);
  p.zero_draft_prob = required<int64_t>(kVerify, "zero_draft_prob", zero_draft_prob);
  p.num_accepted = required<int64_t>(kVerify, "num_accepted", num_accepted);
  const bool has_tree = depth > 1;
  check_range(kVerify, "depth", depth, 1, window_size);
  check_range(kVerify, "candidates", candidates, has_tree ? 2 : 1, has_tree ? kMostCandidates : 1);
  p.tree = {candidates, depth};
  p.siblings = has_tree ? required<int64_t>(kVerify, "siblings", siblings) : nullptr;
  p.accepted_slots = has_tree ? required<int64_t>(kVerify, "accepted_slots", accepted_slots) : nullptr;
  p.drafted = optional<float>(drafted);
  p.drafted_scale = optional<float>(drafted_scale);
  p.forced_ids = optional<int64_t>(forced_ids);
  p.row_start = required<int64_t>(kVerify, "row_start", row_start);
  p.above = required<int64_t>(kVerify, "above", above);
  p.seeds = required<int64_t>(kVerify, "seeds", seeds);
  p.guidance_scale = optional<float>(guidance_scale);
  p.temperature = optional<float>(temperature);
  p.top_k = optional<int64_t>(top_k);
  p.top_p = optional<float>(top_p);
  p.reuse_threshold = optional<float>(reuse_threshold);
  p.most_accepted = optional<int64_t>(most_accepted);
  p.accept = named<Accept>(kVerify, "accept", accept, {{"ratio", Accept::kRatio}, {"match", Accept::kMatch}});
  p.refresh = named<Refresh>(kVerify, "refresh", refresh,
                             {{"fresh", Refresh::kFresh},
                              {"reuse", Refresh::kReuse},
                              {"maximal", Refresh::kMaximal},
                              {"gumbel", Refresh::kGumbel},
                              {"argmax", Refresh::kArgmax}});
  p.init = named<Init>(kVerify, "init", init,
                       {{"random", Init::kRandom},
                        {"left-repeat", Init::kLeftRepeat},
                        {"above-repeat", Init::kAboveRepeat},
                        {"left-sample", Init::kLeftSample},
                        {"above-sample", Init::kAboveSample}});
  p.num_threads = num_threads;
  check(p.accept == Accept::kRatio || p.refresh == Refresh::kGumbel || p.refresh == Refresh::kArgmax, kVerify,
        "refresh", "gumbel or argmax where accept is match", "'" + refresh + "'");
  check(p.reuse_threshold || p.refresh != Refresh::kReuse, kVerify, "reuse_threshold", "given where refresh is reuse",
        "none", "pass a [B] float32 tensor");
  py::gil_scoped_release release;
  verify_cpu(p);
}

constexpr const char* kDenoise = "denoise_cpu";

void denoise(const std::string& dtype, int64_t batch_size, int64_t num_slots, int64_t num_tokens, int64_t tokens_width,
             int64_t vocab_size, int64_t hidden, uintptr_t levels, uintptr_t noisy, uintptr_t embeddings,
             uintptr_t mean, uintptr_t std, uintptr_t inverse, uintptr_t encodings, uintptr_t keep, uintptr_t pull,
             uintptr_t tokens, uintptr_t num_committed, uintptr_t lowered, uintptr_t inputs, uintptr_t out_levels,
             int num_threads) {
  constexpr int64_t kMost = INT32_MAX;
  for (const auto& [name, value] : Names<int64_t>{{"batch_size", batch_size},
                                                  {"num_slots", num_slots},
                                                  {"num_tokens", num_tokens},
                                                  {"vocab_size", vocab_size},
                                                  {"hidden", hidden},
                                                  {"num_threads", num_threads}}) {
    check_range(kDenoise, name, value, 1, kMost);
  }
  check_range(kDenoise, "tokens_width", tokens_width, num_tokens + 1, kMost, "column t + 1 is position t");
  DenoiseParams p;
  p.dtype = dtype_of(kDenoise, dtype);
  p.batch_size = batch_size;
  p.num_slots = num_slots;
  p.num_tokens = num_tokens;
  p.tokens_width = tokens_width;
  p.vocab_size = vocab_size;
  p.hidden = hidden;
  p.levels = required<int32_t>(kDenoise, "levels", levels);
  p.noisy = required<float>(kDenoise, "noisy", noisy);
  p.embeddings = required<void>(kDenoise, "embeddings", embeddings);
  p.mean = required<float>(kDenoise, "mean", mean);
  p.std = required<float>(kDenoise, "std", std);
  p.inverse = required<float>(kDenoise, "inverse", inverse);
  p.encodings = required<float>(kDenoise, "encodings", encodings);
  p.keep = required<float>(kDenoise, "keep", keep);
  p.pull = required<float>(kDenoise, "pull", pull);
  p.tokens = required<int64_t>(kDenoise, "tokens", tokens);
  p.num_committed = required<int64_t>(kDenoise, "num_committed", num_committed);
  p.lowered = required<int64_t>(kDenoise, "lowered", lowered);
  p.inputs = required<void>(kDenoise, "inputs", inputs);
  p.out_levels = required<int32_t>(kDenoise, "out_levels", out_levels);
  p.num_threads = num_threads;
  py::gil_scoped_release release;
  denoise_cpu(p);
}

// ------------------------------------------------------------------------------------------------------ paged cache

constexpr int64_t kMostRows = int64_t{1} << 40;

// Pages of `dtype`, and the tables of some sequences.
struct Pages {
  uintptr_t pages, block_table;
  std::string dtype;
  int64_t num_layers, num_pages, page_size, num_kv_heads, head_dim, num_sequences, table_width;

  PagedKV at(const char* op, bool reads_table = true) const {
    for (const auto& [name, value] : Names<int64_t>{{"num_layers", num_layers},
                                                    {"num_pages", num_pages},
                                                    {"page_size", page_size},
                                                    {"num_kv_heads", num_kv_heads},
                                                    {"head_dim", head_dim},
                                                    {"num_sequences", num_sequences},
                                                    {"table_width", table_width}}) {
      check_range(op, name, value, 1, INT32_MAX);
    }
    const int64_t size = dtype_of(op, dtype) == DType::kFloat32 ? 4 : 2;
    return {required<char>(op, "pages", pages),
            reads_table ? required<int32_t>(op, "block_table", block_table) : nullptr,
            num_sequences,
            table_width,
            num_pages,
            page_size,
            num_kv_heads * head_dim * size};
  }
};

// Where an op runs: threads of the CPU, or a stream of a CUDA device.
struct Place {
  bool cuda;
  int device;
  uintptr_t stream;
  int num_threads;
};

template <class Op>
void run(const char* name, const Op& op, const Place& place) {
  check_range(name, "num_threads", place.num_threads, 1, INT32_MAX);
  check_range(name, "the number of rows", op.count(), 0, UINT32_MAX);
  py::gil_scoped_release release;
  if (!place.cuda) return run_cpu(op, place.num_threads);
#if defined(SJD_CUDA_ARCHS)
  run_cuda(op, place.device, reinterpret_cast<void*>(place.stream));
#else
  throw std::runtime_error(std::string(name) +
                           ": this build of sjd_engine has no CUDA; build it again where nvcc is found");
#endif
}

void append_kv(const Pages& pages, uintptr_t keys, uintptr_t values, int64_t sequence_stride, int64_t token_stride,
               uintptr_t context_lens, uintptr_t num_valid, uintptr_t cos, uintptr_t sin, int64_t num_new,
               const Place& place) {
  constexpr const char* kOp = "append_kv";
  check_range(kOp, "num_new", num_new, 1, INT32_MAX);
  AppendKV op{pages.at(kOp),
              required<char>(kOp, "keys", keys),
              required<char>(kOp, "values", values),
              sequence_stride,
              token_stride,
              required<int32_t>(kOp, "context_lens", context_lens),
              optional<int32_t>(num_valid),
              optional<float>(cos),
              optional<float>(sin),
              dtype_of(kOp, pages.dtype),
              num_new,
              pages.head_dim,
              false};
  op.wide = all_wide(
      {number(op.kv.pages), op.kv.row_bytes, number(op.keys), number(op.values), sequence_stride, token_stride});
  run(kOp, op, place);
}

void advance_rollback(uintptr_t context_lens, uintptr_t prefix_lens, uintptr_t num_committed, int64_t num_sequences,
                      int64_t copies, const Place& place) {
  constexpr const char* kOp = "advance_rollback";
  check_range(kOp, "num_sequences", num_sequences, 1, INT32_MAX);
  check_range(kOp, "copies", copies, 1, num_sequences);
  run(kOp,
      AdvanceRollback{required<int32_t>(kOp, "context_lens", context_lens),
                      required<int32_t>(kOp, "prefix_lens", prefix_lens),
                      required<int64_t>(kOp, "num_committed", num_committed), num_sequences, copies},
      place);
}

void compact_kv(const Pages& pages, uintptr_t context_lens, uintptr_t from_slots, int64_t copies, int64_t num_levels,
                const Place& place) {
  constexpr const char* kOp = "compact_kv";
  check_range(kOp, "copies", copies, 1, pages.num_sequences);
  check_range(kOp, "num_levels", num_levels, 1, INT32_MAX);
  CompactKV op{pages.at(kOp),
               required<int32_t>(kOp, "context_lens", context_lens),
               required<int64_t>(kOp, "from_slots", from_slots),
               copies,
               num_levels,
               pages.num_layers,
               false};
  op.wide = all_wide({number(op.kv.pages), op.kv.row_bytes});
  run(kOp, op, place);
}

void copy_pages(const Pages& pages, uintptr_t copies, int64_t num_copies, const Place& place) {
  constexpr const char* kOp = "copy_pages";
  check_range(kOp, "num_copies", num_copies, 1, kMostRows);
  CopyPages op{pages.at(kOp, false), required<int32_t>(kOp, "copies", copies), num_copies, pages.num_layers, false};
  op.wide = all_wide({number(op.kv.pages), op.kv.row_bytes});
  run(kOp, op, place);
}

void gather_kv(const Pages& pages, uintptr_t out, uintptr_t context_lens, int64_t num_new, int64_t span,
               const Place& place) {
  constexpr const char* kOp = "gather_kv";
  check_range(kOp, "num_new", num_new, 0, INT32_MAX);
  check_range(kOp, "span", span, 1, INT32_MAX);
  GatherKV op{pages.at(kOp),
              required<char>(kOp, "out", out),
              required<int32_t>(kOp, "context_lens", context_lens),
              num_new,
              span,
              false};
  op.wide = all_wide({number(op.kv.pages), op.kv.row_bytes, number(op.out)});
  run(kOp, op, place);
}

void poison_kv(const Pages& pages, uintptr_t context_lens, int64_t num_slots, const Place& place) {
  constexpr const char* kOp = "poison_kv";
  check_range(kOp, "num_slots", num_slots, 1, INT32_MAX);
  run(kOp, PoisonKV{pages.at(kOp), required<int32_t>(kOp, "context_lens", context_lens), num_slots, pages.num_layers},
      place);
}

void window_attention(const Pages& pages, uintptr_t queries, const std::array<int64_t, 3>& strides, uintptr_t out,
                      uintptr_t context_lens, uintptr_t window_bias, int64_t bias_sequence_stride, int64_t num_new,
                      int64_t num_heads, float scale, int num_threads) {
  constexpr const char* kOp = "window_attention";
  check_range(kOp, "num_new", num_new, 1, INT32_MAX);
  check_range(kOp, "num_threads", num_threads, 1, INT32_MAX);
  const PagedKV kv = pages.at(kOp);
  check(num_heads > 0 && num_heads % pages.num_kv_heads == 0, kOp, "num_heads",
        "a multiple of num_kv_heads = " + text(pages.num_kv_heads), text(num_heads));
  const WindowAttention params{kv,
                               dtype_of(kOp, pages.dtype),
                               required<void>(kOp, "queries", queries),
                               strides[0],
                               strides[1],
                               strides[2],
                               required<void>(kOp, "out", out),
                               required<int32_t>(kOp, "context_lens", context_lens),
                               optional<float>(window_bias),
                               bias_sequence_stride,
                               num_new,
                               num_heads,
                               pages.num_kv_heads,
                               pages.head_dim,
                               scale};
  py::gil_scoped_release release;
  attend_cpu(params, num_threads);
}

// ----------------------------------------------------------------------------------------------------------- layers

void add_rms_norm(uintptr_t x, uintptr_t y, uintptr_t weight, uintptr_t sum, uintptr_t out, const std::string& dtype,
                  int64_t rows, int64_t hidden, float eps, int num_threads) {
  constexpr const char* kOp = "add_rms_norm";
  check_range(kOp, "rows", rows, 0, INT32_MAX);
  check_range(kOp, "hidden", hidden, 1, INT32_MAX);
  check_range(kOp, "num_threads", num_threads, 1, INT32_MAX);
  const AddRmsNorm op{optional<void>(x),
                      optional<void>(y),
                      required<void>(kOp, "weight", weight),
                      y == 0 ? nullptr : required<void>(kOp, "sum", sum),
                      reinterpret_cast<void*>(out),
                      dtype_of(kOp, dtype),
                      rows,
                      hidden,
                      eps};
  py::gil_scoped_release release;
  add_rms_norm_cpu(op, num_threads);
}

void rotate(uintptr_t x, int64_t sequence_stride, int64_t token_stride, uintptr_t cos, uintptr_t sin,
            const std::string& dtype, const std::array<int64_t, 4>& sizes, int num_threads) {
  constexpr const char* kOp = "rotate";
  for (const int64_t size : sizes) check_range(kOp, "every size", size, 1, INT32_MAX);
  check(sizes[3] % 2 == 0, kOp, "the head dim", "even", text(sizes[3]));
  check_range(kOp, "num_threads", num_threads, 1, INT32_MAX);
  const Rotate op{required<void>(kOp, "x", x),
                  sequence_stride,
                  token_stride,
                  required<void>(kOp, "cos", cos),
                  required<void>(kOp, "sin", sin),
                  dtype_of(kOp, dtype),
                  sizes[0],
                  sizes[1],
                  sizes[2],
                  sizes[3]};
  py::gil_scoped_release release;
  rotate_cpu(op, num_threads);
}

void silu_mul(uintptr_t gate_up, uintptr_t out, const std::string& dtype, int64_t rows, int64_t width,
              int num_threads) {
  constexpr const char* kOp = "silu_mul";
  check_range(kOp, "rows", rows, 0, INT32_MAX);
  check_range(kOp, "width", width, 1, INT32_MAX);
  check_range(kOp, "num_threads", num_threads, 1, INT32_MAX);
  const SiluMul op{optional<void>(gate_up), reinterpret_cast<void*>(out), dtype_of(kOp, dtype), rows, width};
  py::gil_scoped_release release;
  silu_mul_cpu(op, num_threads);
}

// By position: a pass makes one call for each matrix.
void linear(uintptr_t x, uintptr_t panels, uintptr_t bias, uintptr_t out, const std::string& dtype, int64_t rows,
            int64_t depth, int64_t cols, int num_threads) {
  constexpr const char* kOp = "linear";
  check_range(kOp, "rows", rows, 0, INT32_MAX);
  check_range(kOp, "depth", depth, 1, INT32_MAX);
  check_range(kOp, "cols", cols, 1, INT32_MAX);
  check_range(kOp, "num_threads", num_threads, 1, INT32_MAX);
  const Linear op{optional<void>(x),
                  required<void>(kOp, "panels", panels),
                  optional<void>(bias),
                  reinterpret_cast<void*>(out),
                  dtype_of(kOp, dtype),
                  rows,
                  depth,
                  cols};
  if (op.dtype != DType::kFloat32 && (op.dtype != DType::kBFloat16 || !multiplies_panels())) {
    check(false, kOp, "dtype", "float32, or bfloat16 on a CPU that multiplies it in vectors", "'" + dtype + "'");
  }
  py::gil_scoped_release release;
  linear_cpu(op, num_threads);
}

// ----------------------------------------------------------------------------------------------------------- module

// "sm_80 sm_90 compute_90" as a tuple.
py::tuple words(const std::string& line) {
  std::istringstream stream(line);
  std::vector<std::string> found;
  for (std::string word; stream >> word;) found.push_back(word);
  return py::tuple(py::cast(found));
}

py::list devices() {
  py::list found;
#if defined(SJD_CUDA_ARCHS)
  for (const CudaDevice& d : cuda_devices()) {
    found.append(py::make_tuple(d.name, py::make_tuple(d.major, d.minor), d.memory_bytes));
  }
#else
  throw std::runtime_error("cuda_devices: this build of sjd_engine has no CUDA; build it again where nvcc is found");
#endif
  return found;
}

void define_paged_cache(py::module_& m) {
  using py::arg;
  py::register_exception<PagesExhausted>(m, "PagesExhausted", PyExc_RuntimeError);
  py::class_<PageAllocator>(m, "PageAllocator", "Which page holds which tokens of which sequence.")
      .def(py::init<int64_t, int64_t>(), py::kw_only(), arg("num_pages"), arg("page_size"))
      .def("pages_needed", &PageAllocator::pages_needed, py::kw_only(), arg("prompt"), arg("capacity"),
           "Free pages that `admit` would take.")
      .def(
          "admit",
          [](PageAllocator& self, const std::vector<int64_t>& prompt, int64_t capacity) {
            const auto [sequence, num_cached] = self.admit(prompt, capacity);
            return py::make_tuple(sequence, num_cached);
          },
          py::kw_only(), arg("prompt"), arg("capacity"),
          "Reserve all pages of a new sequence: (sequence, prompt tokens that are cached already).")
      .def("publish", &PageAllocator::publish, arg("sequence"), py::kw_only(), arg("num_tokens"),
           "The first tokens of the prompt are written: their full pages may be shared.")
      .def(
          "fork",
          [](PageAllocator& self, int64_t sequence, int64_t num_tokens, int64_t capacity) {
            const auto [child, copies] = self.fork(sequence, num_tokens, capacity);
            return py::make_tuple(child, copies);
          },
          arg("sequence"), py::kw_only(), arg("num_tokens"), arg("capacity"),
          "A new sequence with the first tokens of another: (sequence, pages to copy as (from, to)).")
      .def("pages_needed_to_fork", &PageAllocator::pages_needed_to_fork, py::kw_only(), arg("num_tokens"),
           arg("capacity"), "Free pages that `fork` would take.")
      .def("own", &PageAllocator::own, arg("sequence"), py::kw_only(), arg("first"),
           "Copy on write from token `first` on: pages to copy as (from, to).")
      .def("release", &PageAllocator::release, arg("sequence"), "Give up a sequence.")
      .def("pages", &PageAllocator::pages, arg("sequence"), "The pages of a sequence, in order.")
      .def("references", &PageAllocator::references, arg("page"), "How many sequences hold a page.")
      .def_property_readonly("num_pages", &PageAllocator::num_pages)
      .def_property_readonly("num_free", &PageAllocator::num_free)
      .def_property_readonly("num_published", &PageAllocator::num_published)
      .def_property_readonly("page_size", &PageAllocator::page_size)
      .def("check_invariants", &PageAllocator::check_invariants, "Raises RuntimeError where the books do not agree.");

  py::class_<Pages>(m, "Pages", "Addresses and sizes of the pages and tables of a cache.")
      .def(py::init([](uintptr_t pages, uintptr_t block_table, const std::string& dtype, int64_t num_layers,
                       int64_t num_pages, int64_t page_size, int64_t num_kv_heads, int64_t head_dim,
                       int64_t num_sequences, int64_t table_width) {
             return Pages{pages,     block_table,  dtype,    num_layers,    num_pages,
                          page_size, num_kv_heads, head_dim, num_sequences, table_width};
           }),
           py::kw_only(), arg("pages"), arg("block_table"), arg("dtype"), arg("num_layers"), arg("num_pages"),
           arg("page_size"), arg("num_kv_heads"), arg("head_dim"), arg("num_sequences"), arg("table_width"));
  py::class_<Place>(m, "Place", "Threads of the CPU, or a stream of a CUDA device.")
      .def(py::init([](bool cuda, int device, uintptr_t stream, int num_threads) {
             return Place{cuda, device, stream, num_threads};
           }),
           py::kw_only(), arg("cuda"), arg("device"), arg("stream"), arg("num_threads"));
  m.def("append_kv", &append_kv, arg("pages"), py::kw_only(), arg("keys"), arg("values"), arg("sequence_stride"),
        arg("token_stride"), arg("context_lens"), arg("num_valid"), arg("cos"), arg("sin"), arg("num_new"),
        arg("place"), "Write new tokens behind every context, in one layer. Strides in bytes.");
  m.def("advance_rollback", &advance_rollback, py::kw_only(), arg("context_lens"), arg("prefix_lens"),
        arg("num_committed"), arg("num_sequences"), arg("copies"), arg("place"),
        "Move the lengths to what a pass has committed.");
  m.def("compact_kv", &compact_kv, arg("pages"), py::kw_only(), arg("context_lens"), arg("from_slots"), arg("copies"),
        arg("num_levels"), arg("place"), "Move a tree's accepted path behind its context, in all layers.");
  m.def("copy_pages", &copy_pages, arg("pages"), py::kw_only(), arg("copies"), arg("num_copies"), arg("place"),
        "Copy pages in all layers.");
  m.def("gather_kv", &gather_kv, arg("pages"), py::kw_only(), arg("out"), arg("context_lens"), arg("num_new"),
        arg("span"), arg("place"), "One layer's keys and values in the order of their tokens.");
  m.def("poison_kv", &poison_kv, arg("pages"), py::kw_only(), arg("context_lens"), arg("num_slots"), arg("place"),
        "NaN into the slots behind every context, in all layers.");
  m.def("window_attention", &window_attention, arg("pages"), py::kw_only(), arg("queries"), arg("strides"), arg("out"),
        arg("context_lens"), arg("window_bias"), arg("bias_sequence_stride"), arg("num_new"), arg("num_heads"),
        arg("scale"), arg("num_threads"), "Bottom-right causal attention over pages. Strides in elements.");
}

void define_layers(py::module_& m) {
  using py::arg;
  m.def("add_rms_norm", &add_rms_norm, py::kw_only(), arg("x"), arg("y"), arg("weight"), arg("sum"), arg("out"),
        arg("dtype"), arg("rows"), arg("hidden"), arg("eps"), arg("num_threads"),
        "The RMSNorm of x + y, and the sum; of x where y is 0.");
  m.def("rotate", &rotate, py::kw_only(), arg("x"), arg("sequence_stride"), arg("token_stride"), arg("cos"),
        arg("sin"), arg("dtype"), arg("sizes"), arg("num_threads"),
        "Rotate heads [S, N, H, D] in place. Strides in elements.");
  m.def("silu_mul", &silu_mul, py::kw_only(), arg("gate_up"), arg("out"), arg("dtype"), arg("rows"), arg("width"),
        arg("num_threads"), "silu(gate) * up.");
  m.def("multiplies_panels", &multiplies_panels, "Whether `linear` is the fastest product of bfloat16 on this CPU.");
  m.def("linear", &linear, arg("x"), arg("panels"), arg("bias"), arg("out"), arg("dtype"), arg("rows"), arg("depth"),
        arg("cols"), arg("num_threads"), "x W^T + bias with a matrix in panels.");
}

}  // namespace
}  // namespace sjd

PYBIND11_MODULE(_C, m) {
  using py::arg;
  m.doc() = "The native ops of sjd_engine.";
#if defined(SJD_CUDA_ARCHS)
  m.attr("has_cuda") = true;
  m.attr("cuda_archs") = sjd::words(SJD_CUDA_ARCHS);
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_archs") = py::tuple();
#endif
  m.def("isa", &sjd::isa, "The instruction set that the CPU ops run with.");
  m.def("cuda_devices", &sjd::devices,
        "(name, (major, minor), memory in bytes) of every CUDA device. Raises RuntimeError with CUDA's own message.");
  m.def("bfloat16_isa", &sjd::bfloat16_isa, "What multiplies bfloat16 in attention on a CPU.");
  sjd::define_paged_cache(m);
  sjd::define_layers(m);
  m.def("denoise_cpu", &sjd::denoise, py::kw_only(), arg("dtype"), arg("batch_size"), arg("num_slots"),
        arg("num_tokens"), arg("tokens_width"), arg("vocab_size"), arg("hidden"), arg("levels"), arg("noisy"),
        arg("embeddings"), arg("mean"), arg("std"), arg("inverse"), arg("encodings"), arg("keep"), arg("pull"),
        arg("tokens"), arg("num_committed"), arg("lowered"), arg("inputs"), arg("out_levels"), arg("num_threads"),
        "The denoise update of a window, see kernels/noise.denoise. Tensors are addresses.");
  m.def("verify_cpu", &sjd::verify, py::kw_only(), arg("logits"), arg("dtype"), arg("guided"), arg("strides"),
        arg("previous_logits"), arg("previous_strides"), arg("batch_size"), arg("window_size"), arg("next_window_size"),
        arg("max_window_size"), arg("vocab_size"), arg("num_tokens"), arg("tokens"), arg("num_committed"),
        arg("iteration"), arg("commit_pass"), arg("law_row"), arg("laws"), arg("zero_residual"), arg("nonfinite_rows"),
        arg("zero_draft_prob"), arg("candidates"), arg("depth"), arg("siblings"), arg("num_accepted"),
        arg("accepted_slots"), arg("drafted"), arg("drafted_scale"), arg("forced_ids"), arg("row_start"), arg("above"),
        arg("seeds"), arg("guidance_scale"), arg("temperature"), arg("top_k"), arg("top_p"), arg("reuse_threshold"),
        arg("most_accepted"),
        arg("accept"), arg("refresh"), arg("init"), arg("num_threads"),
        "One decoding pass, see kernels/reference.verify. Tensors are addresses, 0 where absent; strides are (pair, "
        "batch, row, vocab) in elements.");
}
