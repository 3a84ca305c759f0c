"""The server, through OpenAI's own client and through plain HTTP: what it answers is what the
model answers, whoever else asks."""

import asyncio

import openai
import pytest
import servers
from servers import CHAT, HTTP, LONG, STORY, client_of, post, streamed

# ---- completions -------------------------------------------------------------------------


def test_a_completion_is_what_generate_says(model, client):
    want = model.generate(STORY, max_new_tokens=30)
    got = client.completions.create(model="small_model", prompt=STORY, max_tokens=30,
                                    temperature=0)  # fmt: skip
    assert got.object == "text_completion" and got.id.startswith("cmpl-")
    assert [(c.index, c.text, c.finish_reason) for c in got.choices] == [
        (0, want.text, "length")
    ]
    n = len(want.prompt_token_ids)
    usage = got.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (n, 30, n + 30)
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= n


def test_prompts_of_all_forms(model, client):
    ids = model.tokenizer.encode(STORY)
    other = model.tokenizer.encode("The lazy dog")
    for prompt, rows in [
        (STORY, [ids]), ([STORY], [ids]), (ids, [ids]), ([ids], [ids]),
        ([STORY, "The lazy dog"], [ids, other]), ([ids, other], [ids, other]),
    ]:  # fmt: skip
        got = client.completions.create(model="small_model", prompt=prompt, max_tokens=5,
                                        temperature=0)  # fmt: skip
        want = model.generate(rows, max_new_tokens=5)
        assert [c.text for c in got.choices] == [w.text for w in want]
        assert [c.index for c in got.choices] == list(range(len(rows)))
        assert got.usage.prompt_tokens == sum(map(len, rows))


def test_sampling_options_reach_the_model(model, served, client):
    options = dict(temperature=1.5, top_p=0.95, seed=7)
    extra = dict(top_k=40, min_p=0.001, repetition_penalty=1.1, ignore_eos=True)
    got = client.completions.create(model="small_model", prompt=[STORY, "The lazy dog"], n=3,
                                    max_tokens=12, extra_body=extra, **options)  # fmt: skip
    want = [
        model.generate(prompt, max_new_tokens=12, **options | extra | {"seed": 7 + i}).text
        for prompt in (STORY, "The lazy dog")
        for i in range(3)
    ]
    assert [c.text for c in got.choices] == want
    assert len(set(want)) > 3
    assert got.usage.completion_tokens == 6 * 12
    ends = model.tokenizer.encode(",")
    got = post(served, prompt=STORY, temperature=0, stop_token_ids=ends).json()
    assert got["choices"][0]["finish_reason"] == "stop"


def test_defaults_are_openais(served, model):
    """16 tokens, temperature 1: two draws of a flat distribution differ."""
    bodies = [post(served, prompt="x", ignore_eos=True).json() for _ in range(2)]
    assert [b["usage"]["completion_tokens"] for b in bodies] == [16, 16]
    texts = {b["choices"][0]["text"] for b in bodies}
    assert len(texts) == 2 or texts != {model.generate("x", max_new_tokens=16).text}


