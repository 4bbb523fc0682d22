/* A file system that stumbles: loaded before the C library (LD_PRELOAD), it makes opening, reading
   and writing what lies in some folders fail now and then, as a network file system does.

   STUMBLE_BELOW     folders, colon between them
   STUMBLE_PERMILLE  of 1,000 calls, so many fail
   STUMBLE_LOG       a line for each that did
   STUMBLE_OUTAGE    while this file is there, nothing in the folders can be opened */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define FILES 65536
static char below[FILES]; /* whether a descriptor is of a file in one of the folders */

static int in_folders(const char *path) {
    const char *folders = getenv("STUMBLE_BELOW");
    while (path && folders && *folders) {
        size_t length = strcspn(folders, ":");
        if (length && !strncmp(path, folders, length)) return 1;
        folders += length + (folders[length] == ':');
    }
    return 0;
}

static void tell(const char *deed) {
    const char *name = getenv("STUMBLE_LOG");
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    int file = name ? real_open(name, O_WRONLY | O_APPEND | O_CREAT, 0644) : -1;
    if (file < 0) return;
    char line[64];
    int length = snprintf(line, sizeof line, "%s\n", deed);
    real_write(file, line, length);
    close(file);
}

static int stumbles(const char *deed) {
    static __thread unsigned seed;
    static const int kinds[] = {EIO, ESTALE, ETIMEDOUT};
    const char *rate = getenv("STUMBLE_PERMILLE"), *outage = getenv("STUMBLE_OUTAGE");
    if (!seed) seed = (unsigned)getpid() ^ (unsigned)(size_t)&seed ^ (unsigned)time(NULL);
    int out = !strcmp(deed, "open") && outage && !access(outage, F_OK);
    int drawn = rand_r(&seed) / 7 % 1000 < (rate ? atoi(rate) : 0);
    if (!out && !drawn) return 0;
    tell(out ? "outage" : deed);
    errno = kinds[rand_r(&seed) / 7 % 3];
    return 1;
}

#define OPENS(name, parameters, path, ...)                                                     \
    int name parameters {                                                                      \
        int (*real) parameters = dlsym(RTLD_NEXT, #name);                                      \
        mode_t mode = 0;                                                                       \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                   \
            va_list more;                                                                      \
            va_start(more, flags);                                                             \
            mode = va_arg(more, mode_t);                                                       \
            va_end(more);                                                                      \
        }                                                                                      \
        int mine = in_folders(path) && !(flags & O_DIRECTORY);                                 \
        if (mine && stumbles("open")) return -1;                                               \
        int file = real(__VA_ARGS__, flags, mode);                                             \
        if (file >= 0 && file < FILES) below[file] = mine;                                     \
        return file;                                                                           \
    }

OPENS(open, (const char *path, int flags, ...), path, path)
OPENS(open64, (const char *path, int flags, ...), path, path)
OPENS(openat, (int folder, const char *path, int flags, ...), path, folder, path)
OPENS(openat64, (int folder, const char *path, int flags, ...), path, folder, path)

#define MOVES(name, deed, parameters, ...)                                                     \
    ssize_t name parameters {                                                                  \
        ssize_t (*real) parameters = dlsym(RTLD_NEXT, #name);                                  \
        if (file >= 0 && file < FILES && below[file] && stumbles(deed)) return -1;             \
        return real(__VA_ARGS__);                                                              \
    }

MOVES(read, "read", (int file, void *data, size_t size), file, data, size)
MOVES(pread, "read", (int file, void *data, size_t size, off_t at), file, data, size, at)
MOVES(pread64, "read", (int file, void *data, size_t size, off64_t at), file, data, size, at)
MOVES(write, "write", (int file, const void *data, size_t size), file, data, size)

int close(int file) {
    int (*real)(int) = dlsym(RTLD_NEXT, "close");
    if (file >= 0 && file < FILES) below[file] = 0;
    return real(file);
}
