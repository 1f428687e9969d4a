// Where llama.cpp's log lines go while one of our calls runs.
//
// llama.cpp logs from any thread, at any time, also at interpreter exit. So the callback
// is C and takes neither the GIL nor a Python object: lines wait in memory of the thread
// that made the call until that thread takes them. Lines of threads that are in no call of
// ours (llama.cpp's own workers) wait in one shared, bounded buffer.
//
// A line is stored as its level, one byte '0' to '5' (ggml_log_level), and its text.

#include <stdlib.h>
#include <string.h>

#if defined(_MSC_VER)
#define SINK_THREAD __declspec(thread)
#include <windows.h>
static SRWLOCK sink_lock = SRWLOCK_INIT;
#define SINK_LOCK() AcquireSRWLockExclusive(&sink_lock)
#define SINK_UNLOCK() ReleaseSRWLockExclusive(&sink_lock)
#else
#define SINK_THREAD _Thread_local
#include <pthread.h>
static pthread_mutex_t sink_lock = PTHREAD_MUTEX_INITIALIZER;
#define SINK_LOCK() pthread_mutex_lock(&sink_lock)
#define SINK_UNLOCK() pthread_mutex_unlock(&sink_lock)
#endif

#define SINK_LIMIT (1 << 20)

struct sink_text {
    char *data;
    size_t size;
    size_t room;
};

static SINK_THREAD int sink_depth;
static SINK_THREAD struct sink_text sink_own;
static struct sink_text sink_shared;

// A callback that was there before ours and stays served: llama_log_get's two answers.
struct log_chain {
    ggml_log_callback next;
    void *next_data;
};

static void sink_append(struct sink_text *text, int level, const char *line)
{
    size_t n = strlen(line);
    // Too much is dropped, never truncated in the middle: what is stored stays parseable.
    if (text->size + n + 2 > SINK_LIMIT)
        return;
    if (text->size + n + 2 > text->room) {
        size_t room = 2 * (text->size + n + 2);
        char *data = realloc(text->data, room);
        if (data == NULL)
            return;
        text->data = data;
        text->room = room;
    }
    text->data[text->size] = (char)('0' + (level >= 0 && level <= 5 ? level : 0));
    memcpy(text->data + text->size + 1, line, n + 1);
    text->size += n + 2;
}

static void sink_callback(int level, const char *line, void *user_data)
{
    struct log_chain *chain = user_data;
    if (sink_depth > 0) {
        sink_append(&sink_own, level, line);
    } else {
        SINK_LOCK();
        sink_append(&sink_shared, level, line);
        SINK_UNLOCK();
    }
    if (chain != NULL && chain->next != NULL)
        chain->next(level, line, chain->next_data);
}

// How many blocks of this thread are open.
SINK_API int log_sink_depth(void)
{
    return sink_depth;
}

// Opens or closes blocks of this thread up to a depth: above 0, its calls store their lines.
// A depth, not a step, so that one block that was left without a word is mended by the next.
SINK_API void log_sink_set_depth(int depth)
{
    sink_depth = depth;
    if (depth == 0) {
        free(sink_own.data);
        memset(&sink_own, 0, sizeof sink_own);
    }
}

// How many bytes this thread's calls, or with shared the threads of nobody, have stored.
SINK_API size_t log_sink_size(bool shared)
{
    if (!shared)
        return sink_own.size;
    SINK_LOCK();
    size_t n = sink_shared.size;
    SINK_UNLOCK();
    return n;
}

// Moves the stored lines to out that fit whole into size bytes; what another thread has added
// since the size was asked for stays for the next time. Returns how many bytes were moved.
SINK_API size_t log_sink_take(bool shared, char *out, size_t size)
{
    struct sink_text *text = shared ? &sink_shared : &sink_own;
    if (shared)
        SINK_LOCK();
    size_t n = text->size < size ? text->size : size;
    while (n > 0 && text->data[n - 1] != '\0')
        n--;
    if (n > 0) {
        memcpy(out, text->data, n);
        memmove(text->data, text->data + n, text->size - n);
        text->size -= n;
    }
    if (shared)
        SINK_UNLOCK();
    return n;
}

// A new chain with nothing in it. It is never freed: llama.cpp, or a thread of it, may still
// hold the pointer when Python has forgotten the library.
SINK_API struct log_chain *log_sink_chain(void)
{
    return calloc(1, sizeof(struct log_chain));
}

// Makes ours the library's callback. With a chain the one before goes on being called.
SINK_API void log_sink_install(const struct llama_api *api, struct log_chain *chain)
{
    api->llama_log_set(sink_callback, chain);
}

// Whether the library's callback is still ours.
SINK_API bool log_sink_installed(const struct llama_api *api)
{
    ggml_log_callback callback = NULL;
    void *user_data = NULL;
    api->llama_log_get(&callback, &user_data);
    return callback == sink_callback;
}