def test_a_stream_says_what_the_whole_says(model, served):
    half = model.tokenizer.encode("\N{SNOWMAN}")[:-1]  # a prompt that ends inside a character
    prompts = [model.tokenizer.encode(STORY), model.tokenizer.encode("The") + half]
    body = dict(prompt=prompts, n=2, max_tokens=20, seed=3, stop=["cake", "!"], logprobs=2)
    body |= dict(echo=True, temperature=0.7)
    whole = post(served, **body).json()
    parts = streamed(served, stream_options={"include_usage": True}, **body)
    assert [p["usage"] for p in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["choices"] == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [parts[-1]["usage"][k] for k in counts] == [whole["usage"][k] for k in counts]
    assert {p["id"] for p in parts} == {parts[0]["id"]} != {whole["id"]}
    for choice in whole["choices"]:
        mine = [c for p in parts for c in p["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        ends = [c["finish_reason"] for c in mine if c["finish_reason"]]
        assert ends == [choice["finish_reason"]]
        for name, column in choice["logprobs"].items():
            assert [x for c in mine for x in c["logprobs"][name]] == column
        prompt = prompts[choice["index"] // 2]
        first = model.tokenizer.decode(prompt)
        assert choice["text"].startswith(first)
        assert choice["logprobs"]["text_offset"][len(prompt)] == len(first)


def test_stop_strings(model, client):
    text = model.generate(STORY, max_new_tokens=40).text
    stop = text[30:38]
    want = text[: text.index(stop)]
    options = dict(model="small_model", prompt=STORY, max_tokens=40, temperature=0, stop=[stop])
    got = client.completions.create(**options).choices[0]
    assert (got.text, got.finish_reason) == (want, "stop")
    chunks = list(client.completions.create(stream=True, **options))
    assert "".join(c.choices[0].text for c in chunks) == want
    assert chunks[-1].choices[0].finish_reason == "stop"


# ---- log-probabilities -------------------------------------------------------------------


def test_logprobs_of_a_completion(model, client):
    want = model.generate(STORY, max_new_tokens=12, logprobs=3)
    options = dict(max_tokens=12, logprobs=3, temperature=0)
    got = client.completions.create(model="small_model", prompt=STORY, **options).choices[0]
    table, decode = got.logprobs, model.tokenizer.decode
    assert table.tokens == [decode([i]) for i in want.token_ids]
    assert table.token_logprobs == [t.logprob for t in want.logprobs]
    assert table.top_logprobs == [{decode([i]): lp for i, lp in t.top} for t in want.logprobs]
    starts = zip(table.text_offset, table.tokens, strict=True)
    assert all(got.text[at:].startswith(token) for at, token in starts)
    none = client.completions.create(
        model="small_model", prompt=STORY, max_tokens=2, logprobs=0
    )
    assert [len(t) for t in none.choices[0].logprobs.top_logprobs] == [1, 1]


def test_the_token_drawn_is_among_its_alternatives(served):
    got = post(served, prompt=STORY, temperature=3.0, seed=1, max_tokens=8, logprobs=1)
    table = got.json()["choices"][0]["logprobs"]
    rows = (table[k] for k in ("tokens", "token_logprobs", "top_logprobs"))
    for name, logprob, top in zip(*rows, strict=True):
        assert top[name] == logprob and len(top) in (1, 2)
    assert any(len(top) == 2 for top in table["top_logprobs"])


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_prompts_as_harnesses_ask(model, served, max_tokens):
    """lm-eval's local-completions reads token_logprobs[n_context:-1] with max_tokens=1, others
    send 0; greedy where every token is the best of its alternatives."""
    rows = [("Once upon a", " time, there was"), ("Once upon a", " zebra of"), ("The", " dog")]
    encode = model.tokenizer.encode
    split = [(encode(a), encode(b)) for a, b in rows]
    body = dict(prompt=[a + b for a, b in split], temperature=0, logprobs=1, echo=True)
    got = post(served, max_tokens=max_tokens, seed=1234, **body).json()
    found = []
    for choice, (a, b) in zip(got["choices"], split, strict=True):
        table = choice["logprobs"]
        assert table["token_logprobs"][0] is None and table["top_logprobs"][0] is None
        assert len(table["tokens"]) == len(a + b) + max_tokens
        assert choice["text"].startswith(model.tokenizer.decode(a + b))
        mine = slice(len(a), len(a + b))
        logprobs = table["token_logprobs"][mine]
        is_greedy = logprobs == [max(top.values()) for top in table["top_logprobs"][mine]]
        found.append((sum(logprobs), is_greedy))
        assert choice["finish_reason"] == "length"
    want = [model.score(a, b) for a, b in split]
    assert [g for _, g in found] == [g for _, g in want] == [True, False, False]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in want], abs=1e-5)
    assert got["usage"]["completion_tokens"] == max_tokens * len(rows)


def test_offsets_where_tokens_share_a_character(model, served):
    text = "\N{SNOWMAN}\N{GRINNING FACE}é"
    ids = model.tokenizer.encode(text)
    assert len(ids) > len(text)
    got = post(served, prompt=text, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    names, offsets = got["logprobs"]["tokens"], got["logprobs"]["text_offset"]
    assert got["text"] == text and offsets[0] == 0 and max(offsets) < len(text)
    assert offsets == sorted(offsets) and len(set(offsets)) == len(text)
    raw = b"".join(
        bytes.fromhex(n[6:].replace("\\x", "")) if n.startswith("bytes:") else n.encode()
        for n in names
    )
    assert raw == text.encode()


def test_logprobs_of_a_chat(model, client):
    want = model.chat(CHAT, max_new_tokens=8, logprobs=2)
    options = dict(model="small_model", messages=CHAT, max_tokens=8, temperature=0,
                   logprobs=True, top_logprobs=2)  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0].logprobs.content
    parts = [
        entry
        for chunk in client.chat.completions.create(stream=True, **options)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    for found in (whole, parts):
        assert [t.logprob for t in found] == [t.logprob for t in want.logprobs]
        assert [bytes(t.bytes) for t in found] == [
            model.tokenizer.token_bytes(i) for i in want.token_ids
        ]
        assert [[(o.token, o.logprob) for o in t.top_logprobs] for t in found] == [
            [(model.tokenizer.decode([i]), lp) for i, lp in t.top] for t in want.logprobs
        ]


# ---- chat --------------------------------------------------------------------------------


def test_a_chat_is_what_chat_says(model, client):
    want = model.chat(CHAT, max_new_tokens=200)
    options = dict(model="small_model", messages=CHAT, temperature=0, max_completion_tokens=200)
    got = client.chat.completions.create(**options)
    message = got.choices[0].message
    assert (message.role, message.content, message.tool_calls) == ("assistant", want.text, None)
    assert got.choices[0].finish_reason == want.finish_reason
    assert got.usage.prompt_tokens == len(want.prompt_token_ids)
    options |= dict(stream=True, stream_options={"include_usage": True})
    *chunks, last = client.chat.completions.create(**options)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == want.text
    assert chunks[-1].choices[0].finish_reason == want.finish_reason
    assert last.usage.completion_tokens == got.usage.completion_tokens == len(want.token_ids)


def test_messages_as_clients_send_them_back(model, client):
    answer = client.chat.completions.create(model="small_model", messages=CHAT, temperature=0,
                                            max_tokens=20).choices[0].message  # fmt: skip
    parts = [{"type": "text", "text": "And"}, {"type": "text", "text": " then?"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        *CHAT,
        answer.model_dump(),
        {"role": "user", "content": parts},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        *CHAT,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": "And then?"},
    ]
    got = client.chat.completions.create(model="small_model", messages=messages, max_tokens=10,
                                         temperature=0)  # fmt: skip
    assert got.choices[0].message.content == model.chat(plain, max_new_tokens=10).text


def test_a_begun_answer_goes_on(model, served):
    begun = [*CHAT, {"role": "assistant", "content": "Once upon"}]
    ids = model.tokenizer.apply_chat_template(begun, add_generation_prompt=False)[:-1]
    want = model.generate(ids, max_new_tokens=10).text
    got = post(served, "/v1/chat/completions", messages=begun, max_tokens=10, temperature=0,
               continue_final_message=True).json()  # fmt: skip
    assert got["choices"][0]["message"]["content"] == want
    closed = post(served, "/tokenize", messages=begun, add_generation_prompt=False).json()
    assert closed["tokens"][:-1] == ids


# ---- tools -------------------------------------------------------------------------------


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]
CALLS = (
    "Let me see. <|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
    '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_call_begin|>functions.add:1'
    '<|tool_call_argument_begin|>{"a": 22}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)


@pytest.fixture(scope="module")
def caller(model):
    """A server whose model calls a tool twice."""
    engine = servers.Scripted(model, model.tokenizer.encode(CALLS, allow_control=True))
    with servers.serving(model, engine=engine) as s:
        yield s
    engine.close()


def test_tool_calls(model, caller):
    ask = dict(model="small_model", messages=CHAT, tools=TOOLS, max_tokens=100)
    with client_of(caller) as client:
        choice = client.chat.completions.create(**ask).choices[0]
        chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **ask)]
    want = [("functions.add:0", "add", '{"a": 1}'), ("functions.add:1", "add", '{"a": 22}')]
    calls = choice.message.tool_calls
    assert [(c.id, c.function.name, c.function.arguments) for c in calls] == want
    assert choice.message.content == "Let me see. "
    assert choice.finish_reason == chunks[-1].finish_reason == "tool_calls"
    calls = [call for c in chunks for call in c.delta.tool_calls or ()]
    assert [(c.id, c.function.name, c.function.arguments) for c in calls] == want
    assert [c.index for c in calls] == [0, 1]
    assert "".join(c.delta.content or "" for c in chunks) == "Let me see. "
    prompt = model.tokenizer.apply_chat_template(CHAT, tools=TOOLS)
    assert caller.engine.prompts[-1] == caller.engine.prompts[-2] == prompt
    back = [*CHAT, choice.message.model_dump(),
            {"role": "tool", "tool_call_id": "functions.add:0", "content": "3"}]  # fmt: skip
    with client_of(caller) as client:
        client.chat.completions.create(**ask | {"messages": back})
    text = model.tokenizer.decode(caller.engine.prompts[-1])
    assert CALLS in text and "## Return of functions.add:0\n3<|im_end|>" in text


def test_calls_are_looked_for_where_tools_were_offered(model, caller):
    text = CALLS.removesuffix("<|im_end|>")
    for extra in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        choice = post(caller, "/v1/chat/completions", messages=CHAT, max_tokens=100, **extra)
        choice = choice.json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": text}
        assert choice["finish_reason"] == "stop"
        assert caller.engine.prompts[-1] == model.tokenizer.apply_chat_template(CHAT)


# ---- several at once ---------------------------------------------------------------------


def test_64_at_once_get_what_they_get_alone(model, served):
    async def ask_all():
        url = f"{served.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    async def ask(client, i):
        options = dict(model="small_model", prompt=f"{STORY} {i}", seed=i, max_tokens=4 + i % 9,
                       temperature=i % 3 / 2, extra_body={"ignore_eos": True})  # fmt: skip
        if i % 2:
            stream = await client.completions.create(stream=True, **options)
            return "".join([chunk.choices[0].text async for chunk in stream])
        return (await client.completions.create(**options)).choices[0].text

    got = asyncio.run(ask_all())
    want = [
        model.generate(f"{STORY} {i}", seed=i, max_new_tokens=4 + i % 9, temperature=i % 3 / 2,
                       ignore_eos=True).text
        for i in range(64)
    ]  # fmt: skip
    assert got == want
    assert served.idle()


def test_a_short_answer_does_not_wait_for_a_long_one(client):
    long = client.completions.create(model="small_model", prompt=STORY, stream=True, **LONG)
    next(iter(long))
    short = client.completions.create(model="small_model", prompt="x", max_tokens=1)
    assert short.usage.completion_tokens == 1
    rest = sum(1 for _ in long)
    assert rest > 100  # the long one was far from its end and has come there


# ---- the rest ----------------------------------------------------------------------------


def test_what_a_server_tells_of_itself(model, served, client):
    card = client.models.retrieve("small_model")
    assert (card.id, card.object, card.max_model_len) == ("small_model", "model", 512)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    ids = model.tokenizer.encode(STORY)
    got = post(served, "/tokenize", prompt=STORY).json()
    assert got == {"count": len(ids), "max_model_len": 512, "tokens": ids}
    assert post(served, "/detokenize", tokens=ids).json() == {"prompt": STORY}
    before = HTTP.get(f"{served.url}/metrics").text
    post(served, prompt=STORY, max_tokens=3, ignore_eos=True)
    streamed(served, prompt=STORY, max_tokens=4, ignore_eos=True)
    after = HTTP.get(f"{served.url}/metrics").text
    name = "kimi_linear_generated_tokens_total"
    assert count(after, name) - count(before, name) == 7
    assert count(after, 'kimi_linear_responses_total{status="200"}') >= 3


def count(page, name):
    return int(
        next(line for line in page.splitlines() if line.startswith(f"{name} ")).split()[1]
    )
