/* A disk that fails on demand: LD_PRELOAD this, and the calls that change files below one folder can be logged, failed
 * or be a process' last.
 *
 * By environment, or from within the process through fi_arm() (ctypes); each process counts its own calls:
 *   FI_ROOT   the folder; nothing outside it is touched or counted
 *   FI_LOG    a file outside it: one line a call, tab-separated:
 *             number, name, path, second path, result, errno, offset, written bytes in hex
 *   FI_MODE   log | fail | short | full | kill | cut
 *             fail:  call FI_AT (1, 2, ...) fails with FI_ERRNO, once
 *             short: as fail with ENOSPC, but a write puts half of its bytes first; the next call of its file fails
 *             full:  from call FI_AT on, every call that needs space fails with ENOSPC
 *             kill:  SIGKILL in the place of call FI_AT
 *             cut:   as kill, but a write puts half of its bytes first
 *   FI_ONLY   a part of the path; calls on other paths are not counted
 *
 * close() closes for real even where it "fails", as on Linux; every other failed call does nothing. Only calls that can
 * change something count: files opened to be read are followed for the sake of fsync, and not counted at open and close.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_FDS 65536
enum { OFF, LOG, FAIL, SHORT, FULL, KILL, CUT };
enum { GO, FAILS, HALF };

static char root[PATH_MAX], only[256];
static size_t root_length;
static int mode = OFF, fault_errno = EIO, log_fd = -1, ready = 0, armed_fd = -1;
static long fault_at = 0, num_calls = 0;
static char *paths[MOST_FDS];
static char is_changing[MOST_FDS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static long raw_write(int fd, const void *data, size_t size) { return syscall(SYS_write, fd, data, size); }

static int mode_of(const char *name) {
    const char *names[] = {"off", "log", "fail", "short", "full", "kill", "cut"};
    for (int i = 0; name && i < 7; i++)
        if (!strcmp(name, names[i])) return i;
    return OFF;
}

/* Start counting anew; the number of calls so far is returned. Called by tests through ctypes. */
long fi_arm(const char *new_mode, long at, int number) {
    pthread_mutex_lock(&lock);
    long counted = num_calls;
    mode = mode_of(new_mode);
    fault_at = at;
    fault_errno = number;
    num_calls = 0;
    armed_fd = -1;
    pthread_mutex_unlock(&lock);
    return counted;
}

static void set_up(void) {
    pthread_mutex_lock(&lock);
    if (!ready) {
        const char *value = getenv("FI_ROOT");
        if (value && strlen(value) < sizeof root) {
            strcpy(root, value);
            root_length = strlen(root);
        }
        if ((value = getenv("FI_ONLY")) && strlen(value) < sizeof only) strcpy(only, value);
        if ((value = getenv("FI_AT"))) fault_at = atol(value);
        if ((value = getenv("FI_ERRNO"))) fault_errno = atoi(value);
        if ((value = getenv("FI_LOG"))) log_fd = (int)syscall(SYS_openat, AT_FDCWD, value, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        mode = mode_of(getenv("FI_MODE"));
        ready = 1;
    }
    pthread_mutex_unlock(&lock);
}

/* The absolute path, without links resolved; 1 where it is the folder or below it. */
static int absolute(int folder, const char *path, char *out) {
    if (!ready) set_up();
    if (!root_length || !path) return 0;
    if (path[0] == '/') {
        if (strlen(path) >= PATH_MAX) return 0;
        strcpy(out, path);
    } else {
        char base[PATH_MAX];
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = readlink(link, base, sizeof base - 1);
            if (length < 0) return 0;
            base[length] = 0;
        }
        if (strlen(base) + strlen(path) + 2 > PATH_MAX) return 0;
        strcpy(out, base);
        strcat(out, "/");
        strcat(out, path);
    }
    size_t length = strlen(out);
    while (length > 1 && out[length - 1] == '/') out[--length] = 0;
    return !strncmp(out, root, root_length) && (out[root_length] == '/' || !out[root_length]) &&
           (!only[0] || strstr(out, only));
}

static void follow(int fd, const char *path, int can_change) {
    if (fd < 0 || fd >= MOST_FDS) return;
    pthread_mutex_lock(&lock);
    free(paths[fd]);
    paths[fd] = path ? strdup(path) : NULL;
    is_changing[fd] = (char)can_change;
    pthread_mutex_unlock(&lock);
}

static int followed(int fd, char *out) {
    int is_there = 0;
    if (fd < 0 || fd >= MOST_FDS) return 0;
    pthread_mutex_lock(&lock);
    if (paths[fd]) {
        strcpy(out, paths[fd]);
        is_there = 1;
    }
    pthread_mutex_unlock(&lock);
    return is_there;
}

