// The device, for CUDA.
#include "runtime.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

namespace hf_lopt {

namespace {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) cudaGetLastError();  // told here, and to nobody else
    STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// Allows calls that are not part of a graph while one is captured, here or by another thread.
class Relaxed {
  public:
    Relaxed() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    Relaxed(const Relaxed&) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

using CurrentStream = int32_t (*)(int32_t, void**);

// Looked up in the library that torch has loaded rather than linked: the extension is also built, and its symbols
// checked, where torch has no CUDA.
CurrentStream find_current_stream() {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    STD_TORCH_CHECK(found, "this torch has no CUDA: libtorch_cuda.so is not loaded");
    return reinterpret_cast<CurrentStream>(found);
}

}  // namespace

void check_launch() { check(cudaGetLastError(), "launch of a kernel of hf_lopt"); }

void allow_shared(const void* kernel, size_t bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
          "shared memory of a kernel of hf_lopt");
}

void* current_stream(int device) {
    static const CurrentStream find = find_current_stream();
    void* stream = nullptr;
    STD_TORCH_CHECK(find(device, &stream) == 0, "torch did not give the current stream of device ", device);
    return stream;
}

uint64_t capture_id(void* stream) {
    cudaStreamCaptureStatus status;
    unsigned long long id = 0;
    check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id), "cudaStreamGetCaptureInfo");
    return status == cudaStreamCaptureStatusActive ? id : 0;
}

char* new_host_memory(size_t bytes) {
    const Relaxed relaxed;
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault), "cudaHostAlloc");
    return static_cast<char*>(memory);
}

char* new_device_memory(size_t bytes) {
    const Relaxed relaxed;
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    return static_cast<char*>(memory);
}

void copy_to_device(void* to, const char* staging, size_t bytes, void* stream) {
    check(cudaMemcpyAsync(to, staging, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)),
          "cudaMemcpyAsync");
}

void* mark(void* event, void* stream) {
    cudaEvent_t e = static_cast<cudaEvent_t>(event);
    if (!e) check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "cudaEventCreate");
    check(cudaEventRecord(e, static_cast<cudaStream_t>(stream)), "cudaEventRecord");
    return e;
}

bool passed(void* event) {
    const Relaxed relaxed;
    const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (status == cudaErrorNotReady) {
        cudaGetLastError();  // or the next launch, of whomever, is taken to have failed
        return false;
    }
    check(status, "cudaEventQuery");
    return true;
}

int built_version() { return CUDART_VERSION; }

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace hf_lopt
