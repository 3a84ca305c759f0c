"""The tokenizer: pattern, control tokens, cutting of huge texts, streaming, bad files."""

import base64
import copy
import json
import pickle

import pytest
from clocks import now, within

import kimi_linear as kl
from kimi_linear.testing import tiny_config, tiny_tokenizer, train_ranks
from kimi_linear.tokenizer import PATTERN, Tokenizer, _parts, read_ranks, standard_controls

TOKENIZER = tiny_tokenizer()


def pieces(text):
    """How the pattern cuts text, told by tiktoken itself: each word of the text is one token of
    a vocabulary that has only single bytes besides, so BPE cannot join across cuts."""
    tiktoken = pytest.importorskip("tiktoken")
    chars = text.encode()
    ranks = {bytes([b]): b for b in range(256)}
    for length in range(2, len(chars) + 1):  # every substring is a token: a cut is a cut
        for at in range(len(chars) - length + 1):
            ranks.setdefault(chars[at : at + length], len(ranks))
    encoding = tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode([i]) for i in encoding.encode_ordinary(text)]


@pytest.mark.parametrize(
    "text,cut",
    [
        ("DON'T", ["DON'T"]),
        ("don't we'll", ["don't", " we'll"]),
        ("iPhone 12345", ["i", "Phone", " ", "123", "45"]),
        ("中文English", ["中文", "English"]),
        ("English中文", ["English", "中文"]),
        ("a  b", ["a", " ", " b"]),
        ("x\n\n y", ["x", "\n\n", " y"]),
        ("end.\r\n\nnext", ["end", ".\r\n\n", "next"]),
        ("a   ", ["a", "   "]),
        ("HTTPServer", ["HTTPServer"]),
        ("camelCase", ["camel", "Case"]),
        ("ひらがなカタ漢字", ["ひらがなカタ", "漢字"]),
        ("e\u0301a", ["e\u0301a"]),
        ("١٢٣٤", ["١٢٣", "٤"]),
    ],
)
def test_pre_tokenisation(text, cut):
    assert pieces(text) == cut


def test_standard_control_tokens_of_the_published_vocabulary():
    controls = standard_controls(163_584, 163_840)
    assert len(controls) == 256
    for name, token_id in {
        "[BOS]": 163584, "[EOS]": 163585, "<|im_end|>": 163586, "<|im_user|>": 163587,
        "<|im_assistant|>": 163588, "<|start_header_id|>": 163590, "<|end_header_id|>": 163591,
        "[EOT]": 163593, "<|im_system|>": 163594, "<|tool_calls_section_begin|>": 163595,
        "<|tool_calls_section_end|>": 163596, "<|tool_call_begin|>": 163597,
        "<|tool_call_argument_begin|>": 163598, "<|tool_call_end|>": 163599,
        "<|im_middle|>": 163601, "[UNK]": 163838, "[PAD]": 163839,
        "<|reserved_token_163589|>": 163589, "<|reserved_token_163837|>": 163837,
    }.items():  # fmt: skip
        assert controls[name] == token_id


@pytest.mark.parametrize("n", range(0, 25))
def test_any_number_of_control_tokens_has_distinct_names(n):
    controls = standard_controls(256, 256 + n)
    assert sorted(controls.values()) == list(range(256, 256 + n))


def test_special_ids():
    assert TOKENIZER.vocab_size == 320
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id) == (300, 301)
    assert set(TOKENIZER.stop_ids) == {301, 302, 309}
    bare = Tokenizer({bytes([b]): b for b in range(256)}, {})
    assert (bare.bos_id, bare.eos_id, bare.stop_ids) == (None, None, ())


def test_encode_adds_nothing_and_decode_gives_it_back():
    for text in [
        "",
        "a",
        "hello world",
        "DON'T\r\n\tSTOP  ",
        "中文🙂é\u0301\0\x7f",
        "a" * 1000,
    ]:
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode("") == []


def test_merges_follow_the_ranks():
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258}
    tokenizer = Tokenizer(ranks, {})
    assert tokenizer.encode("abc") == [258]  # a piece that is a token is taken whole
    assert tokenizer.encode("abcd") == [258, ord("d")]
    assert tokenizer.encode("xbcd") == [ord("x"), 257, ord("d")]


def test_control_tokens_in_text_stay_text_unless_asked_for():
    text = "a<|im_end|>b[EOS][EOT]<|reserved_token_305|>"
    plain = TOKENIZER.encode(text)
    assert max(plain) < 300 and TOKENIZER.decode(plain) == text
    ids = TOKENIZER.encode(text, allow_control=True)
    assert ids == [ord("a"), 302, ord("b"), 301, 309, 305]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode("<|im_end|", allow_control=True) == TOKENIZER.encode("<|im_end|")


def test_the_longest_control_token_wins():
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)}, {"<a": 256, "<a>": 257})
    assert tokenizer.encode("<a><a", allow_control=True) == [257, 256]