/* Count a call and say what becomes of it: GO, FAILS (errno is set) or HALF (write half, then die or fail). */
static int judge(int needs_space, int is_write, int fd, long *number) {
    int verdict = GO, error = 0, is_end = 0;
    pthread_mutex_lock(&lock);
    if (mode == OFF) {
        pthread_mutex_unlock(&lock);
        *number = 0;
        return GO;
    }
    *number = ++num_calls;
    int is_it = num_calls == fault_at;
    if (mode == FAIL && is_it) verdict = FAILS, error = fault_errno;
    if (mode == FULL && num_calls >= fault_at && needs_space) verdict = FAILS, error = ENOSPC;
    if (mode == SHORT && armed_fd >= 0 && is_write && fd == armed_fd) verdict = FAILS, error = ENOSPC, armed_fd = -1;
    if (mode == SHORT && is_it) {
        if (is_write) verdict = HALF, armed_fd = fd;
        else if (needs_space) verdict = FAILS, error = ENOSPC;
    }
    if (mode == KILL && is_it) is_end = 1;
    if (mode == CUT && is_it) {
        if (is_write) verdict = HALF;
        else is_end = 1;
    }
    pthread_mutex_unlock(&lock);
    if (is_end) syscall(SYS_kill, getpid(), SIGKILL);
    if (verdict == FAILS) errno = error;
    return verdict;
}

static void note(long number, const char *name, const char *path, const char *second, long result, long long offset,
                 const unsigned char *data, size_t size) {
    int kept = errno;
    if (log_fd < 0 || !number) return;
    size_t most = strlen(path) + strlen(second) + 2 * size + 200;
    char *line = malloc(most);
    if (!line) return;
    int length = snprintf(line, most, "%ld\t%s\t%s\t%s\t%ld\t%d\t%lld\t", number, name, path, second, result,
                          result < 0 ? kept : 0, offset);
    for (size_t i = 0; i < size; i++) length += sprintf(line + length, "%02x", data[i]);
    line[length++] = '\n';
    raw_write(log_fd, line, (size_t)length);
    free(line);
    errno = kept;
}


static int opening(const char *name, int folder, const char *path, int flags, mode_t bits) {
    char full[PATH_MAX];
    long number = 0;
    int is_ours = absolute(folder, path, full);
    int can_change = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    if (is_ours && can_change && judge(!!(flags & O_CREAT), 0, -1, &number) == FAILS) {
        note(number, name, full, "", -1, 0, NULL, 0);
        return -1;
    }
    int fd = (int)syscall(SYS_openat, folder, path, flags | O_LARGEFILE, bits);
    int kept = errno;
    if (fd >= 0) follow(fd, is_ours ? full : NULL, can_change);
    errno = kept;
    if (is_ours && can_change) {
        char text[32];
        snprintf(text, sizeof text, "%s%s", flags & O_CREAT ? "create" : "", flags & O_TRUNC ? "+truncate" : "");
        note(number, name, full, text, fd, 0, NULL, 0);
    }
    return fd;
}

#define BITS(flags, last)                          \
    mode_t bits = 0;                               \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list list;                              \
        va_start(list, last);                      \
        bits = (mode_t)va_arg(list, int);          \
        va_end(list);                              \
    }

int open(const char *path, int flags, ...) { BITS(flags, flags); return opening("open", AT_FDCWD, path, flags, bits); }
int open64(const char *path, int flags, ...) { BITS(flags, flags); return opening("open", AT_FDCWD, path, flags, bits); }
int openat(int f, const char *path, int flags, ...) { BITS(flags, flags); return opening("open", f, path, flags, bits); }
int openat64(int f, const char *path, int flags, ...) { BITS(flags, flags); return opening("open", f, path, flags, bits); }
int creat(const char *path, mode_t bits) {
    return opening("open", AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, bits);
}
int creat64(const char *path, mode_t bits) { return creat(path, bits); }

static ssize_t putting(const char *name, int fd, const void *data, size_t size, off_t offset) {
    char full[PATH_MAX];
    long number = 0;
    int is_ours = followed(fd, full), verdict = GO;
    long long at = offset >= 0 ? offset : is_ours ? (long long)lseek(fd, 0, SEEK_CUR) : 0;
    if (is_ours) verdict = judge(1, 1, fd, &number);
    if (verdict == HALF) size /= 2;
    ssize_t put = -1;
    if (verdict != FAILS)
        put = offset >= 0 ? syscall(SYS_pwrite64, fd, data, size, offset) : raw_write(fd, data, size);
    if (verdict == HALF && mode == CUT) syscall(SYS_kill, getpid(), SIGKILL);
    if (is_ours) note(number, name, full, "", put, at, data, put > 0 ? (size_t)put : 0);
    return put;
}

