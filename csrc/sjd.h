/* Jacobi decoding and the paged key/value cache on a CPU, without Python: the library libsjd.
 *
 * The caller owns the model. A pass asks the decoder for its window, runs the model on it, and gives the logits back:
 *
 *     while (!sjd_decoder_done(decoder)) {
 *       sjd_decoder_window(decoder, ids, positions);
 *       ... append keys and values to the cache, attend, compute logits ...
 *       sjd_decoder_verify(decoder, &logits, num_committed);
 *       sjd_cache_rollback(cache, lengths);
 *     }
 *
 * B images, T tokens of each, V codes, W tokens of a window; S sequences of the cache, KH kv heads, D head dim.
 *
 * A function that returns sjd_status leaves everything as it was unless it returns SJD_OK; sjd_last_error() says what
 * was expected and what came. Options and views begin with their size, so that a program keeps working with a later
 * library: what lies behind the size counts as 0, and 0 is always the default. A handle is used by one thread at a
 * time.
 */
#ifndef SJD_H_
#define SJD_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#error "libsjd needs a POSIX system"
#endif
#define SJD_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  SJD_OK = 0,
  SJD_INVALID_ARGUMENT = 1,
  SJD_OUT_OF_PAGES = 2, /* of a cache; nothing has changed, and it can be tried again when a sequence is released */
  SJD_OUT_OF_MEMORY = 3,
  SJD_FAILURE = 4
} sjd_status;

typedef enum { SJD_FLOAT32 = 0, SJD_FLOAT16 = 1, SJD_BFLOAT16 = 2 } sjd_dtype;

/* How drafts are accepted and refreshed. All but SJD_REUSE follow exactly the law of one token a pass, and SJD_JACOBI
 * that of greedy decoding. SJD_EXACT gives the very tokens of SJD_AR for the same seed. */
typedef enum {
  SJD_MAXIMAL = 0,
  SJD_AR = 1,
  SJD_JACOBI = 2,
  SJD_FRESH = 3, /* "sjd" in Python */
  SJD_REUSE = 4, /* "sjd++" in Python; lossy */
  SJD_GUMBEL = 5,
  SJD_EXACT = 6
} sjd_method;

/* How drafts enter at the window's right edge. */
typedef enum {
  SJD_RANDOM = 0,
  SJD_LEFT_REPEAT = 1,
  SJD_ABOVE_REPEAT = 2,
  SJD_LEFT_SAMPLE = 3,
  SJD_ABOVE_SAMPLE = 4
} sjd_init;

/* Why this thread's last call failed; "" before the first failure. Valid until the next one. */
SJD_API const char* sjd_last_error(void);

/* ---------------------------------------------------------------------------------------------------------- decoder */

typedef struct {
  size_t size;               /* sizeof(sjd_decoder_options) */
  int64_t batch_size;        /* B; 0: 1 */
  int64_t num_tokens;        /* T >= 1, forced ones included */
  int64_t vocab_size;        /* V in 2..2^18 */
  int64_t window_size;       /* W; 0: 1. SJD_AR always takes 1 */
  const int64_t* seeds;      /* [B], one for each image; null: 0, 1, ... */
  const int64_t* forced_ids; /* [T], the token of a position that the grammar fixes, -1 elsewhere; null: none */
  int64_t cols;              /* image tokens in a row of the grid; 0: all */
  int64_t top_k;             /* 0: all */
  float top_p;               /* in (0, 1]; 0: 1 */
  float temperature;         /* > 0; 0: 1 */
  float guidance_scale;      /* >= 1; 0: 1. Above 1 logits come in pairs */
  float reuse_threshold;     /* of SJD_REUSE, > 0; 0: 0.5 */
  int32_t method;            /* sjd_method */
  int32_t init;              /* sjd_init */
  int32_t num_threads;       /* 0: 1; the result does not depend on it */
} sjd_decoder_options;

/* A tensor [B, W, V], or [2, B, W, V] (conditional, unconditional) where guidance_scale > 1. */
typedef struct {
  size_t size;      /* sizeof(sjd_logits) */
  const void* data; /* keeps its values until the next verify returns, which computes the drafts' laws from it again */
  int32_t dtype;    /* sjd_dtype; the same in every pass */
  int64_t strides[4]; /* of pair, image, row and token, in elements; all 0: contiguous */
} sjd_logits;

typedef struct sjd_decoder sjd_decoder;

/* Arrays of the options are copied. */
SJD_API sjd_status sjd_decoder_create(const sjd_decoder_options* options, sjd_decoder** decoder);
SJD_API void sjd_decoder_destroy(sjd_decoder* decoder);

/* Whether every image is complete. */
SJD_API int sjd_decoder_done(const sjd_decoder* decoder);

