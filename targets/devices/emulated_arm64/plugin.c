// SPDX-License-Identifier: GPL-2.0-or-later
//
// A TCG plugin that counts the guest instructions between two marks. It is loaded into QEMU, which
// is GPL-2.0, and so it is the one file of this project under that licence (COPYING, beside it).
//
// In: `-plugin counter.so,out=FILE`; the guest calls close(-77001) where counting begins and
// close(-77002) where it ends, any number of times. Out: FILE, a line each:
//
//     region                     a pair of marks, in order
//     ran BLOCK EXECUTIONS       how often a translated block ran within it
//     block BLOCK ADDRESS WORDS  its guest address and instruction words in hex, once, at the end
//
// A block counts whole, from when it is entered; one address can be translated more than once.
// Counters are not atomic: one guest thread at a time may compute.

#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// What is needed of QEMU's plugin API, version 1 (QEMU 7.2); Debian ships no header for it.
#define EXPORTED __attribute__((visibility("default")))
typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct {
    const char *target_name;
    struct {
        int min;
        int cur;
    } version;
    bool system_emulation;
    union {
        struct {
            int smp_vcpus;
            int max_vcpus;
        } system;
    };
} plugin_info;
enum plugin_op { PLUGIN_INLINE_ADD_U64 };
typedef void (*translation_callback)(plugin_id, struct qemu_plugin_tb *);
typedef void (*syscall_callback)(plugin_id, unsigned vcpu, int64_t number, uint64_t a1, uint64_t a2,
                                 uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7,
                                 uint64_t a8);
typedef void (*exit_callback)(plugin_id, void *);

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, translation_callback);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum plugin_op, void *,
                                              uint64_t);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, syscall_callback);
void qemu_plugin_register_atexit_cb(plugin_id, exit_callback, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

enum { API_VERSION = 1, SYSCALL_CLOSE = 57, WORD = 4 };
enum { MARK_BEGIN = -77001, MARK_END = -77002 };

EXPORTED int qemu_plugin_version = API_VERSION;

struct block {
    struct block *next;
    uint64_t index;
    uint64_t address;
    uint64_t executions;
    uint64_t executions_before;
    bool counted;
    size_t size;
    uint32_t words[];
};

static struct block *blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *out;

static void translated(plugin_id id, struct qemu_plugin_tb *tb)
{
    (void)id;
    static uint64_t known;
    size_t size = qemu_plugin_tb_n_insns(tb);
    struct block *block = calloc(1, sizeof *block + size * WORD);
    if (!block) {
        abort();
    }
    block->address = qemu_plugin_tb_vaddr(tb);
    block->size = size;
    for (size_t i = 0; i < size; i++) {
        memcpy(&block->words[i], qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), WORD);
    }
    pthread_mutex_lock(&lock);
    block->index = known++;
    block->next = blocks;
    blocks = block;
    pthread_mutex_unlock(&lock);
    qemu_plugin_register_vcpu_tb_exec_inline(tb, PLUGIN_INLINE_ADD_U64, &block->executions, 1);
}

static void begin_region(void)
{
    for (struct block *b = blocks; b; b = b->next) {
        b->executions_before = b->executions;
    }
}

static void end_region(void)
{
    fprintf(out, "region\n");
    for (struct block *b = blocks; b; b = b->next) {
        if (b->executions != b->executions_before) {
            b->counted = true;
            fprintf(out, "ran %" PRIu64 " %" PRIu64 "\n", b->index,
                    b->executions - b->executions_before);
        }
    }
}

static void entered_syscall(plugin_id id, unsigned vcpu, int64_t number, uint64_t a1, uint64_t a2,
                            uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7,
                            uint64_t a8)
{
    (void)id, (void)vcpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != SYSCALL_CLOSE) {
        return;
    }
    pthread_mutex_lock(&lock);
    if ((int32_t)a1 == MARK_BEGIN) {
        begin_region();
    } else if ((int32_t)a1 == MARK_END) {
        end_region();
    }
    pthread_mutex_unlock(&lock);
}

static void finished(plugin_id id, void *data)
{
    (void)id, (void)data;
    for (struct block *b = blocks; b; b = b->next) {
        if (b->counted) {
            fprintf(out, "block %" PRIu64 " %" PRIx64 " ", b->index, b->address);
            for (size_t i = 0; i < b->size; i++) {
                fprintf(out, "%08" PRIx32, b->words[i]);
            }
            fputc('\n', out);
        }
    }
    fclose(out);
}

EXPORTED int qemu_plugin_install(plugin_id id, const plugin_info *info, int argc, char **argv)
{
    if (info->version.min > API_VERSION || strcmp(info->target_name, "aarch64") != 0) {
        fprintf(stderr, "this plugin counts aarch64 and speaks plugin API %d\n", API_VERSION);
        return 1;
    }
    if (argc != 1 || strncmp(argv[0], "out=", 4) != 0 || !(out = fopen(argv[0] + 4, "w"))) {
        fprintf(stderr, "give the plugin one argument, out=FILE, a file that can be written\n");
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, entered_syscall);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
