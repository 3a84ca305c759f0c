"""What `evals.run` asks of an engine and of a model, without either: answers of a function."""

from concurrent.futures import ThreadPoolExecutor


class Engine:
    """Has `model.answer(prompt, options)` called by a thread of its own, in order of submission."""

    def __init__(self, model):
        self.model = model
        self.pool = ThreadPoolExecutor(1)
        assert model.prefix_cache is True

    def submit(self, prompt, **options):
        self.model.asked(prompt, options)
        return self.pool.submit(self.model.answer, prompt, options)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.pool.shutdown(cancel_futures=True)


class Model:
    """A model to derive from, with an `answer`."""

    prefix_cache, kv_cache_dtype = False, "f32"

    def asked(self, prompt, options):
        """Called by `run`'s thread at each submission."""
