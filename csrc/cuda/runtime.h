// What the operators need of the device. runtime.cpp has it for CUDA, host/runtime.cpp for tests on the host.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace hf_lopt {

// Throws if the launch before could not be made.
void check_launch();
// The stream that torch launches on.
void* current_stream(int device);
// Identifies the graph that the stream is captured into; 0 where it is not.
uint64_t capture_id(void* stream);
// Host memory that the device copies from without waiting; also while a graph is captured.
char* new_staging(size_t bytes);
void copy_to_device(void* to, const char* staging, size_t bytes, void* stream);
// A mark behind what the stream has been given, renewed; null makes a new one.
void* mark(void* event, void* stream);
// Whether the stream has passed the mark.
bool passed(void* event);

}  // namespace hf_lopt
