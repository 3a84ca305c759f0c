"""Text to token ids and back: tiktoken's byte-pair encoding with Kimi's pattern and specials.

The vocabulary is ``tiktoken.model`` (one line a token: base64 of its bytes, a space, its rank),
followed by control tokens up to the model's vocab_size.
"""

import base64
import binascii
import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import chat
from ._files import check_text, quote, read_small, strict_json
from .errors import TokenizerError

if TYPE_CHECKING:
    import tiktoken

MAX_FILE = 1 << 26  # the published file has 2.8 MB
MAX_TOKENIZER_CONFIG = 1 << 24
MAX_PIECE = 400_000  # characters encoded at once
MAX_RUN = 25_000  # characters of one run of whitespace, or of anything else

# Pre-tokenisation, alternatives in order of preference. Han runs stand alone; words take one
# leading mark and an English contraction; `&&` is the intersection of classes.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{_LEAD}{_UPPER}*{_LOWER}+{_SUFFIX}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# Control tokens by their distance from the first id after the ranks.
_STANDARD = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>",
    6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>",
    17: "<|im_middle|>",
}  # fmt: skip
_STOPS = ("<|im_end|>", "[EOS]", "[EOT]")
STANDARD_CONTROLS = 256  # how many follow the ranks where nothing says otherwise


