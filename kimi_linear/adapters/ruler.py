"""RULER's own scripts (NVIDIA/RULER, scripts/pred) on a model of this package.

    python -m kimi_linear.adapters.ruler RULER/scripts/pred/call_api.py \\
        --server_type hf --model_name_or_path DIR --data_dir ... --save_dir ... --task niah_single_1

runs upstream's script as it is, with this module's class where it expects its HuggingFaceModel.
`KimiModel` alone is what a copy of call_api.py with a server type of its own would make.
"""

import json
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..model import load

if TYPE_CHECKING:
    from ..model import Model


class KimiModel:
    """A model as call_api.py calls it: `process_batch(prompts=[...])` -> [{"text": [answer]}].

    name_or_path: a checkpoint directory; or model: a loaded one. The rest are what upstream hands
    to HuggingFaceModel: do_sample, temperature, top_k, top_p, repetition_penalty, stop,
    max_new_tokens. A prompt is plain text, in which names of control tokens are the tokens:
    upstream's templates for chat models write them.
    """

    def __init__(
        self,
        name_or_path: str | None = None,
        *,
        model: "Model | None" = None,
        do_sample: bool = False,
        temperature: float = 0.0,
        stop: Sequence[str] | None = None,
        **sampling: Any,
    ) -> None:
        self.model = model or load(name_or_path)
        self._sampling = {"temperature": temperature if do_sample else 0.0, **sampling}
        self._sampling["stop"] = stop or ()

    def __call__(self, prompt: str, **_: Any) -> dict[str, list[str]]:
        return self.process_batch([prompt])[0]

    def process_batch(self, prompts: list[str], **_: Any) -> list[dict[str, list[str]]]:
        """Answers to all prompts, in one batch."""
        ids = [self.model.tokenizer.encode(p, allow_control=True) for p in prompts]
        completions = self.model.generate(ids, **self._sampling)
        return [{"text": [c.text]} for c in completions]


def main(arguments: Sequence[str]) -> None:
    """Run call_api.py, the first argument, with the others as its own."""
    wrappers = ModuleType("model_wrappers")
    wrappers.HuggingFaceModel = KimiModel  # type: ignore[attr-defined]
    sys.modules["model_wrappers"] = wrappers
    if find_spec("nemo") is None:
        _stand_in_for_nemo()
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def _stand_in_for_nemo() -> None:
    """All that call_api.py takes of NeMo is a reader of JSON lines."""
    name = "nemo"
    for part in ("", ".collections", ".asr", ".parts", ".utils", ".manifest_utils"):
        name += part
        sys.modules[name] = module = ModuleType(name)
    module.read_manifest = _read_manifest  # type: ignore[attr-defined]


def _read_manifest(path: str | Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main(sys.argv[1:])
