"""short_conv against float64, and its properties. A state is a copy of inputs: compared exactly."""

import ml_dtypes
import numpy as np
import pytest
from kimi_linear import reference
from variants import error, every_device, on, ops, same_bits

BF16 = ml_dtypes.bfloat16
DTYPES = [np.float32, BF16]
BOUND = {np.float32: 4e-7, BF16: 2.5e-3}  # bf16: half an ulp of the result
LENGTHS = (0, 1, 2, 9, 0, 3, 30)  # empty, and shorter than a window


def make_case(C, W, dtype, lengths=LENGTHS, seed=0):
    r = np.random.default_rng(seed)
    cu = np.cumsum([0, *lengths])
    return {
        "x": r.standard_normal((cu[-1], C)).astype(dtype),
        "weight": r.standard_normal((C, W)).astype(np.float32),
        "state": r.standard_normal((len(lengths), C, W - 1)).astype(dtype),
        "cu_seqlens": cu,
    }


def conv(case, **changes):
    case = {**case, **changes}
    return ops.short_conv(**case, out=np.full(case["x"].shape, np.nan, case["x"].dtype))


def truth(case, **changes):
    exact = {n: np.asarray(x, np.float64) for n, x in case.items() if n != "cu_seqlens"}
    return reference.short_conv(**exact, cu_seqlens=case["cu_seqlens"], **changes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(variant, dtype):
    for W in range(1, 9):
        for C in (1, 5, 131):
            case = make_case(C, W, dtype)
            for activation in ("silu", None):
                y, state = conv(case, activation=activation)
                want, want_state = truth(case, activation=activation)
                assert error(y, want) < BOUND[dtype], (W, C)
                assert same_bits(state, want_state.astype(dtype)), (W, C)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_channels_than_a_strip(variant, dtype):
    case = make_case(2500, 4, dtype, lengths=(3, 20))
    y, state = conv(case)
    want, want_state = truth(case)
    assert error(y, want) < BOUND[dtype]
    assert same_bits(state, want_state.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuts_batches_and_threads_change_no_bit(variant, dtype):
    case = make_case(700, 4, dtype, lengths=(90,))
    with on(variant, threads=1):
        want, final = conv(case)
        for cut in (1, 2, 3, 50, 89):
            state, parts = case["state"], []
            for part in (slice(0, cut), slice(cut, None)):
                x = case["x"][part]
                y, state = conv(case, x=x, state=state, cu_seqlens=np.array([0, len(x)]))
                parts.append(y)
            assert same_bits(np.concatenate(parts), want)
            assert same_bits(state, final)
        batch = make_case(700, 4, dtype)
        ys, states = conv(batch)
        cu = batch["cu_seqlens"]
        for n in range(len(LENGTHS)):
            own, x = batch["state"][n : n + 1], batch["x"][cu[n] : cu[n + 1]]
            y, state = conv(batch, x=x, state=own, cu_seqlens=np.array([0, len(x)]))
            assert same_bits(y, ys[cu[n] : cu[n + 1]])
            assert same_bits(state, states[n : n + 1])
        wide = np.full((90, 705), np.nan, dtype)
        wide[:, 3:703] = case["x"]
        assert same_bits(conv(case, x=wide[:, 3:703])[0], want)
    for threads in (2, 7):
        with on(variant, threads=threads):
            y, state = conv(case)
            assert same_bits(y, want)
            assert same_bits(state, final)


def test_nan_reaches_only_its_window(variant):
    case = make_case(40, 4, np.float32, lengths=(20, 20))
    want, final = conv(case)
    case["x"][10, 7] = np.nan
    case["state"][1, 5, 2] = np.nan  # the input just before sequence 1
    y, state = conv(case)
    for rows, channel in ((slice(10, 14), 7), (slice(20, 23), 5)):
        assert np.isnan(y[rows, channel]).all()
        y[rows, channel] = want[rows, channel]
    assert same_bits(y, want)
    assert same_bits(state, final)


@every_device
def test_an_empty_sequence_keeps_its_state_and_no_state_is_zeros():
    case = make_case(40, 4, BF16)
    _, state = conv(case)
    for n, length in enumerate(LENGTHS):
        assert same_bits(state[n], case["state"][n]) == (length == 0)
    zeros = np.zeros_like(case["state"])
    del case["state"]
    for got, want in zip(conv(case), conv(case, state=zeros), strict=True):
        assert same_bits(got, want)
