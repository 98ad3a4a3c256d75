/* Count the calls that change files below a folder; end the process or fail at one of them; log them all.
 *
 * Loaded through LD_PRELOAD, it passes every call on until `nfzoo_drill_arm` names a folder. The log is a row of
 * records: a `struct record`, then `first` and `second` bytes, which are paths or what was written. Programs can write
 * past the C library, into mapped memory or by system calls of their own. So a flush is logged with all that the file
 * then holds, and an opened file with its inode, which tells what it was called before.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum operation { OPEN, CREATE, /* which is counted as one, and logged as opened */
                 WRITE, TRUNCATE, SYNC, RENAME, MKDIR, UNLINK, RMDIR, CHMOD, LINK };
enum fault { NONE, KILL, TEAR, FAIL_ONCE, FAIL_ON, SHORTEN };

struct record {
    int32_t operation, descriptor;
    int64_t number; /* place of the call from 1 on; calls that change nothing have that of the call before */
    int64_t offset; /* where a write began; the length of a truncated file; the inode of an opened one */
    int32_t first, second;
    int64_t process;
};

enum { DESCRIPTORS = 4096 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static char below[DESCRIPTORS]; /* whether a descriptor is of a file or folder below the root */
static int fault, failure, log_descriptor = -1;
static int64_t count, at, clock_offset, process;

#define REAL(result, name, ...)                                                                                        \
    static result (*real)(__VA_ARGS__);                                                                                \
    if (!real)                                                                                                         \
        real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* Watch `folder` from now on. The calls below it are counted from 1; at number `call` the fault happens. Processes that
 * log to one file open it each by itself, to append; `name` tells their records apart. */
void nfzoo_drill_arm(const char *folder, int what, int64_t call, int error, int log, int64_t seconds, int64_t name)
{
    pthread_mutex_lock(&lock);
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    fault = what, at = call, failure = error, log_descriptor = log, clock_offset = seconds, count = 0;
    process = name;
    memset(below, 0, sizeof below);
    pthread_mutex_unlock(&lock);
}

/* Begin and end a call. The lock of the log orders the calls of all processes as their records. */
static void hold(void)
{
    pthread_mutex_lock(&lock);
    if (log_descriptor >= 0)
        flock(log_descriptor, LOCK_EX);
}

static void let_go(void)
{
    if (log_descriptor >= 0)
        flock(log_descriptor, LOCK_UN);
    pthread_mutex_unlock(&lock);
}

static int is_below(const char *path)
{
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* Write the absolute form of a path to `full`, and return whether it is below the root. */
static int resolve(int folder, const char *path, char *full)
{
    if (!root_length || !path)
        return 0;
    if (path[0] == '/')
        return snprintf(full, PATH_MAX, "%s", path) < PATH_MAX && is_below(full);
    char parent[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(parent, sizeof parent))
            return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, parent, sizeof parent - 1);
        if (length < 0)
            return 0;
        parent[length] = 0;
    }
    return snprintf(full, PATH_MAX, "%s/%s", parent, path) < PATH_MAX && is_below(full);
}

static int is_watched(int descriptor)
{
    return root_length && descriptor >= 0 && descriptor < DESCRIPTORS && below[descriptor];
}

static void append(const void *data, size_t size)
{
    while (size > 0) {
        ssize_t done = syscall(SYS_write, log_descriptor, data, size);
        if (done <= 0)
            return; /* a log that ends early is found to be incomplete */
        data = (const char *)data + done, size -= (size_t)done;
    }
}

