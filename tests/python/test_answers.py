"""Where an answer ends, what processors do to it, and what chat makes of it."""

import numpy as np
import pytest
from small_models import PROMPTS, model, nothing_is_left_behind, path  # noqa: F401

import kimi_linear as kl


# ---- where an answer ends ----------------------------------------------------------------


def script(model, ids):
    """A logits processor that makes the model say these ids, whatever it wants."""
    ids = list(ids)

    def process(so_far, logits):
        logits[:] = -50
        logits[ids[min(len(so_far) - process.n_prompt, len(ids) - 1)]] = 50

    process.n_prompt = 1
    return process


def say(model, text, **options):
    ids = model.tokenizer.encode(text, allow_control=True)
    options.setdefault("max_new_tokens", len(ids))
    return model.generate([0], logits_processor=script(model, ids), **options)


def test_stop_tokens_end_the_answer_and_have_no_text(model):
    for stop in ("<|im_end|>", "[EOS]", "[EOT]"):
        answer = say(model, f"hello{stop}more")
        assert (answer.text, answer.finish_reason) == ("hello", "stop")
        assert answer.token_ids[-1] == model.tokenizer.control_tokens[stop]
    answer = say(model, "hello<|im_end|>more", ignore_eos=True)
    assert (answer.text, answer.finish_reason) == ("hello<|im_end|>more", "length")
    answer = say(model, "1 2 3", ignore_eos=True, stop_token_ids=[ord("1")])
    assert (answer.text, answer.finish_reason) == ("", "stop")
    answer = say(model, "12<|im_end|>", stop_token_ids=[ord("2")])
    assert (answer.text, answer.finish_reason) == ("1", "stop")
    assert say(model, "1<|im_end|>2", stop_token_ids=[ord("2")]).text == "1"


@pytest.mark.parametrize(
    "said,stop,text,reason",
    [
        ("one two three", "two", "one ", "stop"),
        ("one two three", ["three", "two"], "one ", "stop"),
        ("one two three", ["four"], "one two three", "length"),
        ("one two tw", "two!", "one two tw", "length"),
        ("aab", "ab", "a", "stop"),
        ("xabcabd", "abd", "xabc", "stop"),
        ("stop", "stop", "", "stop"),
        ("日本語", "本", "日", "stop"),
        ("a\n\nb", "\n\n", "a", "stop"),
    ],
)
def test_stop_strings(model, said, stop, text, reason):
    answer = say(model, said, stop=stop)
    assert (answer.text, answer.finish_reason) == (text, reason)
    ids = model.tokenizer.encode(said)
    chunks = list(
        model.stream(
            [0], logits_processor=script(model, ids), max_new_tokens=len(ids), stop=stop
        )
    )
    assert "".join(c.text for c in chunks) == text
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [reason]


def test_a_stop_string_ends_its_own_row_only(model):
    n = len(model.tokenizer.encode("hello"))
    answers = model.generate(["hello", "a"], max_new_tokens=30, ignore_eos=True)
    cut = answers[0].text[3:5]
    stopped = model.generate(["hello", "a"], max_new_tokens=30, ignore_eos=True, stop=[cut])
    assert stopped[0].text == answers[0].text[: answers[0].text.index(cut)]
    assert stopped[0].finish_reason == "stop" and len(stopped[0].prompt_token_ids) == n
    assert stopped[1].token_ids == answers[1].token_ids or cut in answers[1].text


def test_stop_text_is_found_wherever_tokens_break():
    hypothesis = pytest.importorskip("hypothesis")
    from kimi_linear._text import TextBuilder
    from kimi_linear.testing import tiny_tokenizer

    st = hypothesis.strategies
    tokenizer = tiny_tokenizer()

    @hypothesis.settings(max_examples=400, deadline=None)
    @hypothesis.given(
        st.text("abé\n", max_size=30),
        st.lists(st.text("abé\n", min_size=1, max_size=4), max_size=3),
    )
    def check(text, stops):
        builder = TextBuilder(tokenizer, stops)
        shown = ""
        for token in text.encode():
            shown += builder.feed(token)
            if builder.stopped:
                break
        shown += builder.finish()
        ends = {len(text.encode()): text}  # the answer ends with the first stop completed
        for stop in stops:
            at = text.find(stop)
            if at >= 0:
                end = len(text[: at + len(stop)].encode())
                ends[end] = min(ends.get(end, text), text[:at], key=len)
        assert shown == builder.text == ends[min(ends)]

    check()


