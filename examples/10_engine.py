"""An engine: requests that come at any time and run together, in threads and in an event loop."""

import asyncio

import kimi_linear as kl

BEGINNINGS = ["Once upon a time", "Lily found a box", "The dog ran to the lake", "One day, Tom"]


async def tell(engine, beginning, most):
    """A story as it is written, at most so many tokens."""
    request = engine.submit(beginning, temperature=0.7, seed=len(beginning), max_new_tokens=most)
    n = 0
    async for chunk in request:
        n += 1
        if n == 30:
            request.cancel()  # a reader who has had enough
    answer = await request
    print(f"{beginning}{answer.text}\n    ({n} tokens, {answer.finish_reason})")


async def tell_all(engine):
    await asyncio.gather(*(tell(engine, b, 15 * (i + 1)) for i, b in enumerate(BEGINNINGS)))


def main():
    with kl.load(device="cpu") as model, kl.Engine(model, max_waiting=100) as engine:
        background = engine.submit(BEGINNINGS[0], max_new_tokens=60)  # runs beside all below
        asyncio.run(tell_all(engine))
        for answer in engine.generate(BEGINNINGS, max_new_tokens=8):
            print(answer.text)
        print(background.result(timeout=60).text)
        print(engine.stats())


if __name__ == "__main__":
    main()