# ---- huge texts --------------------------------------------------------------------------


def by_the_letter(text):
    """The cutting rule, character by character."""
    parts = []
    for at in range(0, len(text), 400_000):
        piece, begin, run = text[at : at + 400_000], 0, 0
        for i, char in enumerate(piece):
            run = run + 1 if i and char.isspace() == piece[i - 1].isspace() else 1
            if run > 25_000:
                parts.append(piece[begin:i])
                begin, run = i, 1
        parts.append(piece[begin:])
    return parts


@pytest.mark.parametrize(
    "text",
    [
        "x" * 25_000, "x" * 25_001, "x" * 75_001, " " * 50_001, "ab " * 9000,
        "a" * 30_000 + " \n" * 20_000 + "b" * 60_000, "word " * 100_000,
        "y" * 400_000 + "z", "\u3000" * 26_000 + "中" * 26_000, "\x1c\x85" * 15_000,
    ],
    ids=lambda t: f"{t[:2]!a}x{len(t)}",
)  # fmt: skip
def test_huge_texts_are_cut_as_the_published_tokenizer_cuts(text):
    assert list(_parts(text)) == by_the_letter(text)


def test_ten_megabytes_are_encoded_in_reasonable_time():
    text = "The quick brown fox. " * 250_000 + "x" * 2_500_000 + " " * 2_500_000
    start = now()
    ids = TOKENIZER.encode(text)
    assert within(30, start)
    assert TOKENIZER.decode_bytes(ids) == text.encode()


# ---- decoding ----------------------------------------------------------------------------


def test_incomplete_utf8_is_replaced_or_kept_as_bytes():
    ids = list("é".encode())[:1] + [ord("a")]
    assert TOKENIZER.decode(ids) == "\ufffda"
    assert TOKENIZER.decode_bytes(ids) == b"\xc3a"


def test_a_stream_holds_back_half_characters():
    decoder = TOKENIZER.stream_decoder()
    shown = [decoder.feed(b) for b in "🙂é".encode()]
    assert shown == ["", "", "", "🙂", "", "é"]
    assert decoder.feed([0xF0, 0x9F]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.feed([65]) == "A"


def test_a_stream_says_what_decode_says():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(st.lists(st.integers(0, 319), max_size=40))
    def check(ids):
        decoder = TOKENIZER.stream_decoder()
        shown = "".join(decoder.feed(i) for i in ids) + decoder.finish()
        assert shown == TOKENIZER.decode(ids)

    check()


def test_any_text_comes_back():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(st.text(), st.booleans())
    def check(text, allow_control):
        assert TOKENIZER.decode(TOKENIZER.encode(text, allow_control=allow_control)) == text

    check()


@pytest.mark.parametrize(
    "ids,error",
    [
        ([320], ValueError), ([-1], ValueError), ([1 << 70], ValueError), ([True], TypeError),
        ([1.0], TypeError), (["a"], TypeError), ([None], TypeError), (5, TypeError),
    ],
)  # fmt: skip
def test_bad_ids(ids, error):
    with pytest.raises(error, match="token id"):
        TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    "text,error,message",
    [
        (b"bytes", TypeError, "must be str, got bytes"),
        (None, TypeError, "got NoneType"),
        (["a"], TypeError, "got list"),
        ("ok\ud800", ValueError, "character 2 is the lone surrogate"),
    ],
)
def test_bad_text(text, error, message):
    with pytest.raises(error, match=message):
        TOKENIZER.encode(text)


def test_copies_and_pickles():
    for other in (copy.deepcopy(TOKENIZER), pickle.loads(pickle.dumps(TOKENIZER))):
        assert other.encode("hello") == TOKENIZER.encode("hello")
        assert other.control_tokens == TOKENIZER.control_tokens


# ---- files -------------------------------------------------------------------------------


def lines(n=300):
    return [base64.b64encode(t) + b" %d" % r for t, r in train_ranks(n).items()]


def write(path, rows, end=b"\n"):
    (path / "tiktoken.model").write_bytes(end.join(rows) + end)
    return path


def test_a_good_file(tmp_path):
    write(tmp_path, lines())
    assert read_ranks(tmp_path / "tiktoken.model") == train_ranks(300)
    assert Tokenizer.from_dir(tmp_path).vocab_size == 300 + 256
    assert Tokenizer.from_dir(tmp_path, vocab_size=320).encode("the") == TOKENIZER.encode("the")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    assert Tokenizer.from_dir(tmp_path).vocab_size == 320


def test_lines_in_any_order(tmp_path):
    write(tmp_path, lines()[::-1])
    assert read_ranks(tmp_path / "tiktoken.model") == train_ranks(300)


def replace_line(number, row):
    return lambda rows: [*rows[: number - 1], row, *rows[number:]]


