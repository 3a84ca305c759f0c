"""inspect-ai's provider on the small model: a scripted exchange through inspect's own Model."""

import asyncio
import math
import time

import pytest

REASON = "needs inspect-ai: pip install 'kimi_linear[inspect]'"
inspect_ai = pytest.importorskip("inspect_ai", reason=REASON)

import kimi_linear as kl  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    ChatMessageAssistant,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes  # noqa: E402
from inspect_ai.solver import generate, use_tools  # noqa: E402
from inspect_ai.tool import ToolFunction, tool  # noqa: E402
from kimi_linear.adapters import inspect_ai as adapter  # noqa: E402

PAIRS = "Remember these pairs: fox 17, owl 230, bear 4. What is the value of {}?"
STORY = "Tell me a story."
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    '{"x": 2, "y": 3}<|tool_call_end|><|tool_calls_section_end|>'
)


@pytest.fixture(scope="module")
def small():
    with kl.load(device="cpu", max_context=1024, max_batch=16) as m:
        yield m


@pytest.fixture
def model(small):
    found = get_model("kimi_linear/small", loaded=small, memoize=False)
    yield found
    found.api.close()


def ask(model, prompt, **config):
    options = {k: config.pop(k) for k in ("tools", "tool_choice", "on_stream") if k in config}
    return asyncio.run(model.generate(prompt, config=GenerateConfig(**config), **options))


@tool
def add():
    async def execute(x: int, y: int):
        """Add two numbers.

        Args:
            x: The first.
            y: The second.
        """
        return str(x + y)

    return execute


def says(monkeypatch, model, *answers):
    """Make the model give these answers, one after the other."""
    tokenizer, submit, left = model.api.model.tokenizer, model.api.engine.submit, list(answers)

    def scripted(ids, **sampling):
        answer = tokenizer.encode(left.pop(0), allow_control=True) + [tokenizer.stop_ids[0]]

        def only(seen, logits):
            logits[:] = -math.inf
            logits[answer[len(seen) - len(ids)]] = 0.0

        scripted.prompts.append(ids)
        return submit(ids, **sampling, logits_processor=only)

    scripted.prompts = []
    monkeypatch.setattr(model.api.engine, "submit", scripted)
    return scripted.prompts


def test_an_answer(small, model):
    output = ask(model, PAIRS.format("owl"))
    assert (output.completion, output.stop_reason, output.model) == ("230", "stop", "small")
    ids = small.tokenizer.apply_chat_template(
        [{"role": "user", "content": PAIRS.format("owl")}]
    )
    assert output.usage.output_tokens == len(small.generate(ids).token_ids)
    read = output.usage.input_tokens + output.usage.input_tokens_cache_read
    assert read == len(ids) and output.usage.total_tokens == read + output.usage.output_tokens


def test_stops_lengths_and_seeds(small, model):
    whole = small.chat([{"role": "user", "content": STORY}], max_new_tokens=60).text
    cut = ask(model, STORY, stop_seqs=["."], max_tokens=60)
    assert (cut.completion, cut.stop_reason) == (whole.partition(".")[0], "stop")
    short = ask(model, STORY, max_tokens=5)
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 5)
    assert ask(model, STORY, max_tokens=0).usage.output_tokens == 0
    long = ask(model, "a " * 2000, max_tokens=5)
    assert long.stop_reason == "model_length" and "max_context is 1024" in long.completion
    drawn = [
        ask(model, STORY, temperature=0.9, top_k=50, top_p=0.95, seed=4, max_tokens=20)
        for _ in range(2)
    ]
    assert drawn[0].completion == drawn[1].completion != whole[:20]
    several = ask(model, STORY, temperature=0.9, seed=4, max_tokens=20, num_choices=3)
    assert len({choice.message.text for choice in several.choices}) == 3


def test_logprobs(small, model):
    output = ask(model, STORY, logprobs=True, top_logprobs=3, max_tokens=8)
    ids = small.tokenizer.apply_chat_template([{"role": "user", "content": STORY}])
    want = small.generate(ids, max_new_tokens=8, logprobs=3).logprobs
    got = output.choices[0].logprobs.content
    assert [token.logprob for token in got] == [token.logprob for token in want]
    assert all(token.top_logprobs[0].token == token.token for token in got)  # greedy
    assert b"".join(bytes(token.bytes) for token in got).decode() == output.completion
    assert ask(model, STORY, max_tokens=2).choices[0].logprobs is None


def test_streaming(monkeypatch, model):
    events = []

    async def on_stream(event):
        events.append(event)

    output = ask(model, STORY, max_tokens=30, on_stream=on_stream)
    assert len(events) > 5
    assert "".join(event.text for event in events) == output.completion
    monkeypatch.setattr(adapter, "stream", None)
    events.clear()
    assert ask(model, STORY, max_tokens=30, on_stream=on_stream) and not events


