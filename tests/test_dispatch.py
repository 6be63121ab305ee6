"""Which kernels run: a choice of each thread."""

import threading

from hf_lopt.kernels import dispatch, ops


def test_plain_is_a_choice_of_the_thread_that_makes_it():
    entered, leave, seen = threading.Event(), threading.Event(), []

    def compare():
        seen.append(dispatch.enabled())
        with ops.plain():
            entered.set()
            leave.wait(30)
            seen.append(dispatch.enabled())
        seen.append(dispatch.enabled())

    thread = threading.Thread(target=compare)
    with ops.plain():
        thread.start()
        assert entered.wait(30)
        assert not dispatch.enabled()
    # The other thread is still within its own context.
    assert dispatch.enabled()
    leave.set()
    thread.join()
    assert seen == [True, False, True]


def test_plain_nests():
    with ops.plain():
        with ops.plain():
            assert not dispatch.enabled()
        assert not dispatch.enabled()
    assert dispatch.enabled()