ssize_t write(int fd, const void *data, size_t size) { return putting("write", fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return putting("write", fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return putting("write", fd, data, size, at); }

ssize_t writev(int fd, const struct iovec *pieces, int count) {
    char full[PATH_MAX];
    if (!followed(fd, full)) return syscall(SYS_writev, fd, pieces, count);
    /* A short writev is a right one: the caller goes on behind the first piece that has bytes. */
    for (int i = 0; i < count; i++)
        if (pieces[i].iov_len) return putting("write", fd, pieces[i].iov_base, pieces[i].iov_len, -1);
    return 0;
}

/* Calls with a file descriptor and no data. */
static int on_fd(const char *name, int fd, int needs_space, long call, long argument) {
    char full[PATH_MAX];
    long number = 0;
    int is_ours = followed(fd, full);
    int verdict = is_ours ? judge(needs_space, 0, fd, &number) : GO;
    int result = verdict == FAILS ? -1 : (int)syscall(call, fd, argument);
    if (is_ours) note(number, name, full, "", result, argument, NULL, 0);
    return result;
}

int fsync(int fd) { return on_fd("fsync", fd, 0, SYS_fsync, 0); }
int fdatasync(int fd) { return on_fd("fsync", fd, 0, SYS_fdatasync, 0); }
int ftruncate(int fd, off_t size) { return on_fd("ftruncate", fd, 0, SYS_ftruncate, size); }
int ftruncate64(int fd, off_t size) { return on_fd("ftruncate", fd, 0, SYS_ftruncate, size); }

int close(int fd) {
    char full[PATH_MAX];
    long number = 0;
    int is_ours = followed(fd, full);
    int verdict = is_ours && is_changing[fd] ? judge(0, 0, fd, &number) : GO, error = errno;
    if (is_ours) follow(fd, NULL, 0);
    int result = (int)syscall(SYS_close, fd);
    if (verdict == FAILS) result = -1, errno = error;
    if (is_ours) note(number, "close", full, "", result, 0, NULL, 0);
    return result;
}

/* Calls with one or two paths. */
static int on_paths(const char *name, int needs_space, int folder, const char *path, int second_folder,
                    const char *second, long call, long a, long b, long c, long d, long e) {
    char full[PATH_MAX], full_second[PATH_MAX] = "";
    long number = 0;
    int is_ours = absolute(folder, path, full);
    if (second && absolute(second_folder, second, full_second)) is_ours = 1;
    int verdict = is_ours ? judge(needs_space, 0, -1, &number) : GO;
    int result = verdict == FAILS ? -1 : (int)syscall(call, a, b, c, d, e);
    if (is_ours) note(number, name, full, full_second, result, 0, NULL, 0);
    return result;
}

#define A AT_FDCWD
#define P(x) ((long)(x))
int rename(const char *a, const char *b) { return on_paths("rename", 1, A, a, A, b, SYS_renameat2, A, P(a), A, P(b), 0); }
int renameat(int f, const char *a, int g, const char *b) {
    return on_paths("rename", 1, f, a, g, b, SYS_renameat2, f, P(a), g, P(b), 0);
}
int renameat2(int f, const char *a, int g, const char *b, unsigned flags) {
    return on_paths("rename", 1, f, a, g, b, SYS_renameat2, f, P(a), g, P(b), flags);
}
int link(const char *a, const char *b) { return on_paths("link", 1, A, a, A, b, SYS_linkat, A, P(a), A, P(b), 0); }
int unlink(const char *a) { return on_paths("unlink", 0, A, a, A, NULL, SYS_unlinkat, A, P(a), 0, 0, 0); }
int unlinkat(int f, const char *a, int flags) {
    return on_paths(flags & AT_REMOVEDIR ? "rmdir" : "unlink", 0, f, a, A, NULL, SYS_unlinkat, f, P(a), flags, 0, 0);
}
int rmdir(const char *a) { return on_paths("rmdir", 0, A, a, A, NULL, SYS_unlinkat, A, P(a), AT_REMOVEDIR, 0, 0); }
int mkdir(const char *a, mode_t bits) { return on_paths("mkdir", 1, A, a, A, NULL, SYS_mkdirat, A, P(a), bits, 0, 0); }
int mkdirat(int f, const char *a, mode_t bits) {
    return on_paths("mkdir", 1, f, a, A, NULL, SYS_mkdirat, f, P(a), bits, 0, 0);
}