# ---- processors --------------------------------------------------------------------------


def test_processors_see_ids_and_chain(model):
    seen = []

    def first(ids, logits):
        seen.append(ids.tolist())
        assert logits.shape == (320,) and logits.dtype == np.float32
        return np.where(np.arange(320) == 7, 0.0, -np.inf)

    def second(ids, logits):
        assert np.isinf(logits[6]) and logits[7] == 0
        return None  # in place, or not at all

    answer = model.generate([3, 4], max_new_tokens=3, logits_processor=[first, second])
    assert answer.token_ids == [7, 7, 7]
    assert seen == [[3, 4], [3, 4, 7], [3, 4, 7, 7]]


def test_an_identity_processor_changes_nothing(model):
    want = model.generate(PROMPTS, max_new_tokens=5, ignore_eos=True)
    got = model.generate(
        PROMPTS, max_new_tokens=5, ignore_eos=True, logits_processor=lambda ids, z: z.copy()
    )
    assert [c.token_ids for c in got] == [c.token_ids for c in want]


def test_a_processor_that_fails_leaves_the_model_usable(model):
    want = model.generate("hello", max_new_tokens=3).token_ids

    def fail(ids, logits):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        model.generate("hello", logits_processor=fail)
    with pytest.raises(ValueError, match=r"must return logits of shape \(320,\), got \(3,\)"):
        model.generate("hello", logits_processor=lambda ids, z: z[:3])
    for bad in (np.nan, -np.inf):
        with pytest.raises(kl.NumericalError, match="must be finite"):
            model.generate("hello", logits_processor=lambda ids, z, bad=bad: z * 0 + bad)
    assert model.generate("hello", max_new_tokens=3).token_ids == want


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 40])
def test_a_processor_that_fails_later_is_heard(model, n):
    """After any number of tokens, some of which came of the same call into the core."""

    def fail(ids, logits):
        if len(ids) == 2 + n:
            raise LookupError(f"after {n}")

    options = dict(max_new_tokens=50, ignore_eos=True, logits_processor=fail)
    for prompt in ([5, 6], [[5, 6], [7]], [[7, 8, 9], [5, 6]]):
        with pytest.raises(LookupError, match=f"after {n}$"):
            model.generate(prompt, **options)
    chunks = model.stream([5, 6], **options)
    assert [next(chunks).finish_reason for _ in range(n)] == [None] * n
    with pytest.raises(LookupError, match=f"after {n}$"):
        next(chunks)
    with model.state().feed([5]) as state:
        with pytest.raises(LookupError, match=f"after {n}$"):
            state.generate([6], **options)
        assert state.token_ids == [5]


# ---- chat --------------------------------------------------------------------------------


def test_chat_is_the_template_and_generate(model):
    messages = [{"role": "user", "content": "hello"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    ids = model.tokenizer.apply_chat_template(messages, tools=tools)
    answer = model.chat(messages, tools=tools, max_new_tokens=4)
    assert answer.prompt_token_ids == ids
    assert answer.token_ids == model.generate(ids, max_new_tokens=4).token_ids
    assert model.generate(messages, max_new_tokens=1).prompt_token_ids == (
        model.tokenizer.apply_chat_template(messages)
    )


def test_tool_calls_in_an_answer(model):
    said = ("ok<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
            '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
            "<|im_end|>")  # fmt: skip
    answer = say(model, said)
    assert answer.finish_reason == "stop"
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert answer.tool_calls == (
        {"id": "functions.add:0", "type": "function", "function": function},
    )