/* The tokens of the next forward pass, both [B, W]. Slot 0 is the last committed token, or -1 at position -1, the end
 * of the caller's prompt; slots past the image's end have id 0 and position T. */
SJD_API sjd_status sjd_decoder_window(const sjd_decoder* decoder, int64_t* ids, int64_t* positions);

/* Accept, recover, refresh and refill: one pass. Slot i of the logits predicts position positions[i] + 1.
 * num_committed [B], or null: tokens committed so far. Keys and values are valid for as many slots from the anchor of
 * the first pass on. */
SJD_API sjd_status sjd_decoder_verify(sjd_decoder* decoder, const sjd_logits* logits, int64_t* num_committed);

/* tokens [B, T], -1 where nothing is committed; passes [B] that each image took part in; null: not wanted. */
SJD_API sjd_status sjd_decoder_read(const sjd_decoder* decoder, int64_t* tokens, int64_t* passes);

/* ------------------------------------------------------------------------------------------------------------ cache */

typedef struct {
  size_t size;           /* sizeof(sjd_cache_options) */
  int64_t num_layers;    /* 0: 1 */
  int64_t num_kv_heads;  /* KH >= 1 */
  int64_t head_dim;      /* D >= 1 */
  int64_t num_sequences; /* S, rows that sequences are admitted to; 0: 1 */
  int64_t capacity;      /* tokens that a sequence may hold */
  int64_t num_pages;     /* of the pool; 0: enough for all sequences at their capacity */
  int64_t page_size;     /* tokens of a page; 0: 64 */
  int32_t dtype;         /* sjd_dtype */
  int32_t num_threads;   /* 0: 1 */
} sjd_cache_options;

typedef struct sjd_cache sjd_cache;

SJD_API sjd_status sjd_cache_create(const sjd_cache_options* options, sjd_cache** cache);
SJD_API void sjd_cache_destroy(sjd_cache* cache);

/* Reserve all pages of a new sequence of at most `capacity` tokens, and let it be `row`. Full pages of the prompt that
 * another sequence has published are shared: *num_cached (or null) tells how many of its tokens are there already,
 * which is its length. */
SJD_API sjd_status sjd_cache_admit(sjd_cache* cache, int64_t row, const int64_t* prompt, int64_t prompt_size,
                                   int64_t capacity, int64_t* num_cached);

/* The first num_tokens of the prompt are written: sequences admitted later share their full pages. */
SJD_API sjd_status sjd_cache_publish(sjd_cache* cache, int64_t row, int64_t num_tokens);

/* Make `into` a twin of `row` with its first num_tokens. Full pages are shared, the page both write next is copied. */
SJD_API sjd_status sjd_cache_fork(sjd_cache* cache, int64_t row, int64_t into, int64_t num_tokens, int64_t capacity);

/* Copy on write: let `row` write from token `first` on, where it may share pages. */
SJD_API sjd_status sjd_cache_own(sjd_cache* cache, int64_t row, int64_t first);

/* Give the pages of `row` back; it can be admitted to again. */
SJD_API sjd_status sjd_cache_release(sjd_cache* cache, int64_t row);

/* Write keys and values [S, num_new, KH, D] of one layer behind every length. The lengths stay until a rollback. Tokens
 * behind a sequence's capacity, and those of rows without one, are dropped. */
SJD_API sjd_status sjd_cache_append(sjd_cache* cache, int64_t layer, const void* keys, const void* values,
                                    int64_t num_new);

/* out [S, num_new, H, D]: attention of the tokens that were appended last, with queries [S, num_new, H, D] over all
 * tokens up to each. H is a multiple of KH; scale 0: 1 / sqrt(D). */
SJD_API sjd_status sjd_cache_attend(const sjd_cache* cache, int64_t layer, const void* queries, int64_t num_heads,
                                    int64_t num_new, float scale, void* out);

/* out [2, S, span, KH, D]: keys and values in the order of their tokens, num_new behind every length included, and
 * zeros from there on. */
SJD_API sjd_status sjd_cache_gather(const sjd_cache* cache, int64_t layer, int64_t num_new, int64_t span, void* out);

/* Keep the first lengths[s] tokens of sequence s, [S]: forget what was rejected. The next append overwrites it. */
SJD_API sjd_status sjd_cache_rollback(sjd_cache* cache, const int64_t* lengths);

/* lengths [S], 0 of rows without a sequence; *num_free_pages; null: not wanted. */
SJD_API sjd_status sjd_cache_read(const sjd_cache* cache, int64_t* lengths, int64_t* num_free_pages);

#ifdef __cplusplus
}
#endif

#endif /* SJD_H_ */