def test_tools(monkeypatch, small, model):
    prompts = says(monkeypatch, model, "I add. " + CALL, "The sum is 5.")
    events = []

    async def on_stream(event):
        events.append(event)

    first = ask(model, "2 + 3?", tools=[add()], on_stream=on_stream)
    (call,) = first.message.tool_calls
    assert (call.function, call.arguments, call.id) == (
        "add",
        {"x": 2, "y": 3},
        "functions.add:0",
    )
    assert (first.stop_reason, first.message.text) == ("tool_calls", "I add. ")
    assert "".join(e.text for e in events if e.type == "text") == "I add. "
    assert [(e.function, e.arguments) for e in events if e.type == "tool_call"] == [
        ("add", '{"x": 2, "y": 3}')
    ]
    answer = ChatMessageTool(content="5", tool_call_id=call.id, function="add")
    second = ask(
        model, [ChatMessageUser(content="2 + 3?"), first.message, answer], tools=[add()]
    )
    assert (second.completion, second.stop_reason) == ("The sum is 5.", "stop")
    text = small.tokenizer.decode(prompts[1])
    assert text.startswith("<|im_system|>tool_declare<|im_middle|>") and '"name":"add"' in text
    assert CALL in text and "## Return of functions.add:0\n5<|im_end|>" in text


def test_a_tool_that_must_be_called_is_begun(monkeypatch, small, model):
    begun, _, rest = CALL.partition('{"x"')
    prompts = says(monkeypatch, model, '{"x"' + rest, "add:0" + CALL.partition("add:0")[2])
    for choice in (ToolFunction("add"), "any"):
        output = ask(model, "2 + 3?", tools=[add()], tool_choice=choice)
        assert output.message.tool_calls[0].arguments == {"x": 2, "y": 3}
        assert output.message.text == ""
    assert small.tokenizer.decode(prompts[0]).endswith(begun)
    assert small.tokenizer.decode(prompts[1]).endswith("<|tool_call_begin|>functions.")


def test_arguments_that_are_no_json(monkeypatch, model):
    says(monkeypatch, model, CALL.replace('"x": 2', "x"))
    (call,) = ask(model, "2 + 3?", tools=[add()]).message.tool_calls
    assert call.function == "add" and "arguments of add" in call.parse_error


@pytest.mark.parametrize("streams", [False, True])
def test_cancelling(monkeypatch, model, streams):
    says(monkeypatch, model, "and then " * 400)

    async def on_stream(event):
        pass

    async def main():
        config = GenerateConfig(max_tokens=900)
        task = asyncio.create_task(
            model.generate(STORY, config=config, on_stream=on_stream if streams else None)
        )
        while not model.api.engine.stats().new_tokens:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while model.api.engine.stats().running:
            await asyncio.sleep(0.01)
        return model.api.engine.stats().new_tokens

    assert asyncio.run(main()) < 700
    monkeypatch.undo()
    assert ask(model, PAIRS.format("bear")).completion == "4"


def test_64_at_once(small, model):
    names = [("fox", "17"), ("owl", "230"), ("bear", "4")]
    asked = [f"{i}. " + PAIRS.format(names[i % 3][0]) for i in range(64)]

    async def main():
        config = GenerateConfig(max_connections=64, max_tokens=16)
        return await asyncio.gather(*(model.generate(q, config=config) for q in asked))

    start = time.perf_counter()
    outputs = asyncio.run(main())
    seconds = time.perf_counter() - start
    want = small.generate([[{"role": "user", "content": q}] for q in asked], max_new_tokens=16)
    assert [o.completion for o in outputs] == [c.text for c in want]
    assert sum(o.completion == names[i % 3][1] for i, o in enumerate(outputs)) >= 60
    print(f"64 at once: {seconds:.2f} s")


def test_what_cannot_be_honoured_is_refused(model):
    with pytest.raises(ValueError, match="config: presence_penalty: this package"):
        ask(model, STORY, presence_penalty=0.5)
    with pytest.raises(ValueError, match="messages: must be of text, got image"):
        ask(
            model, [ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AA==")])]
        )


def test_an_evaluation_with_tools(monkeypatch, model, tmp_path):
    answers = ["I add. " + CALL, "The sum is 5."] * 3
    prompts = says(monkeypatch, model, *answers)
    task = inspect_ai.Task(
        dataset=[Sample(input="2 + 3?", target="5") for _ in range(3)],
        solver=[use_tools(add()), generate()],
        scorer=includes(),
    )
    (log,) = inspect_ai.eval(
        task, model=model, log_dir=str(tmp_path), display="none", max_samples=1
    )
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 1
    assert len(prompts) == 6
    assert isinstance(log.samples[0].messages[1], ChatMessageAssistant)
