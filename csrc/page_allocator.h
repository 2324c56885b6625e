// Which page holds which tokens of which sequence. Host memory only: the pages themselves are paged_kv.h's.
//
// A sequence reserves all pages of its capacity when it is admitted, so that it never waits for one later. A page has
// as many references as sequences hold it, and is written only while it has one. Pages full of prompt tokens are found
// again by what they hold and by what stands before them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace sjd {

// Fewer pages are free than are needed. Nothing has changed; it can be tried again when a sequence is released.
struct PagesExhausted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class PageAllocator {
 public:
  using Copies = std::vector<std::pair<int32_t, int32_t>>;  // (from, to): page contents that the caller copies now

  struct Admission {
    int64_t sequence;
    int64_t num_cached;  // first tokens of the prompt whose keys and values stand in shared pages already
  };

  struct Fork {
    int64_t sequence;
    Copies copies;
  };

  PageAllocator(int64_t num_pages, int64_t page_size);

  // Pages of the free list that `admit` would take.
  int64_t pages_needed(const std::vector<int64_t>& prompt, int64_t capacity) const;

  // A new sequence of at most `capacity` tokens, its prompt among them. Full pages of the prompt that are published are
  // shared. Throws PagesExhausted.
  Admission admit(const std::vector<int64_t>& prompt, int64_t capacity);

  // The keys and values of the first `num_tokens` prompt tokens are written: their full pages may be shared from now
  // on.
  void publish(int64_t sequence, int64_t num_tokens);

  // Pages of the free list that `fork` would take.
  int64_t pages_needed_to_fork(int64_t num_tokens, int64_t capacity) const {
    return pages_of(capacity) - num_tokens / page_size_;
  }

  // A new sequence of at most `capacity` tokens that begins with the first `num_tokens` of another. Their full pages
  // are shared; what stands in the page that both write next is copied. Throws PagesExhausted.
  Fork fork(int64_t sequence, int64_t num_tokens, int64_t capacity);

  // Copy on write: the sequence may write from token `first` on, which pages that it shares would forbid. Throws
  // PagesExhausted.
  Copies own(int64_t sequence, int64_t first);

  // Give up a sequence. Pages without other references are free again, and forgotten.
  void release(int64_t sequence);

  const std::vector<int32_t>& pages(int64_t sequence) const { return find("pages", sequence).pages; }
  int64_t references(int64_t page) const;
  int64_t num_pages() const { return static_cast<int64_t>(references_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_published() const { return static_cast<int64_t>(index_.size()); }
  int64_t page_size() const { return page_size_; }

  // Throws std::logic_error where references, free list, tables and index do not agree.
  void check_invariants() const;

 private:
  struct Sequence {
    std::vector<int32_t> pages;
    std::vector<int64_t> prompt;
  };

  // What a published page holds. The page before it lives at least as long: who refers to a page refers to those
  // before.
  struct Content {
    uint64_t hash;  // of all tokens up to the page's end
    int32_t before;
    std::vector<int64_t> tokens;
  };

  const Sequence& find(const char* op, int64_t sequence) const;
  Sequence& find(const char* op, int64_t sequence);
  Content content(const std::vector<int64_t>& prompt, int64_t page, uint64_t hash_before, int32_t before) const;
  int32_t published(const Content& content) const;
  std::vector<int32_t> shared_prefix(const std::vector<int64_t>& prompt) const;
  int64_t pages_of(int64_t num_tokens) const { return (num_tokens + page_size_ - 1) / page_size_; }
  void require_free(const char* op, int64_t needed) const;
  int32_t take();
  void drop(int32_t page);
  void forget(int32_t page);

  int64_t page_size_;
  std::vector<int64_t> references_;  // by page
  std::vector<int32_t> free_;        // a stack: what was used last is in the caches
  std::unordered_map<int64_t, Sequence> sequences_;
  int64_t next_sequence_ = 0;
  std::unordered_map<int32_t, Content> contents_;     // by published page
  std::unordered_multimap<uint64_t, int32_t> index_;  // published pages by hash
};

}  // namespace sjd
