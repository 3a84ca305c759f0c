"""lm-evaluation-harness: its tasks on a model of this package.

    kimi-linear-lm-eval run --model kimi_linear --model_args pretrained=DIR --tasks hellaswag

or, with a model at hand, `lm_eval.simple_evaluate(KimiLM(model=m), tasks=["hellaswag"])`.
lm-eval finds no models by entry points: the command registers this one and is lm-eval's then.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from .._files import quote
from ..model import load
from ._scoring import SAMPLING, answers, fit, fit_prompt, render, scores, tokenizer_name

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from ..model import Model

NEUTRAL = {"num_beams": 1, "early_stopping": False, "use_cache": True}  # what some tasks state


@register_model("kimi_linear")
class KimiLM(TemplateLM):
    """A model for lm-eval.

    model: a loaded one; or pretrained: what `kimi_linear.load` takes, a directory (None: the
    small model), with device, dtype, max_length (max_context), cache_bytes, kv_cache_dtype and
    batch_invariant as there. batch_size: sequences alive at once (max_batch). A device "cuda:0"
    and a batch_size of 1 are what lm-eval's command passes when it is told nothing, and leave the
    choice to `load`, as "auto" does. max_gen_toks: new tokens where a task says nothing.
    prefix_token_id: what a text without a context is scored after, by default [BOS].

    Texts become tokens as in lm-eval's `hf` model: names of control tokens are the tokens. A
    prompt that is too long loses tokens on its left, as there, and a warning says so.
    """

    def __init__(
        self,
        model: "Model | None" = None,
        pretrained: str | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        prefix_token_id: int | None = None,
        cache_bytes: int | None = None,
        kv_cache_dtype: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        self.model = model or load(
            pretrained,
            device="auto" if device in (None, "cuda:0") else device,
            dtype=dtype,
            max_context=max_length,
            max_batch=_max_batch(max_batch_size or batch_size),
            cache_bytes=cache_bytes,
            kv_cache_dtype=kv_cache_dtype,
            batch_invariant=batch_invariant,
        )
        self.max_length = min(max_length or (1 << 62), self.model.plan.max_context)
        self.max_gen_toks = max_gen_toks
        self._prefix_id = prefix_token_id
        self.batch_size = self.model.plan.max_batch

    # ---- tokens --------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.tokenizer.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is scored after."""
        for token_id in (self._prefix_id, self.model.tokenizer.bos_id):
            if token_id is not None:
                return token_id
        return self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return tokenizer_name(self.model.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; nothing is added to them."""
        return self.model.tokenizer.encode(string, allow_control=True)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return render(self.model.tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat format, as one conversation in it: there is one, and it is no Jinja."""
        roles = ("system", "user", "assistant")
        return self.apply_chat_template([{"role": r, "content": f"({r})"} for r in roles])

    # ---- likelihoods ---------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """requests: (texts, context, continuation); choices of one context read it once."""
        pairs = [fit((context, rest), self.max_length) for _, context, rest in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        bar = tqdm(scores(self.model, pairs), "loglikelihood", len(pairs), disable=disable_tqdm)
        for i, score in bar:
            found[i] = score
            self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return found

    def loglikelihood_rolling(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[float]:
        """Each token of a text given all before it, from `prefix_token_id` on; a text longer
        than max_length in windows, as lm-eval cuts them."""
        return [
            self._rolling(request)
            for request in tqdm(requests, "loglikelihood_rolling", disable=disable_tqdm)
        ]

    def _rolling(self, request: "Instance") -> float:
        ids, total = self.tok_encode(request.args[0]), 0.0
        if ids:
            found = self.model.rolling_logprobs(
                ids, prefix=self.prefix_token_id, window=self.max_length, progress=False
            )
            total = found.total  # type: ignore[union-attr]  # of one text
        self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return total

    # ---- answers -------------------------------------------------------------------------

    def generate_until(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[str]:
        """Answers, cut at the first of a request's stop strings."""
        texts = []
        asked = map(self._asked, requests)
        bar = tqdm(
            answers(self.model, asked), "generate_until", len(requests), disable=disable_tqdm
        )
        for request, completion in zip(requests, bar, strict=True):
            texts.append(completion.text)
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return texts

    def _asked(self, request: "Instance") -> tuple[Sequence[int], dict[str, Any]]:
        text, arguments = request.args
        sampling = self._sampling(arguments)
        ids = fit_prompt(self.tok_encode(text), sampling["max_new_tokens"], self.max_length)
        return ids, sampling

    def _sampling(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A task's generation_kwargs as arguments of `Model.generate`."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        sampling = {k: given.pop(k) for k in SAMPLING if given.get(k) is not None}
        sampling["max_new_tokens"] = given.pop("max_gen_toks")
        sampling["stop"] = [text for text in given.pop("until") if text]
        if not given.pop("do_sample"):
            sampling["temperature"] = 0.0
        unknown = [k for k, v in given.items() if k not in SAMPLING and NEUTRAL.get(k) != v]
        if unknown:
            raise ValueError(
                f"generation_kwargs: must be of until, max_gen_toks, do_sample, "
                f"{', '.join(SAMPLING)}, got {', '.join(unknown)}"
            )
        return sampling

    def get_model_info(self) -> dict[str, Any]:
        """What a results file says of the model."""
        return {
            "model_num_parameters": self.model.config.parameter_count(),
            "model_dtype": self.model.dtype,
            "model_kv_cache_dtype": self.model.kv_cache_dtype,
            "model_revision": "",
            "model_sha": self.model.fingerprint,
        }


def _max_batch(batch_size: int | str | None) -> int | None:
    """Sequences alive at once, None where `load` chooses: "auto", "auto:N", and lm-eval's 1."""
    text = str(batch_size)
    if text in ("None", "1") or text.startswith("auto"):
        return None
    if not text.isdecimal():
        raise ValueError(f"batch_size: must be a number or auto, got {quote(text)}")
    return int(text)