class Tokenizer:
    """Kimi's tokenizer.

    vocab_size: ids are 0 .. vocab_size - 1.
    control_tokens: name -> id of every control token.
    bos_id, eos_id: [BOS] and [EOS], or None where the vocabulary has none. Nothing adds them.
    stop_ids: what ends an answer: <|im_end|>, [EOS] and [EOT].
    """

    vocab_size: int
    control_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]

    def __init__(self, ranks: dict[bytes, int], control_tokens: dict[str, int]) -> None:
        """ranks: the tokens' bytes -> 0 .. n-1; control_tokens: names -> the ids that follow.

        Raises TokenizerError where the ids leave a gap or collide.
        """
        self.vocab_size = len(ranks) + len(control_tokens)
        if sorted(control_tokens.values()) != list(range(len(ranks), self.vocab_size)):
            raise TokenizerError(
                f"control tokens: ids must be {len(ranks)}..{self.vocab_size - 1}, each once"
            )
        self.control_tokens = dict(control_tokens)
        self.bos_id = control_tokens.get("[BOS]")
        self.eos_id = control_tokens.get("[EOS]")
        self.stop_ids = tuple(control_tokens[t] for t in _STOPS if t in control_tokens)
        self._ranks = ranks
        self._encoding = _make_encoding(ranks, self.control_tokens)
        by_length = sorted(control_tokens, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")

    @classmethod
    def from_dir(cls, path: str | Path, *, vocab_size: int | None = None) -> "Tokenizer":
        """Read ``tiktoken.model``, and ``tokenizer_config.json`` where there is one.

        vocab_size: of the model; by default from config.json there, else 256 past the ranks.
        Raises TokenizerError naming file, line and rule; FileNotFoundError without the file.
        """
        path = Path(path)
        ranks = read_ranks(path / "tiktoken.model")
        if vocab_size is None and (path / "config.json").exists():
            from .config import KimiLinearConfig

            vocab_size = KimiLinearConfig.from_dir(path).vocab_size
        if vocab_size is None:
            vocab_size = len(ranks) + STANDARD_CONTROLS
        if vocab_size < len(ranks):
            raise TokenizerError(
                f"{path / 'tiktoken.model'}: must have at most vocab_size ({vocab_size}) "
                f"tokens, found {len(ranks)}"
            )
        named = _named_controls(path / "tokenizer_config.json", len(ranks), vocab_size)
        return cls(ranks, {named[i]: i for i in range(len(ranks), vocab_size)})

    # ---- text ----------------------------------------------------------------------------

    def encode(self, text: str, *, allow_control: bool = False) -> list[int]:
        """Token ids of text.

        allow_control: turn the names of control tokens into their ids; by default they are
        encoded as the plain text that they are, so that no input can forge a turn.
        Raises TypeError for what is not str, ValueError for lone surrogates.
        """
        check_text(text, "text")
        if not allow_control:
            return self._encode_plain(text)
        ids: list[int] = []
        at = 0
        for match in self._control_pattern.finditer(text):
            ids += self._encode_plain(text[at : match.start()])
            ids.append(self.control_tokens[match[0]])
            at = match.end()
        return ids + self._encode_plain(text[at:])

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _parts(text):
            ids += self._encoding.encode_ordinary(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD. Control tokens show their
        names. Raises TypeError or ValueError for what is not an id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids, which may end inside a character."""
        if not isinstance(ids, Iterable):
            raise TypeError(f"ids: must be a list of token ids, got {quote(ids)}")
        is_array = getattr(ids, "ndim", 0) == 1
        ids = ids.tolist() if is_array else list(ids)  # type: ignore[attr-defined]
        plain = set(map(type, ids)) <= {int}
        if plain and ids and min(ids) >= 0 and max(ids) < self.vocab_size:
            return self._encoding.decode_bytes(ids)
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. Raises TypeError or ValueError for what is not an id."""
        token_id = check_id(token_id, self.vocab_size)
        return self._encoding.decode_single_token_bytes(token_id)

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for ids that come one by one."""
        return StreamDecoder(self)

    # ---- chat ----------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
    ) -> list[int] | str:
        """The prompt of a conversation: ids, or with tokenize=False the text they stand for.

        messages: dicts with role ("system", "user", "assistant", "tool") and content (str), and
        optionally name, tool_calls, tool_call_id. tools: JSON schemas of the functions offered.
        Raises ValueError or TypeError naming the message; TokenizerError where the vocabulary
        lacks a control token. The ids differ from encoding the text where a message contains
        the name of a control token: in the ids it stays text.
        """
        segments = chat.render(messages, tools, add_generation_prompt)
        if not tokenize:
            return "".join(text for _, text in segments)
        ids: list[int] = []
        for is_control, text in segments:
            ids += [self._control(text)] if is_control else self.encode(text)
        return ids

    def _control(self, name: str) -> int:
        if name not in self.control_tokens:
            raise TokenizerError(f"chat: the vocabulary must have {name}, it has not")
        return self.control_tokens[name]

    def parse_tool_calls(self, text: str) -> list[dict[str, Any]]:
        """The calls in an answer: dicts with id, type, function (name, arguments as text)."""
        return chat.parse_tool_calls(text)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, control={len(self.control_tokens)})"

    def __reduce__(self) -> tuple[Any, ...]:  # tiktoken's object does not copy
        return Tokenizer, (self._ranks, self.control_tokens)


class StreamDecoder:
    """Decodes ids as they come; joined, its pieces are `Tokenizer.decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: int | Iterable[int]) -> str:
        """Text that is certain after these ids; an incomplete character is held back."""
        one = type(ids) is int or not isinstance(ids, Iterable)  # the first is told faster
        decode = self._tokenizer.token_bytes if one else self._tokenizer.decode_bytes
        return self._decoder.decode(decode(ids))  # type: ignore[operator]

    def finish(self) -> str:
        """What was held back, as U+FFFD; the decoder can start again."""
        return self._decoder.decode(b"", final=True)


def check_id(value: Any, vocab_size: int, label: str = "token id") -> int:
    """A token id as int; raises TypeError for bool and float, ValueError out of range."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{label}: must be an integer, got {quote(value)}")
    value = value.__index__()
    if not 0 <= value < vocab_size:
        raise ValueError(f"{label}: must be in 0..{vocab_size - 1}, got {quote(value)}")
    return value


def _parts(text: str) -> Iterator[str]:
    """Cut text as the published tokenizer does: token identity depends on it."""
    for at in range(0, len(text), MAX_PIECE):
        piece = text[at : at + MAX_PIECE]
        if len(piece) <= MAX_RUN:
            yield piece
            continue
        begin = 0
        for run in re.finditer(r"\s+|\S+", piece):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield piece[begin:cut]
                begin = cut
        yield piece[begin:]


def _make_encoding(ranks: dict[bytes, int], controls: dict[str, int]) -> "tiktoken.Encoding":
    import tiktoken

    return tiktoken.Encoding(
        "kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=controls
    )


# ---- files -------------------------------------------------------------------------------


def read_ranks(file: Path) -> dict[bytes, int]:
    """The tokens of a ``tiktoken.model`` file: bytes -> rank.

    Stricter than tiktoken's own reader, which lets a duplicate overwrite a token. Raises
    TokenizerError naming the line.
    """
    lines = read_small(file, MAX_FILE, TokenizerError).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise TokenizerError(f"{file}: must hold tokens, it is empty")
    ranks: dict[bytes, int] = {}
    seen = bytearray(len(lines))
    for number, line in enumerate(lines, 1):
        try:
            token, rank = _parse_line(line, len(lines))
            if token in ranks:
                raise ValueError(
                    f"token {token!r} must appear once, has rank {ranks[token]} too"
                )
            if seen[rank]:
                raise ValueError(f"rank {rank} must be given once")
        except ValueError as e:
            raise TokenizerError(f"{file}: line {number}: {e}") from None
        ranks[token] = rank
        seen[rank] = 1
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{file}: every single byte must be a token, 0x{missing[0]:02x} is missing "
            f"({len(missing)} in all)"
        )
    return ranks


def _parse_line(line: bytes, n_lines: int) -> tuple[bytes, int]:
    if line.endswith(b"\r"):
        raise ValueError("lines must end in LF, found CRLF: the file was converted on its way")
    fields = line.split(b" ")
    if len(fields) != 2:
        raise ValueError(f"must be base64, one space, rank; found {quote(line)}")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as e:
        raise ValueError(f"must start with base64 ({e}), found {quote(fields[0])}") from None
    if not token:
        raise ValueError("a token must have at least one byte")
    digits = fields[1]
    if not digits.isdigit() or len(digits) > 10 or (digits[0:1] == b"0" and digits != b"0"):
        raise ValueError(f"rank must be a decimal integer, found {quote(digits)}")
    if int(digits) >= n_lines:
        raise ValueError(f"ranks must be 0..{n_lines - 1} once each, found {int(digits)}")
    return token, int(digits)


def _named_controls(file: Path, first: int, vocab_size: int) -> dict[int, str]:
    """Names of the ids first .. vocab_size-1: the file's, else the standard ones; the rest are
    reserved tokens."""
    added = _added_tokens(file)
    if added is None:
        return {i: name for name, i in standard_controls(first, vocab_size).items()}
    names = {i: _reserved(i) for i in range(first, vocab_size)}
    for token_id, name in added.items():
        if token_id not in names:
            raise TokenizerError(
                f"{file}: added_tokens_decoder: ids must be in {first}..{vocab_size - 1} "
                f"(after the tokens of tiktoken.model), found {token_id}"
            )
        names[token_id] = name
    if len(set(names.values())) != len(names):
        raise TokenizerError(f"{file}: added_tokens_decoder: names must differ")
    return names


def standard_controls(first: int, vocab_size: int) -> dict[str, int]:
    """Kimi's control tokens on the ids first .. vocab_size-1, as many as fit; [UNK] and [PAD]
    are the last two."""
    names = {i: _reserved(i) for i in range(first, vocab_size)}
    if vocab_size - first >= 2:
        names |= {vocab_size - 2: "[UNK]", vocab_size - 1: "[PAD]"}
    last = vocab_size - 2
    names |= {first + k: name for k, name in _STANDARD.items() if first + k < last}
    return {name: i for i, name in names.items()}


def _reserved(token_id: int) -> str:
    return f"<|reserved_token_{token_id}|>"


def _added_tokens(file: Path) -> dict[int, str] | None:
    """added_tokens_decoder of a tokenizer_config.json; None where there is none."""
    try:
        raw = read_small(file, MAX_TOKENIZER_CONFIG, TokenizerError)
    except FileNotFoundError:
        return None
    data = strict_json(raw, str(file), TokenizerError)
    added = data.get("added_tokens_decoder") if isinstance(data, dict) else None
    if added is None:
        return None
    if not isinstance(added, dict):
        raise TokenizerError(f"{file}: added_tokens_decoder: must be an object")
    found = {}
    for key, value in added.items():
        name = value.get("content") if isinstance(value, dict) else None
        if not key.isascii() or not key.isdigit() or len(key) > 10 or not name:
            raise TokenizerError(
                f"{file}: added_tokens_decoder: must map ids to objects with content, "
                f"found {quote(key)}: {quote(value)}"
            )
        if not isinstance(name, str):
            raise TokenizerError(f"{file}: added_tokens_decoder: content must be a string, "
                                 f"found {quote(name)}")  # fmt: skip
        found[int(key)] = name
    return found
