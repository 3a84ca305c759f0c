"""Prompts in all their forms, brought to int32 arrays of token ids."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._files import check_text, quote

if TYPE_CHECKING:
    import numpy as np

    from .tokenizer import Tokenizer

GetTokenizer = Callable[[], "Tokenizer"]


def prompt_rows(
    prompt: Any, tokenizer: GetTokenizer, vocab_size: int, label: str = "prompt"
) -> "tuple[list[np.ndarray], bool]":
    """The rows of a prompt, and whether it is a batch.

    prompt: str, token ids or chat messages; or a list of any of them.
    Raises TypeError or ValueError naming the row.
    """
    if getattr(prompt, "ndim", None) == 2:
        prompt = list(prompt)
    if _is_row(prompt):
        return [row_ids(prompt, tokenizer, vocab_size, label)], False
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise TypeError(
            f"{label}: must be str, token ids, chat messages, or a list of such, "
            f"got {type(prompt).__name__}"
        )
    if not prompt:
        raise ValueError(f"{label}: must hold at least one token, it is empty")
    rows = [row_ids(row, tokenizer, vocab_size, f"{label}[{i}]") for i, row in enumerate(prompt)]
    return rows, True


def _is_row(prompt: Any) -> bool:
    """Whether this is one prompt; what a list holds is told by its first element."""
    if isinstance(prompt, str) or _is_array(prompt):
        return True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray) or not prompt:
        return False
    return _is_scalar(prompt[0]) or isinstance(prompt[0], Mapping)


def _is_array(value: Any) -> bool:
    return getattr(value, "ndim", None) == 1


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) or getattr(value, "ndim", None) == 0


def awaits_answer(prompt: Any) -> bool:
    """Whether these are messages whose last is not the assistant's."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    last = prompt[-1]
    return isinstance(last, Mapping) and last.get("role") != "assistant"


def answer_header(tokenizer: "Tokenizer") -> list[int]:
    """The ids that open the assistant's turn after messages."""
    message = [{"role": "user", "content": ""}]
    closed = tokenizer.apply_chat_template(message, add_generation_prompt=False)
    return tokenizer.apply_chat_template(message)[len(closed) :]


def row_ids(
    row: Any, tokenizer: GetTokenizer, vocab_size: int, label: str, *, answer: bool = True
) -> "np.ndarray":
    """int32 [T], T >= 1, of one prompt. answer: the assistant's turn is opened after messages."""
    if isinstance(row, str):
        check_text(row, label)
        ids: Any = tokenizer().encode(row)
    elif isinstance(row, Sequence) and len(row) and isinstance(row[0], Mapping):
        ids = _message_ids(row, tokenizer(), label, answer)
    else:
        ids = row
    array = _id_array(ids, label)
    if not len(array):
        raise ValueError(f"{label}: must hold at least one token, it is empty")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{label}: token ids must be in 0..{vocab_size - 1}, got {low if low < 0 else high}"
        )
    return array.astype("int32")


def _message_ids(
    messages: Any, tokenizer: "Tokenizer", label: str, answer: bool
) -> list[int] | str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=answer)
    except (TypeError, ValueError) as e:
        raise type(e)(f"{label}: {e}") from None


def _id_array(ids: Any, label: str) -> "np.ndarray":
    import numpy as np

    if _is_array(ids):
        array = np.asarray(ids)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{label}: token ids must be integers, got dtype {array.dtype}")
        return array
    if not isinstance(ids, list | tuple):
        raise TypeError(
            f"{label}: must be str, a list of token ids or a list of chat messages, "
            f"got {type(ids).__name__}"
        )
    plain = set(map(type, ids)) <= {int}  # a million of them take 20 ms
    for i, token_id in enumerate(() if plain else ids):
        if not _is_index(token_id):
            raise TypeError(f"{label}[{i}]: token ids must be integers, got {quote(token_id)}")
    try:
        return np.asarray(ids, np.int64)
    except OverflowError:
        raise ValueError(f"{label}: token ids must fit the vocabulary, one has over 63 bits") \
            from None  # fmt: skip


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
