/* Preloaded, keeps the tiles of AMX from a program: the kernel's permission to use them is refused, and the program takes its next best
 * path. For rows of "the same processor without AMX".
 *
 *   gcc -shared -fPIC -O2 benchmarks/peers/without_amx.c -o without_amx.so -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>

enum { FIRST_XCOMP = 0x1022, LAST_XCOMP = 0x1025 };

long syscall(long number, ...) {
    static long (*next)(long, ...);
    if (!next) *(void**)&next = dlsym(RTLD_NEXT, "syscall");
    va_list list;
    va_start(list, number);
    long a[6];
    for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_arch_prctl && a[0] >= FIRST_XCOMP && a[0] <= LAST_XCOMP) {
        errno = EPERM;
        return -1;
    }
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
