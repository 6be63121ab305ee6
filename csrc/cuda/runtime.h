// What the operators need of the device. runtime.cpp has it for CUDA, host/runtime.cpp for tests on the host.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace hf_lopt {

// Throws if the launch before could not be made.
void check_launch();
// Lets a kernel be launched with so much dynamic shared memory on the current device.
void allow_shared(const void* kernel, size_t bytes);
// The stream that torch launches on.
void* current_stream(int device);
// Identifies the graph that the stream is captured into; 0 where it is not.
uint64_t capture_id(void* stream);
// Memory that stays, of the host, from which the device copies without waiting, and of the device; also while a graph
// is captured, whose own memory it never is. Both may wait for the device: see Arena in device_memory.cpp.
char* new_host_memory(size_t bytes);
char* new_device_memory(size_t bytes);
void copy_to_device(void* to, const char* staging, size_t bytes, void* stream);
// A mark behind what the stream has been given, renewed; null makes a new one.
void* mark(void* event, void* stream);
// Whether the stream has passed the mark.
bool passed(void* event);
// Which CUDA the kernels are built with and which one the driver serves, such as 13000; 0 for none.
int built_version();
int driver_version();

}  // namespace hf_lopt
