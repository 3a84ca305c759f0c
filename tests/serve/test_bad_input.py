"""Requests that are wrong, a line each: which status, which parameter, which words."""

import json
from types import SimpleNamespace

import pytest
import servers
from servers import HTTP

import kimi_linear as kl

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def served():
    with (
        kl.load(device="cpu", max_context=128, max_batch=2) as model,
        servers.serving(model, max_tokens=100) as s,
    ):
        yield s


def post(served, path, data, **headers):
    headers = {"content-type": "application/json"} | headers
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    got = HTTP.post(served.url + path, content=data, headers=headers)
    assert got.headers["content-type"] == "application/json"
    error = got.json()["error"]
    assert list(error) == ["message", "type", "param", "code"] and error["message"]
    return SimpleNamespace(status=got.status_code, **error)


COMMON = [  # the body beside a prompt or messages; the parameter; words of the message
    ({"temperature": -0.1}, "temperature", "must be a number in [0, 1e+06], got -0.1"),
    ({"temperature": "1"}, "temperature", "must be a number"),
    ({"temperature": True}, "temperature", "must be a number"),
    ({"top_p": 0}, "top_p", "(0, 1]"),
    ({"top_p": 1.1}, "top_p", "(0, 1]"),
    ({"top_k": -2}, "top_k", "must be an integer in 0..4096"),
    ({"top_k": 1.5}, "top_k", "must be an integer"),
    ({"min_p": 2}, "min_p", "[0, 1]"),
    ({"repetition_penalty": 0}, "repetition_penalty", "(0, "),
    ({"seed": -1}, "seed", "must be an integer in 0.."),
    ({"seed": 1 << 64}, "seed", "must be an integer in 0.."),
    ({"n": 0}, "n", "must be an integer in 1..128"),
    ({"n": 129}, "n", "1..128"),
    ({"n": True}, "n", "1..128"),
    ({"n": 2.0}, "n", "1..128"),
    ({"stop": ""}, "stop", "at least one character"),
    ({"stop": ["a", 1]}, "stop", "must be a string or a list of strings"),
    ({"stop": ["x"] * 65}, "stop", "at most 64"),
    ({"stop_token_ids": [4096]}, "stop_token_ids", "must be in 0..4095, got 4096"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids", "must be an integer"),
    ({"stop_token_ids": 5}, "stop_token_ids", ""),
    ({"ignore_eos": 1}, "ignore_eos", "true or false"),
    ({"max_tokens": -1}, "max_tokens", "must be an integer in 0..2147483647, got -1"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 101}, "max_tokens", "at most 100 on this server"),
    ({"max_tokens": "9"}, "max_tokens", "must be an integer"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage",
     "true or false"),
    ({"stream": True, "stream_options": {"extra": 1}}, "stream_options.extra", "unknown"),
    ({"stream": True, "stream_options": []}, "stream_options", "must be a JSON object"),
    ({"presence_penalty": 0.5}, "presence_penalty", "only 0 is supported, got 0.5"),
    ({"frequency_penalty": 1}, "frequency_penalty", "only 0 is supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "only {} is supported"),
    ({"temprature": 1}, "temprature", "unknown or not supported"),
    ({"guided_json": {}}, "guided_json", "unknown or not supported"),
    ({"\ud800": 1}, "\ud800", "unknown or not supported"),
    ({"model": 5}, "model", "must be a string"),
]  # fmt: skip

TEXTS = [
    ({}, "prompt", "is required"),
    ({"prompt": None}, "prompt", "is required"),
    ({"prompt": ""}, "prompt", "at least one token"),
    ({"prompt": []}, "prompt", "at least one token"),
    ({"prompt": [[]]}, "prompt", "prompt[0]: must hold at least one token"),
    ({"prompt": ["a", ""]}, "prompt", "prompt[1]: must hold at least one token"),
    ({"prompt": 5}, "prompt", "must be str"),
    ({"prompt": {"a": 1}}, "prompt", "messages go to /v1/chat/completions"),
    ({"prompt": [USER]}, "prompt", "messages go to /v1/chat/completions"),
    ({"prompt": [[USER]]}, "prompt", "messages go to /v1/chat/completions"),
    ({"prompt": ["a", USER]}, "prompt", "messages go to /v1/chat/completions"),
    ({"prompt": [4096]}, "prompt", "must be in 0..4095, got 4096"),
    ({"prompt": [-1]}, "prompt", "must be in 0..4095, got -1"),
    ({"prompt": [1, 1 << 70]}, "prompt", "63 bits"),
    ({"prompt": [1, "a"]}, "prompt", "prompt[1]: token ids must be integers"),
    ({"prompt": [True]}, "prompt", "prompt[0]: token ids must be integers"),
    ({"prompt": [1.5]}, "prompt", "token ids must be integers"),
    ({"prompt": "a\ud800"}, "prompt", "must be Unicode"),
    ({"prompt": [[[[]]]]}, "prompt", "token ids must be integers"),
    ({"prompt": "x", "logprobs": -1}, "logprobs", "must be an integer in 0..256"),
    ({"prompt": "x", "logprobs": 257}, "logprobs", "0..256"),
    ({"prompt": "x", "logprobs": True}, "logprobs", "0..256"),
    ({"prompt": "x", "echo": 1}, "echo", "true or false"),
    ({"prompt": "x", "best_of": 2}, "best_of", "only 1 is supported"),
    ({"prompt": "x", "suffix": "y"}, "suffix", 'only "" is supported'),
    ({"prompt": "x", "messages": [USER]}, "messages", "unknown or not supported"),
    ({"prompt": "x", "max_completion_tokens": 5}, "max_completion_tokens", "unknown"),
    ({"prompt": [1] * 128}, "max_tokens", "maximum context length is 128 tokens"),
    ({"prompt": [1] * 129, "max_tokens": 0, "echo": True}, "max_tokens", "maximum context"),
    ({"prompt": [1] * 100, "max_tokens": 29}, "max_tokens", "29 new ones are asked for"),
]

CHATS = [
    ({}, "messages", "is required"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": "hello"}, "messages", "must be a list"),
    ({"messages": ["hello"]}, "messages[0]", "must be a JSON object"),
    ({"messages": [USER, {"role": "nobody", "content": "x"}]}, "messages", "messages[1]: role"),
    ({"messages": [{"content": "x"}]}, "messages", "messages[0]: role"),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0]: content"),
    ({"messages": [USER | {"content": 5}]}, "messages", "messages[0]: content"),
    ({"messages": [USER | {"content": "\ud800"}]}, "messages", "must be Unicode"),
    ({"messages": [USER | {"weight": 1}]}, "messages[0].weight", "unknown"),
    ({"messages": [USER | {"name": 5}]}, "messages[0].name", "must be a string"),
    ({"messages": [USER | {"audio": {"id": "x"}}]}, "messages[0].audio", "only null"),
    ({"messages": [{"role": "tool", "content": "3"}]}, "messages", "tool_call_id"),
    ({"messages": [USER | {"tool_calls": [1]}]}, "messages", "only an assistant's"),
    ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages", "function.name"),
    ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].image_url", "unknown or not supported"),
    ({"messages": [USER | {"content": [{"type": "text"}]}]}, "messages", "must have text"),
    ({"messages": [USER | {"content": ["x"]}]}, "messages[0].content[0]", "JSON object"),
    ({"messages": [USER], "prompt": "x"}, "prompt", "unknown or not supported"),
    ({"messages": [USER], "logprobs": 5}, "logprobs", "true or false"),
    ({"messages": [USER], "top_logprobs": 5}, "top_logprobs", "needs logprobs"),
    ({"messages": [USER], "logprobs": True, "top_logprobs": 257}, "top_logprobs", "0..256"),
    ({"messages": [USER], "max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens",
     "must be max_tokens (5)"),
    ({"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ({"messages": [USER], "max_completion_tokens": 101}, "max_completion_tokens", "at most 100"),
    ({"messages": [USER], "tools": {}}, "tools", "must be a list"),
    ({"messages": [USER], "tools": [5]}, "tools[0]", "must be a JSON object"),
    ({"messages": [USER], "tools": [{"type": "web_search"}]}, "tools[0].type", "only \"function\""),
    ({"messages": [USER], "tools": [{"type": "function"}]}, "tools[0].function", "object"),
    ({"messages": [USER], "tools": [{"function": {}}]}, "tools[0].function.name", "is required"),
    ({"messages": [USER], "tools": [{"function": {"name": "f", "strict": "yes"}}]},
     "tools[0].function.strict", "true or false"),
    ({"messages": [USER], "tool_choice": "required"}, "tool_choice", 'only "auto" or "none"'),
    ({"messages": [USER], "tool_choice": {"type": "function"}}, "tool_choice", "only"),
    ({"messages": [USER], "parallel_tool_calls": False}, "parallel_tool_calls", "only true"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format", "only"),
    ({"messages": [USER], "functions": []}, "functions", "unknown or not supported"),
    ({"messages": [USER], "reasoning_effort": "low"}, "reasoning_effort", "unknown"),
    ({"messages": [USER], "echo": True}, "echo", "unknown"),
    ({"messages": [USER], "continue_final_message": True}, "continue_final_message", "assistant's"),
    ({"messages": [USER | {"role": "assistant"}], "continue_final_message": True,
      "add_generation_prompt": True}, "add_generation_prompt", "must not be true"),
    ({"messages": [USER | {"content": "a b c d " * 60}]}, "max_tokens", "maximum context length"),
]  # fmt: skip

CASES = [
    *((TEXT, {"prompt": "x"} | body, param, words) for body, param, words in COMMON),
    *((CHAT, {"messages": [USER]} | body, param, words) for body, param, words in COMMON),
    *((TEXT, *case) for case in TEXTS),
    *((CHAT, *case) for case in CHATS),
    ("/tokenize", {}, "prompt", "either prompt or messages"),
    ("/tokenize", {"prompt": "x", "messages": [USER]}, "prompt", "either"),
    ("/tokenize", {"prompt": 5}, "prompt", "must be a string"),
    ("/detokenize", {}, "tokens", "must be a list"),
    ("/detokenize", {"tokens": [5000]}, "tokens", "must be in 0..4095"),
]


@pytest.mark.parametrize("path, body, param, words", CASES, ids=lambda x: str(x)[:40])
def test_a_wrong_field_is_named(served, path, body, param, words):
    got = post(served, path, body)
    assert (got.status, got.type, got.param) == (400, "invalid_request_error", param)
    assert words in got.message


def test_nothing_of_them_is_left(served):
    assert served.idle()


BODIES = [
    (b"", "must be valid JSON"),
    (b"{", "must be valid JSON"),
    (b"[]", "must be a JSON object"),
    (b'"x"', "must be a JSON object"),
    (b'{"prompt": "\xff"}', "must be UTF-8"),
    (b"\xef\xbb\xbf{}", "byte-order mark"),
    (b'{"prompt": "x", "prompt": "y"}', "must appear once"),
    (b'{"prompt": "x", "temperature": NaN}', "must be finite"),
    (b'{"prompt": "x", "temperature": 1e999}', "must be finite"),
    (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"seed": ' + b"9" * 10_000 + b"}", "must be valid JSON"),
]


@pytest.mark.parametrize("body, words", BODIES, ids=lambda x: str(x)[:40])
def test_a_wrong_body_is_refused(served, body, words):
    for path in (TEXT, CHAT, "/tokenize", "/detokenize"):
        got = post(served, path, body)
        assert got.status == 400 and words in got.message


def test_depths_at_the_limit_of_the_parser(served):
    """What the JSON parser takes, writing it into a prompt or a message must take or refuse."""
    for n in (300, *range(930, 1000, 10), 3000):
        deep = b"[" * n + b"]" * n
        tools = b'[{"function": {"name": "f", "parameters": %b}}]' % deep
        head = b'{"max_tokens": 99, "messages": [{"role": "user", "content": "hello"}], '
        assert post(served, CHAT, head + b'"tools": %b}' % tools).status == 400
        assert post(served, CHAT, head + b'"stop": %b}' % deep).status == 400


def test_other_errors_have_the_same_form(served):
    assert post(served, TEXT, {"prompt": "x", "model": "gpt-4"}).__dict__ == dict(
        status=404, type="invalid_request_error", param="model", code="model_not_found",
        message="model: this server has 'small_model', not 'gpt-4'",
    )  # fmt: skip
    assert post(served, "/v1/embeddings", {}).status == 404
    assert post(served, "/health", {}).status == 405
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        got = post(served, TEXT, {"prompt": "x"}, **{"content-type": kind})
        assert (got.status, got.code) == (415, "unsupported_media_type")


def test_neutral_values_ask_for_nothing(served):
    body = {
        "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "n": None,
        "stop": None, "seed": None, "top_k": -1, "model": "small_model", "max_tokens": 1,
    }  # fmt: skip
    more = {
        TEXT: {"prompt": "x", "best_of": 1, "suffix": None, "logprobs": None},
        CHAT: {"messages": [USER], "tool_choice": "auto", "parallel_tool_calls": True,
               "response_format": {"type": "text"}, "store": False, "metadata": {"a": "b"}},
    }  # fmt: skip
    for path, extra in more.items():
        got = HTTP.post(served.url + path, json=body | extra)
        assert got.status_code == 200, got.text
