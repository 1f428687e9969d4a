// The part of llama.cpp's C API that llama_state calls, written for llama_state.
//
// This file is the single source of the binding: build_ffi.py makes the function
// table, the wrappers and the type stubs out of it. A new function is one line here.
//
// A library that lacks one of these functions is refused, unless the function belongs
// to a capability (CAPABILITIES in llama_state/_library.py): those are optional.
//
// Checked against llama.cpp b8672 to b11549 (April to October 2026).

#ifndef LLAMA_STATE_LLAMA_H
#define LLAMA_STATE_LLAMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct llama_vocab;
struct llama_model;
struct llama_context;
struct llama_memory_i;

// The fields of these two move between builds (see llama_state/_params.py), so they
// travel as blocks that are larger than any of their known layouts.
struct llama_model_params {
    uint64_t block[128];
};
struct llama_context_params {
    uint64_t block[128];
};

struct llama_batch {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos;
    int32_t *n_seq_id;
    int32_t **seq_id;
    int8_t *logits;
};

typedef void (*ggml_log_callback)(int level, const char *text, void *user_data);

// Log
LLAMA_API void llama_log_set(ggml_log_callback callback, void *user_data);
LLAMA_API void llama_log_get(ggml_log_callback *callback, void **user_data);

// Life of a library, a model, a context
LLAMA_API void llama_backend_init(void);
LLAMA_API void ggml_backend_load_all(void);
LLAMA_API size_t ggml_backend_reg_count(void);
LLAMA_API void ggml_backend_load_all_from_path(const char *folder);
LLAMA_API const char *llama_version(void);
LLAMA_API const char *ggml_commit(void);
LLAMA_API struct llama_model_params llama_model_default_params(void);
LLAMA_API struct llama_context_params llama_context_default_params(void);
LLAMA_API struct llama_model *llama_model_load_from_file(const char *path, struct llama_model_params params);
LLAMA_API void llama_model_free(struct llama_model *model);
LLAMA_API struct llama_context *llama_init_from_model(struct llama_model *model, struct llama_context_params params);
LLAMA_API void llama_free(struct llama_context *ctx);

// Facts of a model
LLAMA_API const struct llama_vocab *llama_model_get_vocab(const struct llama_model *model);
LLAMA_API int32_t llama_model_meta_val_str(const struct llama_model *model, const char *key, char *buf, size_t size);
LLAMA_API int32_t llama_model_meta_count(const struct llama_model *model);
LLAMA_API int32_t llama_model_meta_key_by_index(const struct llama_model *model, int32_t i, char *buf, size_t size);
LLAMA_API uint64_t llama_model_n_params(const struct llama_model *model);
LLAMA_API uint64_t llama_model_size(const struct llama_model *model);
LLAMA_API int32_t llama_model_rope_type(const struct llama_model *model);
LLAMA_API int32_t llama_model_n_swa(const struct llama_model *model);
LLAMA_API bool llama_model_is_recurrent(const struct llama_model *model);
LLAMA_API bool llama_model_is_hybrid(const struct llama_model *model);
LLAMA_API bool llama_model_has_encoder(const struct llama_model *model);
LLAMA_API int32_t llama_vocab_type(const struct llama_vocab *vocab);
LLAMA_API int32_t llama_vocab_n_tokens(const struct llama_vocab *vocab);
LLAMA_API int32_t llama_tokenize(const struct llama_vocab *vocab, const char *text, int32_t text_len, int32_t *tokens, int32_t n_tokens_max, bool add_special, bool parse_special);
LLAMA_API int32_t llama_detokenize(const struct llama_vocab *vocab, const int32_t *tokens, int32_t n_tokens, char *text, int32_t text_len_max, bool remove_special, bool unparse_special);

// Facts of a context
LLAMA_API const struct llama_model *llama_get_model(const struct llama_context *ctx);
LLAMA_API struct llama_memory_i *llama_get_memory(const struct llama_context *ctx);
LLAMA_API uint32_t llama_n_ctx(const struct llama_context *ctx);
LLAMA_API uint32_t llama_n_ctx_seq(const struct llama_context *ctx);
LLAMA_API uint32_t llama_n_batch(const struct llama_context *ctx);
LLAMA_API uint32_t llama_n_ubatch(const struct llama_context *ctx);
LLAMA_API uint32_t llama_n_seq_max(const struct llama_context *ctx);

// Decoding
LLAMA_API int32_t llama_decode(struct llama_context *ctx, struct llama_batch batch);
LLAMA_API float *llama_get_logits_ith(struct llama_context *ctx, int32_t i);
LLAMA_API void llama_set_n_threads(struct llama_context *ctx, int32_t n_threads, int32_t n_threads_batch);

// Memory
LLAMA_API void llama_memory_clear(struct llama_memory_i *mem, bool data);
LLAMA_API bool llama_memory_seq_rm(struct llama_memory_i *mem, int32_t seq_id, int32_t p0, int32_t p1);
LLAMA_API void llama_memory_seq_cp(struct llama_memory_i *mem, int32_t seq_id_src, int32_t seq_id_dst, int32_t p0, int32_t p1);
LLAMA_API int32_t llama_memory_seq_pos_min(struct llama_memory_i *mem, int32_t seq_id);
LLAMA_API int32_t llama_memory_seq_pos_max(struct llama_memory_i *mem, int32_t seq_id);

// State
LLAMA_API size_t llama_state_get_size(struct llama_context *ctx);
LLAMA_API size_t llama_state_get_data(struct llama_context *ctx, uint8_t *dst, size_t size);
LLAMA_API size_t llama_state_set_data(struct llama_context *ctx, const uint8_t *src, size_t size);
LLAMA_API size_t llama_state_seq_get_size(struct llama_context *ctx, int32_t seq_id);
LLAMA_API size_t llama_state_seq_get_data(struct llama_context *ctx, uint8_t *dst, size_t size, int32_t seq_id);
LLAMA_API size_t llama_state_seq_set_data(struct llama_context *ctx, const uint8_t *src, size_t size, int32_t dest_seq_id);
LLAMA_API size_t llama_state_seq_get_size_ext(struct llama_context *ctx, int32_t seq_id, uint32_t flags);
LLAMA_API size_t llama_state_seq_get_data_ext(struct llama_context *ctx, uint8_t *dst, size_t size, int32_t seq_id, uint32_t flags);
LLAMA_API size_t llama_state_seq_set_data_ext(struct llama_context *ctx, const uint8_t *src, size_t size, int32_t dest_seq_id, uint32_t flags);

// llama.cpp's own file functions: only for learning the versions that a library writes.
LLAMA_API bool llama_state_save_file(struct llama_context *ctx, const char *path, const int32_t *tokens, size_t n_tokens);
LLAMA_API size_t llama_state_seq_save_file(struct llama_context *ctx, const char *path, int32_t seq_id, const int32_t *tokens, size_t n_tokens);

#endif
