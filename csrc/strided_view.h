// Small tensors of numbers that are read where they are, whatever their strides.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define HF_LOPT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HF_LOPT_HOST_DEVICE inline
#endif

namespace hf_lopt {

// A tensor of up to three axes. The first one is that of the tensors or slices that the numbers are for; its stride is
// 0 where one entry is for all.
template <class T>
struct StridedView {
    const T* data;
    int64_t stride[3];
    HF_LOPT_HOST_DEVICE T operator()(int64_t t, int64_t i = 0, int64_t j = 0) const {
        return data[t * stride[0] + i * stride[1] + j * stride[2]];
    }
};

}  // namespace hf_lopt
