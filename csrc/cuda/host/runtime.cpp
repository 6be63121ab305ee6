// The device, for tests on the host: memory is memory, a stream does at once what it is told, graphs are pretended.
#include "../runtime.h"

#include <cstring>

#include "emulator.h"

namespace hf_lopt {

Emulator& the_emulator() {
    static Emulator emulator;
    return emulator;
}

uint64_t pretended_capture = 0;
int64_t table_copies = 0;

void* current_stream(int) { return nullptr; }
uint64_t capture_id(void*) { return pretended_capture; }
char* new_staging(size_t bytes) { return new char[bytes]; }
void copy_to_device(void* to, const char* staging, size_t bytes, void*) {
    table_copies++;
    std::memcpy(to, staging, bytes);
}
void* mark(void* event, void*) { return event ? event : &table_copies; }
bool passed(void*) { return true; }

}  // namespace hf_lopt
