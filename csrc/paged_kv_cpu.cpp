#include <algorithm>

#include "clones.h"
#include "paged_kv.h"
#include "thread_pool.h"

namespace sjd {
namespace {

// Fewer bytes than this are moved before a second thread is awake.
constexpr int64_t kBytesForThreads = 1 << 19;

template <class Op>
SJD_INLINE void each_item(const Op& op, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) op(i, 0, 1);
}

// Rotation is arithmetic, which an instruction set matters to.
SJD_CLONES void run_items(const AppendKV& op, int64_t first, int64_t last) { each_item(op, first, last); }

template <class Op>
void run_items(const Op& op, int64_t first, int64_t last) {
  each_item(op, first, last);
}

template <class Op>
void run(const Op& op, int num_threads) {
  const int64_t count = op.count(), parts = op.bytes() < kBytesForThreads ? 1 : std::min<int64_t>(num_threads, count);
  ThreadPool::run(parts, num_threads,
                  [&](int64_t part) { run_items(op, part * count / parts, (part + 1) * count / parts); });
}

}  // namespace

void run_cpu(const AppendKV& op, int num_threads) { run(op, num_threads); }
void run_cpu(const AdvanceRollback& op, int num_threads) { run(op, num_threads); }
void run_cpu(const CompactKV& op, int num_threads) { run(op, num_threads); }
void run_cpu(const CopyPages& op, int num_threads) { run(op, num_threads); }
void run_cpu(const GatherKV& op, int num_threads) { run(op, num_threads); }
void run_cpu(const PoisonKV& op, int num_threads) { run(op, num_threads); }

}  // namespace sjd
