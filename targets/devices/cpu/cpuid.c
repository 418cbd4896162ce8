// Hides instruction sets from the process that preloads it: CPUID answers without their bits.
//
// In: LD_PRELOAD, and CONVNEXT_EDGE_HIDDEN: eight hexadecimal words, the bits to clear in EAX, EBX,
// ECX and EDX of CPUID leaf 7, subleaf 0, then of subleaf 1. Out: whatever asks CPUID from here on, in
// this process and in those that it starts, finds a CPU without them. The C library has asked before:
// its own copying and mathematics stay as they were.
//
// The kernel makes CPUID fault (Linux: arch_prctl(ARCH_SET_CPUID); Intel: "CPUID faulting", AMD:
// CpuidUserDis); the handler asks the CPU itself, clears the bits and goes on behind the
// instruction. Threads inherit the fault, programs that are started do not: the preloaded
// constructor asks again. Whoever wants SIGSEGV later gets it behind this handler, never before it.
//
// Source: arch_prctl(2); Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2,
// CPUID, and volume 3, "CPUID faulting".

#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, FEATURES = 7, SUBLEAVES = 2, REGISTERS = 4, CANNOT = 97 };

typedef int setting(int, const struct sigaction *, struct sigaction *);

static uint32_t hidden[SUBLEAVES][REGISTERS];
static struct sigaction others;  // what handles SIGSEGV where CPUID is not the cause
static setting *set;             // the C library's sigaction
static volatile sig_atomic_t handed_over;

static int cpuid_answers(long yes) { return (int)syscall(SYS_arch_prctl, ARCH_SET_CPUID, yes); }

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)number;
    greg_t *at = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)at[REG_RIP];
    // A general protection fault names no address; only then may the code be read.
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
        handed_over = 1;
        set(SIGSEGV, &others, NULL);  // not ours: it happens again, and is theirs
        return;
    }
    uint32_t leaf = (uint32_t)at[REG_RAX], subleaf = (uint32_t)at[REG_RCX], found[REGISTERS];
    cpuid_answers(1);
    __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
    cpuid_answers(0);
    if (leaf == FEATURES && subleaf < SUBLEAVES)
        for (int i = 0; i < REGISTERS; i++) found[i] &= ~hidden[subleaf][i];
    at[REG_RAX] = found[0];
    at[REG_RBX] = found[1];
    at[REG_RCX] = found[2];
    at[REG_RDX] = found[3];
    at[REG_RIP] += 2;
}

// Stands before the C library's own: programs are given no way around the handler above.
__attribute__((visibility("default"))) int sigaction(int number, const struct sigaction *new,
                                                     struct sigaction *old) {
    if (set == NULL) set = (setting *)dlsym(RTLD_NEXT, "sigaction");
    if (number != SIGSEGV || handed_over) return set(number, new, old);
    struct sigaction was = others;
    if (new != NULL) others = *new;
    if (old != NULL) *old = was;
    return 0;
}

static void refuse(const char *why) {
    if (write(STDERR_FILENO, why, strlen(why)) < 0) _exit(CANNOT);
    _exit(CANNOT);
}

__attribute__((constructor)) static void hide(void) {
    const char *words = getenv("CONVNEXT_EDGE_HIDDEN");
    if (words == NULL) refuse("cpuid: CONVNEXT_EDGE_HIDDEN is not set\n");
    char *end = (char *)words;
    for (int i = 0; i < SUBLEAVES * REGISTERS; i++) {
        const char *start = end;
        hidden[i / REGISTERS][i % REGISTERS] = (uint32_t)strtoul(start, &end, 16);
        if (end == start) refuse("cpuid: CONVNEXT_EDGE_HIDDEN is not eight hexadecimal words\n");
    }
    struct sigaction handler = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (set == NULL) set = (setting *)dlsym(RTLD_NEXT, "sigaction");
    if (set == NULL || set(SIGSEGV, &handler, &others) != 0 || cpuid_answers(0) != 0)
        refuse("cpuid: this CPU or kernel cannot make CPUID fault\n");
}
