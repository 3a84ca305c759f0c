"""lighteval: its tasks on a model of this package, as a "custom model file".

    lighteval custom DIR FILE TASKS

FILE is this one: python -c "import kimi_linear.adapters.lighteval as m; print(m.__file__)".
The model's name is a checkpoint directory ("small": the model inside the package), with what
`kimi_linear.load` takes after a question mark: "DIR?device=cuda&dtype=int8&max_context=32768".
Switches are 0 or 1. `chat=0` asks in plain text; by default questions go in the chat format,
lighteval's rule for models that have one.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from lighteval.models.abstract_model import LightevalModel, ModelConfig
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.prompt_manager import PromptManager

from kimi_linear._files import quote
from kimi_linear.adapters._scoring import SAMPLING, answers, fit, fit_prompt, scores
from kimi_linear.model import load

if TYPE_CHECKING:
    from lighteval.tasks.requests import Doc

    from kimi_linear.model import Model
    from kimi_linear.tokenizer import Tokenizer

NUMBERS = ("max_context", "max_batch", "cache_bytes")
SWITCHES = ("chat", "batch_invariant")


class KimiModel(LightevalModel):
    """A model for lighteval; config: its CustomModelConfig, of which model_name,
    generation_parameters and system_prompt are used. model: a loaded one in place of the name,
    which stays open.

    Answers are not kept in lighteval's cache: it knows a model by its name alone, and makes its
    folder inside the checkpoint's where that name is a path from the root.
    """

    def __init__(self, config: ModelConfig, model: "Model | None" = None) -> None:
        self.config = config
        path, _, query = config.model_name.partition("?")
        given = parse_qsl(query, strict_parsing=bool(query))
        options = {name: _option(name, text) for name, text in given}
        self.use_chat_template = options.pop("chat", True)
        self._owned = None
        if model is None:
            model = self._owned = load(None if path == "small" else path, **options)
        self.model = model
        self._cache = SimpleNamespace(_init_registry=lambda _: None)  # the pipeline calls it
        self._given = config.generation_parameters.model_dump(exclude_none=True)
        self.prompt_manager = PromptManager(
            self.use_chat_template, self.tokenizer, config.system_prompt
        )

    @property
    def tokenizer(self) -> "Tokenizer":
        return self.model.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        return False

    @property
    def max_length(self) -> int:
        return self.model.plan.max_context

    def cleanup(self) -> None:
        if self._owned is not None:
            self._owned.close()

    def tok_encode(
        self, str_to_encode: str, add_special_tokens: bool | None = None
    ) -> list[int]:
        """Token ids; prompts in the chat format are text with the names of control tokens."""
        return self.tokenizer.encode(str_to_encode, allow_control=self.use_chat_template)

    def greedy_until(self, docs: "list[Doc]") -> list[ModelResponse]:
        """Answers, num_samples of each document."""
        asked = [(self._prompt(doc), self._sampling(doc)) for doc in docs]
        rows = [i for i, doc in enumerate(docs) for _ in range(doc.num_samples)]
        responses = [ModelResponse(input_tokens=ids) for ids, _ in asked]
        for i, completion in zip(
            rows, answers(self.model, (asked[i] for i in rows)), strict=True
        ):
            responses[i].text.append(completion.text)
            responses[i].output_tokens.append(completion.token_ids)
        return responses

    def _prompt(self, doc: "Doc") -> list[int]:
        ids = self.tok_encode(self.prompt_manager.prepare_prompt(doc))
        return list(fit_prompt(ids, self._sampling(doc)["max_new_tokens"], self.max_length))

    def _sampling(self, doc: "Doc") -> dict[str, Any]:
        """lighteval's parameters and a document's as arguments of `Model.generate`."""
        given = dict(self._given)
        sampling = {k: given.pop(k) for k in SAMPLING if k in given}
        stop = given.pop("stop_tokens", None)
        new = given.pop("max_new_tokens", None) or doc.generation_size or 256
        if given:
            raise ValueError(
                f"generation_parameters: must be of max_new_tokens, stop_tokens, "
                f"{', '.join(SAMPLING)}, got {', '.join(given)}"
            )
        own = [] if self.use_chat_template else doc.stop_sequences or []
        return sampling | {"max_new_tokens": new, "stop": [s for s in stop or own if s]}

    def loglikelihood(self, docs: "list[Doc]") -> list[ModelResponse]:
        """Scores of each document's choices, which read its prompt once."""
        responses, pairs, owners = [], [], []
        for doc in docs:
            prompt = self.prompt_manager.prepare_prompt(doc)
            contexts, choices = self.tok_encode_pair(prompt, doc.choices)
            responses.append(ModelResponse(input=prompt, output_tokens=choices))
            pairs += [
                fit(pair, self.max_length) for pair in zip(contexts, choices, strict=True)
            ]
            owners += [responses[-1]] * len(choices)
        found = dict(scores(self.model, pairs))
        for i, owner in enumerate(owners):
            logprob, is_greedy = found[i]
            owner.logprobs.append(logprob)
            owner.argmax_logits_eq_gold.append(is_greedy)
        return responses

    def loglikelihood_rolling(self, docs: "list[Doc]") -> list[ModelResponse]:
        """log p of each document's text as a whole, after [BOS]."""
        texts = [self.tok_encode(self.prompt_manager.prepare_prompt(doc)) for doc in docs]
        found = self.model.rolling_logprobs(texts, progress=False)
        assert isinstance(found, list)
        return [
            ModelResponse(logprobs=[total.total], output_tokens=[ids])
            for total, ids in zip(found, texts, strict=True)
        ]


def _option(name: str, text: str) -> Any:
    """What a text after the question mark is for `load`, which checks the rest."""
    if name in SWITCHES:
        if text not in ("0", "1"):
            raise ValueError(f"{name}: must be 0 or 1, got {quote(text)}")
        return text == "1"
    if name not in NUMBERS:
        return text
    if not text.isdecimal():
        raise ValueError(f"{name}: must be an integer, got {quote(text)}")
    return int(text)
