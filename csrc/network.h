// The small per-element network: two hidden layers of U units and two outputs.
//
// The first layer has one row of weights per input that differs from element to element. Features that are constant
// along a row or a column of a matrix have none: what they add to the first layer is a bias (see
// cpu/apply_network.cpp).
#pragma once

#include "features.h"

namespace hf_lopt {

// Weights with the feature scales, the size of the step and the multiplier of the exponent in them.
template <int U>
struct Network {
    float first[kInputs][U];
    float bias[U];
    float second[U][U];
    float second_bias[U];
    float last[U][2];  // direction, magnitude
    float last_bias[2];
    float decay;  // p <- p - decay p - step
};

// The weights of the vector features in the first layer. `line`: those of the accumulator that has a number per line,
// and of its inverse root; `vector`: those of the other one, which varies along a line.
template <int U>
struct VectorWeights {
    float line[kFactored][U], rsqrt_line[kFactored][U], vector[kFactored][U], rsqrt_vector[kFactored][U];
};

// The layers after the first: z are its sums before the rectifier. V is float or a vector of floats; `relu` is passed
// in, because how it treats NaN is the business of the instruction set.
template <int U, class V, class Relu>
HF_LOPT_FN void finish_network(const Network<U>& w, V (&z)[U], Relu relu, V* direction, V* magnitude) {
    V o0 = V{} + w.last_bias[0], o1 = V{} + w.last_bias[1];
    for (int j = 0; j < U; j++) z[j] = relu(z[j]);
    for (int j = 0; j < U; j++) {
        V y = z[0] * w.second[0][j] + w.second_bias[j];
        for (int i = 1; i < U; i++) y = z[i] * w.second[i][j] + y;
        y = relu(y);
        o0 = y * w.last[j][0] + o0;
        o1 = y * w.last[j][1] + o1;
    }
    *direction = o0;
    *magnitude = o1;
}

}  // namespace hf_lopt
