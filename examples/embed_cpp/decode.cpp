// Jacobi decoding in C++ with libsjd, no Python: the tokens and the passes of one image of a toy model.
//
//     decode [seed [method]]        method: a number of sjd_method, 0 by default
#include <sjd.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr int64_t kTokens = 64, kVocab = 32, kWindow = 16;

void must(sjd_status status) {
  if (status == SJD_OK) return;
  std::fprintf(stderr, "decode: %s\n", sjd_last_error());
  std::exit(1);
}

// The toy model: a logit is a hash of the last three tokens of its context, which it reads from the cache.
float logit(const float* context, int64_t size, int64_t code) {
  uint64_t hash = static_cast<uint64_t>(code);
  for (int64_t t = size < 3 ? 0 : size - 3; t < size; ++t) {
    hash = (hash ^ static_cast<uint64_t>(context[t] + 2)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  return static_cast<float>(hash % 256) / 64;
}

int main(int argc, char** argv) {
  const int64_t seed = argc > 1 ? std::atoll(argv[1]) : 0;
  sjd_decoder_options options = {sizeof options};
  options.num_tokens = kTokens;
  options.vocab_size = kVocab;
  options.window_size = kWindow;
  options.seeds = &seed;
  options.method = argc > 2 ? std::atoi(argv[2]) : SJD_MAXIMAL;
  const int64_t width = options.method == SJD_AR ? 1 : kWindow;
  sjd_cache_options pages = {sizeof pages};
  pages.num_kv_heads = pages.head_dim = 1;
  pages.capacity = kTokens + kWindow;
  pages.page_size = 8;
  sjd_decoder* decoder;
  sjd_cache* cache;
  must(sjd_decoder_create(&options, &decoder));
  must(sjd_cache_create(&pages, &cache));
  must(sjd_cache_admit(cache, 0, nullptr, 0, pages.capacity, nullptr));

  int64_t ids[kWindow], positions[kWindow], length = 0, tokens[kTokens], passes;
  std::vector<float> context(2 * pages.capacity), logits[2];  // two buffers take turns: verify reads the last pass's
  for (auto& buffer : logits) buffer.resize(width * kVocab);
  for (int pass = 0; !sjd_decoder_done(decoder); ++pass) {
    must(sjd_decoder_window(decoder, ids, positions));
    const std::vector<float> rows(ids, ids + width);  // a token's key and value are the token
    must(sjd_cache_append(cache, 0, rows.data(), rows.data(), width));
    must(sjd_cache_gather(cache, 0, width, pages.capacity, context.data()));
    std::vector<float>& buffer = logits[pass % 2];
    for (int64_t i = 0; i < width * kVocab; ++i) {
      buffer[i] = logit(context.data(), length + 1 + i / kVocab, i % kVocab);
    }
    sjd_logits view = {sizeof view};
    view.data = buffer.data();
    must(sjd_decoder_verify(decoder, &view, &length));  // tokens committed: so many slots of the cache are valid
    must(sjd_cache_rollback(cache, &length));
  }

  must(sjd_decoder_read(decoder, tokens, &passes));
  for (int64_t token : tokens) std::printf("%" PRId64 " ", token);
  std::printf("\n%" PRId64 " passes\n", passes);
  sjd_cache_destroy(cache);
  sjd_decoder_destroy(decoder);
}
