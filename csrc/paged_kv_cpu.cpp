#include <algorithm>

#include "paged_kv.h"
#include "thread_pool.h"

namespace sjd {
namespace {

// Fewer bytes than this are moved before a second thread is awake.
constexpr int64_t kBytesForThreads = 1 << 19;

template <class Op>
void run(const Op& op, int num_threads) {
  const int64_t count = op.count(), parts = op.bytes() < kBytesForThreads ? 1 : std::min<int64_t>(num_threads, count);
  ThreadPool::run(parts, num_threads, [&](int64_t part) {
    for (int64_t i = part * count / parts; i < (part + 1) * count / parts; ++i) op(i, 0, 1);
  });
}

}  // namespace

void run_cpu(const AppendKV& op, int num_threads) { run(op, num_threads); }
void run_cpu(const AdvanceRollback& op, int num_threads) { run(op, num_threads); }
void run_cpu(const CopyPages& op, int num_threads) { run(op, num_threads); }
void run_cpu(const GatherKV& op, int num_threads) { run(op, num_threads); }
void run_cpu(const PoisonKV& op, int num_threads) { run(op, num_threads); }

}  // namespace sjd