static void note(int operation, int descriptor, int64_t number, int64_t offset, const void *first, size_t size,
                 const char *second)
{
    if (log_descriptor < 0)
        return;
    struct record record = {operation, descriptor, number, offset, (int32_t)size, second ? (int32_t)strlen(second) : 0,
                            process};
    append(&record, sizeof record);
    append(first, size);
    append(second, (size_t)record.second);
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Count a call; return 0 if it may go on, or the error that it ends with. */
static int enter(int operation)
{
    int64_t number = ++count;
    int grows = operation == CREATE || operation == WRITE || operation == MKDIR || operation == TRUNCATE;
    if (number == at && (fault == KILL || (fault == TEAR && operation != WRITE)))
        die();
    if (number == at && fault == FAIL_ONCE)
        return failure;
    if (number >= at && fault == FAIL_ON && (failure != ENOSPC || grows))
        return failure;
    return 0;
}

/* How much of a write of so many bytes is to be done. */
static size_t allowed(size_t size)
{
    int part = (fault == TEAR && count == at) || (fault == SHORTEN && count >= at);
    return part && size > 1 ? size / 2 : size;
}

#define FAIL_IF_ASKED(operation)                                                                                       \
    int error = enter(operation);                                                                                      \
    if (error) {                                                                                                       \
        let_go();                                                                                                      \
        errno = error;                                                                                                 \
        return -1;                                                                                                     \
    }

/* ---------------------------------------------------------------- opening and closing */

static int opened(int folder, const char *path, int flags, mode_t mode)
{
    char full[PATH_MAX];
    if (!resolve(folder, path, full))
        return (int)syscall(SYS_openat, folder, path, flags, mode);
    hold();
    struct stat before;
    int changes = ((flags & O_CREAT) && lstat(full, &before) != 0) || (flags & O_TRUNC);
    if (changes) {
        FAIL_IF_ASKED(CREATE);
    } else if (fault == FAIL_ON && failure == EROFS && count >= at && (flags & O_ACCMODE) != O_RDONLY) {
        let_go();
        errno = EROFS;
        return -1;
    }
    int descriptor = (int)syscall(SYS_openat, folder, path, flags, mode);
    int kept = errno;
    if (descriptor >= 0 && descriptor < DESCRIPTORS) {
        struct stat now;
        below[descriptor] = 1;
        note(OPEN, descriptor, count, fstat(descriptor, &now) ? 0 : (int64_t)now.st_ino, full, strlen(full), NULL);
        if (flags & O_TRUNC)
            note(TRUNCATE, descriptor, count, 0, NULL, 0, NULL);
    }
    let_go();
    errno = kept;
    return descriptor;
}

#define MODE(flags)                                                                                                    \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                                                             \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = (mode_t)va_arg(rest, int);                                                                              \
        va_end(rest);                                                                                                  \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags)
    return opened(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    MODE(flags)
    return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

int openat(int folder, const char *path, int flags, ...)
{
    MODE(flags)
    return opened(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...)
{
    MODE(flags)
    return opened(folder, path, flags | O_LARGEFILE, mode);
}

int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int creat64(const char *path, mode_t mode) { return creat(path, mode); }

int close(int descriptor)
{
    if (descriptor >= 0 && descriptor < DESCRIPTORS)
        below[descriptor] = 0;
    return (int)syscall(SYS_close, descriptor);
}

/* ---------------------------------------------------------------- writing */

static ssize_t written(int descriptor, const void *data, size_t size, int64_t offset)
{
    hold();
    FAIL_IF_ASKED(WRITE);
    size = allowed(size);
    ssize_t done = offset < 0 ? syscall(SYS_write, descriptor, data, size)
                              : syscall(SYS_pwrite64, descriptor, data, size, offset);
    int kept = errno;
    if (done >= 0) {
        int64_t start = offset < 0 ? lseek(descriptor, 0, SEEK_CUR) - done : offset;
        note(WRITE, descriptor, count, start, data, (size_t)done, NULL);
    }
    if (fault == TEAR && count == at)
        die();
    let_go();
    errno = kept;
    return done;
}

ssize_t write(int descriptor, const void *data, size_t size)
{
    return is_watched(descriptor) ? written(descriptor, data, size, -1) : syscall(SYS_write, descriptor, data, size);
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset)
{
    return is_watched(descriptor) ? written(descriptor, data, size, offset)
                                  : syscall(SYS_pwrite64, descriptor, data, size, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset)
{
    return pwrite(descriptor, data, size, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int number)
{
    if (!is_watched(descriptor))
        return syscall(SYS_writev, descriptor, parts, number);
    for (int i = 0; i < number; i++) /* a shorter write is a legal answer */
        if (parts[i].iov_len > 0)
            return written(descriptor, parts[i].iov_base, parts[i].iov_len, -1);
    return 0;
}

int ftruncate(int descriptor, off_t length)
{
    if (!is_watched(descriptor))
        return (int)syscall(SYS_ftruncate, descriptor, length);
    hold();
    FAIL_IF_ASKED(TRUNCATE);
    int status = (int)syscall(SYS_ftruncate, descriptor, length), kept = errno;
    if (!status)
        note(TRUNCATE, descriptor, count, length, NULL, 0, NULL);
    let_go();
    errno = kept;
    return status;
}

int ftruncate64(int descriptor, off64_t length) { return ftruncate(descriptor, length); }

int fsync(int descriptor)
{
    if (!is_watched(descriptor))
        return (int)syscall(SYS_fsync, descriptor);
    hold();
    FAIL_IF_ASKED(SYNC);
    int status = (int)syscall(SYS_fsync, descriptor), kept = errno;
    struct stat now;
    if (!status && log_descriptor >= 0 && !fstat(descriptor, &now)) {
        size_t size = S_ISREG(now.st_mode) ? (size_t)now.st_size : 0;
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        int readable = (int)syscall(SYS_openat, AT_FDCWD, link, O_RDONLY, 0); /* this one may be for writing alone */
        void *content = size ? mmap(NULL, size, PROT_READ, MAP_SHARED, readable, 0) : NULL;
        syscall(SYS_close, readable);
        note(SYNC, descriptor, count, S_ISREG(now.st_mode), content, content == MAP_FAILED ? 0 : size, NULL);
        if (size && content != MAP_FAILED)
            munmap(content, size);
    }
    let_go();
    errno = kept;
    return status;
}

int fdatasync(int descriptor) { return fsync(descriptor); }

/* ---------------------------------------------------------------- names */

/* A call on paths: where each may lie, its operation, and the call itself. */
#define ON_PATHS(operation, folder, path, other_folder, other, call)                                                   \
    char full[PATH_MAX], target[PATH_MAX] = "";                                                                          \
    const char *second = other;                                                                                        \
    int first_below = resolve(folder, path, full), second_below = second && resolve(other_folder, second, target);     \
    if (!first_below && !second_below)                                                                                 \
        return (int)(call);                                                                                            \
    hold();                                                                                                            \
    FAIL_IF_ASKED(operation);                                                                                          \
    int status = (int)(call), kept = errno;                                                                            \
    if (!status)                                                                                                       \
        note(operation, -1, count, 0, full, strlen(full), second ? target : NULL);                                     \
    let_go();                                                                                                          \
    errno = kept;                                                                                                      \
    return status

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    ON_PATHS(RENAME, from, old, to, new, syscall(SYS_renameat2, from, old, to, new, flags));
}

int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int linkat(int from, const char *old, int to, const char *new, int flags)
{
    ON_PATHS(LINK, from, old, to, new, syscall(SYS_linkat, from, old, to, new, flags));
}

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int mkdirat(int folder, const char *path, mode_t mode)
{
    ON_PATHS(MKDIR, folder, path, 0, NULL, syscall(SYS_mkdirat, folder, path, mode));
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int folder, const char *path, int flags)
{
    ON_PATHS((flags & AT_REMOVEDIR) ? RMDIR : UNLINK, folder, path, 0, NULL,
             syscall(SYS_unlinkat, folder, path, flags));
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int chmod(const char *path, mode_t mode)
{
    ON_PATHS(CHMOD, AT_FDCWD, path, 0, NULL, syscall(SYS_fchmodat, AT_FDCWD, path, mode));
}

/* ---------------------------------------------------------------- the clock */

int clock_gettime(clockid_t clock, struct timespec *now)
{
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int status = real(clock, now);
    if (!status && clock == CLOCK_REALTIME)
        now->tv_sec += clock_offset;
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    REAL(int, gettimeofday, struct timeval *, void *);
    int status = real(now, zone);
    if (!status)
        now->tv_sec += clock_offset;
    return status;
}

time_t time(time_t *result)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result)
        *result = now.tv_sec;
    return now.tv_sec;
}

/* Waits end at a time that the kernel compares with its own clock. A time of the clock that was set back lies in the past
 * for the kernel: each wait would end at once, and programs that wait again would keep their locks busy. */
static struct timespec for_kernel(const struct timespec *until)
{
    struct timespec then = *until, day = {0}, up = {0};
    clock_gettime(CLOCK_REALTIME, &day);
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &up);
    if (llabs(until->tv_sec - day.tv_sec) < llabs(until->tv_sec - up.tv_sec)) /* a condition may have either clock */
        then.tv_sec -= clock_offset;
    return then;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until)
{
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!real) /* an older glibc would give its first version, of another layout */
        real = (int (*)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *))dlvsym(
            RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real) /* where there is but one */
        real = (int (*)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *))dlsym(
            RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec then = for_kernel(until);
    return real(condition, mutex, &then);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until)
{
    REAL(int, pthread_mutex_timedlock, pthread_mutex_t *, const struct timespec *);
    struct timespec then = for_kernel(until);
    return real(mutex, &then);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until)
{
    REAL(int, sem_timedwait, sem_t *, const struct timespec *);
    struct timespec then = for_kernel(until);
    return real(semaphore, &then);
}