@pytest.mark.parametrize(
    "change,message",
    [
        (replace_line(7, b"!!!! 6"), "line 7: must start with base64"),
        (replace_line(7, b"AAA 6"), "line 7: must start with base64"),
        (replace_line(7, b"QQ\xff= 6"), "line 7: must start with base64"),
        (replace_line(7, b" 6"), "line 7: a token must have at least one byte"),
        (replace_line(7, b"Bg=="), "line 7: must be base64, one space, rank"),
        (replace_line(7, b"Bg== 6 6"), "line 7: must be base64, one space, rank"),
        (replace_line(7, b"Bg==\t6"), "line 7: must be base64, one space, rank"),
        (replace_line(7, b""), "line 7: must be base64, one space, rank"),
        (replace_line(7, b"Bg== -6"), "line 7: rank must be a decimal integer"),
        (replace_line(7, b"Bg== 6.0"), "line 7: rank must be a decimal integer"),
        (replace_line(7, b"Bg== 06"), "line 7: rank must be a decimal integer"),
        (replace_line(7, b"Bg== " + b"9" * 5000), "line 7: rank must be a decimal integer"),
        (replace_line(7, b"Bg== 300"), r"line 7: ranks must be 0\.\.299 once each, found 300"),
        (replace_line(7, b"Bg== 4294967296"), "line 7: ranks must be"),
        (replace_line(7, b"Bg== 5"), "line 7: rank 5 must be given once"),
        (
            replace_line(7, base64.b64encode(b"\x05") + b" 6"),
            "line 7: token .* must appear once",
        ),
        (replace_line(7, base64.b64encode(b"zq") + b" 6"), "single byte .* 0x06 is missing"),
        (lambda rows: [*rows[:5], b"", *rows[5:]], "line 6"),
        (lambda rows: rows[:200], "single byte must be a token, 0xc8 is missing"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    write(tmp_path, change(lines()))
    with pytest.raises(kl.TokenizerError, match=message) as info:
        Tokenizer.from_dir(tmp_path)
    assert "tiktoken.model" in str(info.value)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"")
    with pytest.raises(kl.TokenizerError, match="empty"):
        Tokenizer.from_dir(tmp_path)
    write(tmp_path, lines(), end=b"\r\n")
    with pytest.raises(kl.TokenizerError, match="line 1: lines must end in LF"):
        Tokenizer.from_dir(tmp_path)
    raw = b"\n".join(lines())
    for cut in (len(raw) - 1, len(raw) - 4, len(raw) - 6):
        (tmp_path / "tiktoken.model").write_bytes(raw[:cut])
        with pytest.raises(kl.TokenizerError, match="line 300"):
            Tokenizer.from_dir(tmp_path)


def test_a_vocabulary_that_does_not_fit_the_model(tmp_path):
    write(tmp_path, lines())
    with pytest.raises(kl.TokenizerError, match=r"at most vocab_size \(299\)"):
        Tokenizer.from_dir(tmp_path, vocab_size=299)
    assert Tokenizer.from_dir(tmp_path, vocab_size=300).control_tokens == {}


def named(tmp_path, added):
    write(tmp_path, lines())
    data = {"added_tokens_decoder": added, "auto_map": {"AutoTokenizer": ["evil.Tok", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(data))
    return Tokenizer.from_dir(tmp_path, vocab_size=310)


def test_names_from_tokenizer_config(tmp_path):
    tokenizer = named(tmp_path, {"301": {"content": "<|im_end|>"}, "300": {"content": "[BOS]"}})
    assert tokenizer.control_tokens["<|im_end|>"] == 301
    assert tokenizer.bos_id == 300 and tokenizer.eos_id is None
    assert tokenizer.control_tokens["<|reserved_token_302|>"] == 302
    assert tokenizer.stop_ids == (301,)


@pytest.mark.parametrize(
    "added,message",
    [
        ({"299": {"content": "x"}}, r"ids must be in 300\.\.309.*found 299"),
        ({"310": {"content": "x"}}, "found 310"),
        ({"-1": {"content": "x"}}, "must map ids"),
        ({"x": {"content": "x"}}, "must map ids"),
        ({"300": "x"}, "must map ids"),
        ({"300": {"content": ""}}, "must map ids"),
        ({"300": {"content": 3}}, "content must be a string"),
        ({"300": {"content": "x"}, "301": {"content": "x"}}, "names must differ"),
        ({"300": {"content": "<|reserved_token_305|>"}}, "names must differ"),
        ([], "must be an object"),
    ],
)
def test_bad_names(tmp_path, added, message):
    with pytest.raises(kl.TokenizerError, match=message):
        named(tmp_path, added)


def test_ids_may_not_collide():
    ranks = {bytes([b]): b for b in range(256)}
    for controls in ({"a": 255}, {"a": 257}, {"a": 256, "b": 256}):
        with pytest.raises(kl.TokenizerError, match="control tokens"):
            Tokenizer(ranks, controls)
