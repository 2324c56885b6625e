#include "page_allocator.h"

#include <algorithm>

#include "check.h"

namespace sjd {
namespace {

constexpr int32_t kNone = -1;

// One step of a chained hash. What it finds is compared token for token, so it need not be strong.
uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) + 0x9E3779B97F4A7C15u;
  hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9u;
  hash = (hash ^ (hash >> 27)) * 0x94D049BB133111EBu;
  return hash ^ (hash >> 31);
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error("PageAllocator: " + what);
}

}  // namespace

PageAllocator::PageAllocator(int64_t num_pages, int64_t page_size) : page_size_(page_size) {
  check_range("PageAllocator", "num_pages", num_pages, 1, INT32_MAX);
  check_range("PageAllocator", "page_size", page_size, 1, INT32_MAX);
  references_.resize(num_pages);
  for (int64_t page = num_pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
}

int64_t PageAllocator::pages_needed(const std::vector<int64_t>& prompt, int64_t capacity) const {
  return pages_of(capacity) - static_cast<int64_t>(shared_prefix(prompt).size());
}

PageAllocator::Admission PageAllocator::admit(const std::vector<int64_t>& prompt, int64_t capacity) {
  check_range("admit", "capacity", capacity, std::max<int64_t>(1, prompt.size()), num_pages() * page_size_);
  Sequence sequence{shared_prefix(prompt), prompt};
  const int64_t num_shared = static_cast<int64_t>(sequence.pages.size());
  require_free("admit", pages_of(capacity) - num_shared);
  for (int32_t page : sequence.pages) ++references_[page];
  while (static_cast<int64_t>(sequence.pages.size()) < pages_of(capacity)) sequence.pages.push_back(take());
  sequences_.emplace(next_sequence_, std::move(sequence));
  return {next_sequence_++, num_shared * page_size_};
}

void PageAllocator::publish(int64_t id, int64_t num_tokens) {
  const Sequence& sequence = find("publish", id);
  check_range("publish", "num_tokens", num_tokens, 0, sequence.prompt.size());
  uint64_t hash = 0;
  int32_t before = kNone;
  for (int64_t i = 0; i < num_tokens / page_size_; ++i) {
    const int32_t page = sequence.pages[i];
    Content here = content(sequence.prompt, i, hash, before);
    hash = here.hash;
    before = page;
    // Where another sequence published the same tokens first, the chain cannot go on through this one's own pages.
    const int32_t known = published(here);
    if (known != kNone && known != page) return;
    if (known == kNone) {
      index_.emplace(hash, page);
      contents_.emplace(page, std::move(here));
    }
  }
}

PageAllocator::Fork PageAllocator::fork(int64_t id, int64_t num_tokens, int64_t capacity) {
  const Sequence& parent = find("fork", id);
  check_range("fork", "num_tokens", num_tokens, 0, parent.pages.size() * page_size_);
  check_range("fork", "capacity", capacity, std::max<int64_t>(1, num_tokens), num_pages() * page_size_);
  require_free("fork", pages_needed_to_fork(num_tokens, capacity));
  const int64_t num_shared = num_tokens / page_size_, known = std::min<int64_t>(num_tokens, parent.prompt.size());
  Sequence child{{parent.pages.begin(), parent.pages.begin() + num_shared},
                 {parent.prompt.begin(), parent.prompt.begin() + known}};
  for (int32_t page : child.pages) ++references_[page];
  while (static_cast<int64_t>(child.pages.size()) < pages_of(capacity)) child.pages.push_back(take());
  Fork result{next_sequence_++, {}};
  if (num_tokens % page_size_) result.copies.emplace_back(parent.pages[num_shared], child.pages[num_shared]);
  sequences_.emplace(result.sequence, std::move(child));
  return result;
}

PageAllocator::Copies PageAllocator::own(int64_t id, int64_t first) {
  Sequence& sequence = find("own", id);
  check_range("own", "first", first, 0, sequence.pages.size() * page_size_);
  const auto begin = sequence.pages.begin() + first / page_size_;
  require_free("own", std::count_if(begin, sequence.pages.end(), [&](int32_t page) { return references_[page] > 1; }));
  Copies copies;
  for (auto page = begin; page != sequence.pages.end(); ++page) {
    if (references_[*page] > 1) {
      const int32_t mine = take();
      if (page == begin && first % page_size_) copies.emplace_back(*page, mine);
      drop(*page);
      *page = mine;
    } else {
      forget(*page);
    }
  }
  return copies;
}

void PageAllocator::release(int64_t id) {
  const Sequence& sequence = find("release", id);
  // Last page first, so that no published page outlives the one before it.
  std::for_each(sequence.pages.rbegin(), sequence.pages.rend(), [this](int32_t page) { drop(page); });
  sequences_.erase(id);
}

int64_t PageAllocator::references(int64_t page) const {
  check_range("references", "page", page, 0, num_pages() - 1);
  return references_[page];
}

void PageAllocator::check_invariants() const {
  std::vector<int64_t> counted(references_.size());
  for (const auto& [id, sequence] : sequences_) {
    for (int32_t page : sequence.pages) ++counted[page];
  }
  require(counted == references_, "references differ from those of the tables");
  std::vector<bool> is_free(references_.size());
  for (int32_t page : free_) {
    require(!is_free[page], "page " + text(page) + " is free twice");
    require(references_[page] == 0, "page " + text(page) + " is free and referenced");
    is_free[page] = true;
  }
  for (size_t page = 0; page < references_.size(); ++page) {
    require(is_free[page] || references_[page] > 0, "page " + text(page) + " is lost");
  }
  require(index_.size() == contents_.size(), "index and contents differ");
  for (const auto& [page, content] : contents_) {
    require(published(content) == page, "page " + text(page) + " is not found by what it holds");
    require(references_[page] > 0, "page " + text(page) + " is published and free");
    require(content.before == kNone || contents_.count(content.before), "a published page follows none");
  }
}

// ------------------------------------------------------------------------------------------------------------ parts

const PageAllocator::Sequence& PageAllocator::find(const char* op, int64_t sequence) const {
  const auto found = sequences_.find(sequence);
  check(found != sequences_.end(), op, "sequence", "one that was admitted and not released", text(sequence));
  return found->second;
}

PageAllocator::Sequence& PageAllocator::find(const char* op, int64_t sequence) {
  return const_cast<Sequence&>(std::as_const(*this).find(op, sequence));
}

PageAllocator::Content PageAllocator::content(const std::vector<int64_t>& prompt, int64_t page, uint64_t hash_before,
                                              int32_t before) const {
  const auto first = prompt.begin() + page * page_size_;
  Content result{hash_before, before, {first, first + page_size_}};
  for (int64_t token : result.tokens) result.hash = mix(result.hash, static_cast<uint64_t>(token));
  return result;
}

// The published page that holds this, or kNone.
int32_t PageAllocator::published(const Content& content) const {
  const auto [first, last] = index_.equal_range(content.hash);
  for (auto entry = first; entry != last; ++entry) {
    const Content& known = contents_.at(entry->second);
    if (known.before == content.before && known.tokens == content.tokens) return entry->second;
  }
  return kNone;
}

std::vector<int32_t> PageAllocator::shared_prefix(const std::vector<int64_t>& prompt) const {
  std::vector<int32_t> pages;
  uint64_t hash = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(prompt.size()) / page_size_; ++i) {
    const Content here = content(prompt, i, hash, pages.empty() ? kNone : pages.back());
    const int32_t page = published(here);
    if (page == kNone) break;
    hash = here.hash;
    pages.push_back(page);
  }
  return pages;
}

void PageAllocator::require_free(const char* op, int64_t needed) const {
  if (needed <= num_free()) return;
  throw PagesExhausted(std::string(op) + ": needs " + text(needed) + " free pages, but " + text(num_free()) + " of " +
                       text(num_pages()) + " are free; release a sequence, or make the cache with more pages");
}

int32_t PageAllocator::take() {
  const int32_t page = free_.back();
  free_.pop_back();
  references_[page] = 1;
  return page;
}

void PageAllocator::drop(int32_t page) {
  if (--references_[page] > 0) return;
  forget(page);
  free_.push_back(page);
}

// The page is no longer found by what it holds.
void PageAllocator::forget(int32_t page) {
  const auto found = contents_.find(page);
  if (found == contents_.end()) return;
  const auto [first, last] = index_.equal_range(found->second.hash);
  index_.erase(std::find_if(first, last, [page](const auto& entry) { return entry.second == page; }));
  contents_.erase(found);
}

}  // namespace sjd
