// Lists of tensors that stay the same from call to call, or that only go from one call to the next. A caller names
// them by number, because bringing a list through the dispatcher and making Python's object for every tensor costs
// more than most of what is done with a small tensor. What is kept are the tensors, not where their data is: they are
// looked at anew in every call.
#pragma once

#include "passes.h"

namespace hf_lopt {

// Keeps the tensors under a number above 0 until they are released.
void hold(Tensors tensors, int64_t number);
// `like` tells the dispatcher the device. A number that is not held is left alone.
void release(Tensor like, int64_t number);
Tensors fetch(Tensor like, int64_t number);
// Whether the tensors of the lists `numbers`, and then of the lists `strided`, have the shapes, types and devices that
// they had at the first call with the number `kinds`, and the latter also the layouts and strides.
bool same_kinds(Tensor like, Ints numbers, Ints strided, int64_t kinds);

// The lists that this thread's call may use for its results, once; none, or one for each list among the results.
std::vector<Tensors> take_spare();

// What a call says about the lists that are held: for each list among its arguments how many held lists stand before
// the tensors that are given, and their numbers; then for each list among its results the number to hold it under, 0
// to return it. Empty: nothing is held.
class Held {
  public:
    explicit Held(const Ints& code) : at_(code.data()), end_(code.data() + code.size()) {}
    ~Held() { take_spare(); }
    template <class... Lists>
    void take(Lists&... lists) {
        if (at_ != end_) (take_one(lists), ...);
    }
    // After `take`: what is held under the numbers of the results is of an earlier call, and may be written over.
    void offer_spare() const;
    // Results that are held are empty afterwards.
    template <class... Lists>
    void give(Lists&... lists) {
        if (at_ != end_) (give_one(lists), ...);
    }

  private:
    int64_t next();
    void take_one(Tensors& list);
    void give_one(Tensors& list);

    const int64_t *at_, *end_;
};

}  // namespace hf_lopt
