"""HELMET's own scripts (princeton-nlp/HELMET) on a model of this package.

    python -m kimi_linear.adapters.helmet HELMET/eval.py --config HELMET/configs/recall.yaml \\
        --model_name_or_path DIR

runs upstream's script as it is, with this module's class where it expects its HFModel.
"""

import runpy
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model import load

if TYPE_CHECKING:
    from ..model import Model
    from ..tokenizer import Tokenizer

SHOWN = 500  # tokens of a prompt's beginning and end that a result keeps, as upstream


class KimiModel:
    """A model as eval.py calls it: `prepare_inputs`, then `generate_batch`.

    model_name: a checkpoint directory; or model: a loaded one. max_length: tokens of a prompt
    and its answer, generation_max_length of those the answer's; a longer prompt loses the end of
    its context, upstream's rule. The rest as in upstream's LLM; options of its other models
    (torch_dtype, rope_theta) are ignored.
    """

    def __init__(
        self,
        model_name: str | None = None,
        *,
        model: "Model | None" = None,
        temperature: float = 0.9,
        top_p: float = 0.9,
        max_length: int = 32768,
        generation_max_length: int = 2048,
        generation_min_length: int = 0,
        do_sample: bool = True,
        stop_newline: bool = False,
        use_chat_template: bool = False,
        system_message: str | None = None,
        seed: int = 42,
        **_: Any,
    ) -> None:
        if generation_min_length:
            raise ValueError(f"generation_min_length: must be 0, got {generation_min_length}")
        if not 0 < generation_max_length < max_length:
            raise ValueError(
                f"generation_max_length: must be at least 1 and below max_length ({max_length}), "
                f"got {generation_max_length}"
            )
        self.model = model or load(model_name, max_context=max_length)
        self.tokenizer = self.model.tokenizer
        self.max_length, self.generation_max_length = max_length, generation_max_length
        self.use_chat_template, self.system_message = use_chat_template, system_message
        self._sampling = {
            "temperature": temperature if do_sample else 0.0,
            "top_p": top_p,
            "stop": ["\n"] if stop_newline else (),
            "seed": seed,
        }

    def prepare_inputs(self, test_item: dict[str, Any], data: Mapping[str, Any]) -> list[int]:
        """Token ids of a test item; `test_item["context"]` becomes what was left of it."""
        room = self.max_length - self.generation_max_length
        ids = self._ids(test_item, data)
        while (excess := len(ids) - room) > 0:  # again where the cut text took more tokens
            context = self.tokenizer.encode(test_item["context"])
            if excess >= len(context):
                raise ValueError(
                    f"max_length: the prompt must leave {self.generation_max_length} of "
                    f"{self.max_length} tokens free, without its context it has "
                    f"{len(ids) - len(context)}"
                )
            test_item["context"] = _decode_whole(self.tokenizer, context[:-excess])
            ids = self._ids(test_item, data)
        return ids

    def _ids(self, test_item: Mapping[str, Any], data: Mapping[str, Any]) -> list[int]:
        if not self.use_chat_template:
            return self.tokenizer.encode(data["prompt_template"].format(**test_item))
        return self._chat(data["user_template"].format(**test_item))

    def _chat(self, text: str) -> list[int]:
        system = [{"role": "system", "content": self.system_message}]
        messages = (system if self.system_message else []) + [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(messages)
        assert isinstance(ids, list)
        return ids

    def generate(
        self, inputs: list[int] | None = None, prompt: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """The answer to prepared inputs, or to a prompt."""
        return self.generate_batch(
            None if inputs is None else [inputs], None if prompt is None else [prompt]
        )[0]

    def generate_batch(
        self,
        inputs: Sequence[list[int]] | None = None,
        prompt: Sequence[str] | None = None,
        **_: Any,
    ) -> list[dict[str, Any]]:
        """Answers to all, each admitted to the batch as sequences and pages are free."""
        if inputs is None:
            to_ids = self._chat if self.use_chat_template else self.tokenizer.encode
            room = self.max_length - self.generation_max_length
            inputs = [to_ids(text)[-room:] for text in prompt or ()]
        completions = self.model.generate(
            inputs, max_new_tokens=self.generation_max_length, **self._sampling
        )
        return [
            {
                "output": completion.text,
                "input_len": len(ids),
                "output_len": len(completion.token_ids),
                "input_text": self._excerpt(ids),
            }
            for ids, completion in zip(inputs, completions, strict=True)
        ]

    def _excerpt(self, ids: Sequence[int]) -> str:
        if len(ids) <= 2 * SHOWN:
            return self.tokenizer.decode(ids)
        begin, end = (self.tokenizer.decode(x) for x in (ids[:SHOWN], ids[-SHOWN:]))
        return f"{begin} <skip> {end}"


def _decode_whole(tokenizer: "Tokenizer", ids: Sequence[int]) -> str:
    """The text of tokens that may end inside a character, without that one."""
    return tokenizer.decode_bytes(ids).decode("utf-8", errors="ignore")


def main(arguments: Sequence[str]) -> None:
    """Run eval.py, the first argument, with the others as its own."""
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).parent))
    import_module("model_utils").HFModel = KimiModel  # type: ignore[attr-defined]
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
