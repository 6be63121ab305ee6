// The device, for tests on the host: memory is memory, a stream does at once what it is told, graphs are pretended.
#include "../runtime.h"

#include <cstring>

#include "emulator.h"

#ifdef __x86_64__
asm(R"(
.text
.globl hf_lopt_switch
.hidden hf_lopt_switch
.type hf_lopt_switch, @function
hf_lopt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size hf_lopt_switch, .-hf_lopt_switch
)");
#endif

namespace hf_lopt {

Emulator& the_emulator() {
    static Emulator emulator;
    return emulator;
}

uint64_t pretended_capture = 0;
int64_t table_copies = 0, allocations = 0, queries = 0;
bool copies_fail = false, marks_passed = true;

void* current_stream(int) { return nullptr; }
uint64_t capture_id(void*) { return pretended_capture; }
char* new_host_memory(size_t bytes) {
    allocations++;
    return new char[bytes];
}
char* new_device_memory(size_t bytes) { return new_host_memory(bytes); }
void copy_to_device(void* to, const char* staging, size_t bytes, void*) {
    if (copies_fail) throw std::runtime_error("a copy that fails");
    table_copies++;
    std::memcpy(to, staging, bytes);
}
void* mark(void* event, void*) { return event ? event : &table_copies; }
bool passed(void*) {
    queries++;
    return marks_passed;
}
int built_version() { return 13000; }
int driver_version() { return 13000; }

}  // namespace hf_lopt

// What tests ask for.
#define HF_LOPT_EXPORT extern "C" __attribute__((visibility("default")))
HF_LOPT_EXPORT int64_t hf_lopt_launches() { return hf_lopt::the_emulator().launches(); }
HF_LOPT_EXPORT int64_t hf_lopt_table_copies() { return hf_lopt::table_copies; }
HF_LOPT_EXPORT int64_t hf_lopt_allocations() { return hf_lopt::allocations; }
HF_LOPT_EXPORT int64_t hf_lopt_queries() { return hf_lopt::queries; }
HF_LOPT_EXPORT void hf_lopt_let_copies_fail(bool fail) { hf_lopt::copies_fail = fail; }
HF_LOPT_EXPORT void hf_lopt_let_marks_pass(bool pass) { hf_lopt::marks_passed = pass; }
HF_LOPT_EXPORT void hf_lopt_shuffle(unsigned seed) { hf_lopt::the_emulator().set_seed(seed); }
HF_LOPT_EXPORT void hf_lopt_capture(uint64_t graph) { hf_lopt::pretended_capture = graph; }
