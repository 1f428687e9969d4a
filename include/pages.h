// Advice to the system about pages. All of it is advice: where a call is not known, nothing happens.

#include <errno.h>
#if !defined(_WIN32)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#endif

// Lets memory that was not touched yet have huge pages.
PAGES_API void pages_huge(const uint8_t *start, size_t size)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t first = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)start + size) / page * page;
    if (first < end)
        madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)start;
    (void)size;
#endif
}

// Has pages of a mapped file in memory, to be read or to be written; start begins a page. Returns
// an errno: EINVAL where the system cannot do that, another where the file cannot be read.
PAGES_API int pages_populate(const uint8_t *start, size_t size, bool write)
{
#if defined(__linux__)
    const int advice = write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
    return madvise((void *)start, size, advice) == 0 ? 0 : errno;
#else
    (void)start;
    (void)size;
    (void)write;
    return EINVAL;
#endif
}

// Lets the pages of a private read-only mapping be written to. Returns whether that is so now.
PAGES_API bool pages_writable(const uint8_t *start, size_t size)
{
#if !defined(_WIN32)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t first = (uintptr_t)start / page * page;
    return mprotect((void *)first, (uintptr_t)start + size - first, PROT_READ | PROT_WRITE) == 0;
#else
    (void)start;
    (void)size;
    return false;
#endif
}
