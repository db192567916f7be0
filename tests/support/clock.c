/* A wall clock that is wrong by the seconds in a file, whoever asks it (clock_gettime, gettimeofday, time) or waits
   until a moment of it (pthread_cond_timedwait, sem_timedwait). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *wrong_by;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("TEST_CLOCK_FILE");
    int descriptor = file ? open(file, O_RDONLY) : -1;
    void *found = descriptor < 0 ? MAP_FAILED : mmap(NULL, sizeof *wrong_by, PROT_READ, MAP_SHARED, descriptor, 0);
    if (descriptor >= 0)
        close(descriptor);
    if (found == MAP_FAILED)
        _exit(99);
    wrong_by = found;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (!code && wrong_by && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += *wrong_by;
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    int code = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return code;
}

time_t time(time_t *kept) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (kept)
        *kept = exact.tv_sec;
    return exact.tv_sec;
}

static struct timespec kernels(const struct timespec *moment) {
    struct timespec right = *moment;
    if (wrong_by && right.tv_sec > 1000000000) /* less is of the monotonic clock, since boot */
        right.tv_sec -= *wrong_by;
    return right;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!wait) { /* by its version: plain dlsym finds one of 2002 */
        void *found = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
        found = found ? found : dlsym(RTLD_NEXT, "pthread_cond_timedwait");
        wait = (int (*)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *))found;
    }
    struct timespec right = kernels(until);
    return wait(condition, mutex, &right);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static int (*wait)(sem_t *, const struct timespec *);
    if (!wait)
        wait = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec right = kernels(until);
    return wait(semaphore, &right);
}
