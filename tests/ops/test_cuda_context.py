"""What is current on a thread is its owner's: a call leaves it as it was, and creates nothing."""

import ctypes
import threading

import pytest
from kimi_linear._backends import shared
from on_cuda import has_cuda

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device and torch")


def on_a_fresh_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    assert found, "the thread raised"
    return found[0]


def current(driver):
    context = ctypes.c_void_p(-1)
    assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
    return context.value


def test_a_thread_without_a_context_stays_so():
    driver, backend = ctypes.CDLL("libcuda.so.1"), shared("cuda", 0)

    def look():
        before = current(driver)
        backend.info()
        return before, current(driver)

    assert on_a_fresh_thread(look) == (None, None)


def test_a_context_of_the_caller_stays_current():
    driver, backend = ctypes.CDLL("libcuda.so.1"), shared("cuda", 0)

    def look():
        own = ctypes.c_void_p()
        assert driver.cuCtxCreate_v2(ctypes.byref(own), 0, 0) == 0
        backend.info()
        after = current(driver)
        driver.cuCtxDestroy_v2(own)
        return own.value, after

    own, after = on_a_fresh_thread(look)
    assert own is not None and after == own
