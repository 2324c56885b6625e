// The module sjd_engine._C: the only file that knows Python. Tensors come as addresses, so that neither building nor
// loading it needs torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <sstream>
#include <utility>

#include "check.h"
#include "device_info.h"
#include "verify_cpu.h"

namespace py = pybind11;

namespace sjd {
namespace {

constexpr const char* kVerify = "verify_cpu";

template <class T>
using Names = std::initializer_list<std::pair<const char*, T>>;

// The value called `name`.
template <class T>
T named(const char* argument, const std::string& name, Names<T> known) {
  std::string expected = "one of";
  for (const auto& [key, value] : known) {
    if (name == key) return value;
    expected += std::string(expected.back() == 'f' ? " " : ", ") + key;
  }
  check(false, kVerify, argument, expected, "'" + name + "'");
  return known.begin()->second;
}

void check_range(const char* argument, int64_t value, int64_t least, int64_t most, const char* remedy = "") {
  check(least <= value && value <= most, kVerify, argument, "in " + text(least) + ".." + text(most), text(value),
        remedy);
}

template <class T>
T* required(const char* argument, uintptr_t address) {
  check(address != 0, kVerify, argument, "the address of a tensor", "0");
  return reinterpret_cast<T*>(address);
}

template <class T>
const T* optional(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

using Strides = std::array<int64_t, 4>;  // pair, batch, row, vocab

Logits logits_at(uintptr_t address, DType dtype, bool guided, const Strides& strides) {
  return {optional<void>(address), dtype, guided, strides[0], strides[1], strides[2], strides[3]};
}

void verify(uintptr_t logits, const std::string& dtype, bool guided, const Strides& strides, uintptr_t previous_logits,
            const Strides& previous_strides, int64_t batch_size, int64_t window_size, int64_t vocab_size,
            int64_t num_tokens, uintptr_t tokens, uintptr_t num_committed, uintptr_t iteration, uintptr_t commit_pass,
            uintptr_t law_row, uintptr_t laws, uintptr_t zero_residual, uintptr_t nonfinite_rows,
            uintptr_t zero_draft_prob, uintptr_t num_accepted, uintptr_t forced_ids, uintptr_t row_start,
            uintptr_t above, uintptr_t seeds, uintptr_t guidance_scale, uintptr_t temperature, uintptr_t top_k,
            uintptr_t top_p, uintptr_t reuse_threshold, const std::string& accept, const std::string& refresh,
            const std::string& init, int num_threads) {
  constexpr int64_t kMost = INT32_MAX;
  check_range("batch_size", batch_size, 1, kMost);
  check_range("window_size", window_size, 1, kMost);
  check_range("num_tokens", num_tokens, 1, kMost);
  check_range("vocab_size", vocab_size, 2, 1 << 18, "sums of more weights would not fit 64 bits");
  check_range("num_threads", num_threads, 1, kMost);
  const DType type = named<DType>(
      "dtype", dtype, {{"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}});
  required<void>("logits", logits);

  VerifyParams p;
  p.logits = logits_at(logits, type, guided, strides);
  p.previous_logits = logits_at(previous_logits, type, guided, previous_strides);
  p.batch_size = batch_size;
  p.window_size = window_size;
  p.num_tokens = num_tokens;
  p.vocab_size = static_cast<int>(vocab_size);
  p.tokens = required<int64_t>("tokens", tokens);
  p.num_committed = required<int64_t>("num_committed", num_committed);
  p.iteration = required<int64_t>("iteration", iteration);
  p.commit_pass = required<int64_t>("commit_pass", commit_pass);
  p.law_row = required<int32_t>("law_row", law_row);
  p.laws = required<RowLaw>("laws", laws);
  p.zero_residual = required<int64_t>("zero_residual", zero_residual);
  p.nonfinite_rows = required<int64_t>("nonfinite_rows", nonfinite_rows);
  p.zero_draft_prob = required<int64_t>("zero_draft_prob", zero_draft_prob);
  p.num_accepted = required<int64_t>("num_accepted", num_accepted);
  p.forced_ids = optional<int64_t>(forced_ids);
  p.row_start = required<int64_t>("row_start", row_start);
  p.above = required<int64_t>("above", above);
  p.seeds = required<int64_t>("seeds", seeds);
  p.guidance_scale = optional<float>(guidance_scale);
  p.temperature = optional<float>(temperature);
  p.top_k = optional<int64_t>(top_k);
  p.top_p = optional<float>(top_p);
  p.reuse_threshold = optional<float>(reuse_threshold);
  p.accept = named<Accept>("accept", accept, {{"ratio", Accept::kRatio}, {"match", Accept::kMatch}});
  p.refresh = named<Refresh>("refresh", refresh,
                             {{"fresh", Refresh::kFresh},
                              {"reuse", Refresh::kReuse},
                              {"maximal", Refresh::kMaximal},
                              {"gumbel", Refresh::kGumbel},
                              {"argmax", Refresh::kArgmax}});
  p.init = named<Init>("init", init,
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
  m.def("verify_cpu", &sjd::verify, py::kw_only(), arg("logits"), arg("dtype"), arg("guided"), arg("strides"),
        arg("previous_logits"), arg("previous_strides"), arg("batch_size"), arg("window_size"), arg("vocab_size"),
        arg("num_tokens"), arg("tokens"), arg("num_committed"), arg("iteration"), arg("commit_pass"), arg("law_row"),
        arg("laws"), arg("zero_residual"), arg("nonfinite_rows"), arg("zero_draft_prob"), arg("num_accepted"),
        arg("forced_ids"), arg("row_start"), arg("above"), arg("seeds"), arg("guidance_scale"), arg("temperature"),
        arg("top_k"), arg("top_p"), arg("reuse_threshold"), arg("accept"), arg("refresh"), arg("init"),
        arg("num_threads"),
        "One decoding pass, see kernels/reference.verify. Tensors are addresses, 0 where absent; strides are (pair, "
        "batch, row, vocab) in elements.");
}
