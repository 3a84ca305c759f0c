"""safetensors headers and model directories: every rule of the format, one bad file each."""

import json
import os

import numpy as np
import pytest
from clocks import now, within

import kimi_linear as kl
from kimi_linear.checkpoint import Checkpoint, read_header
from kimi_linear.testing import tiny_config, to_bf16, write_checkpoint, write_safetensors

CONFIG = tiny_config(num_hidden_layers=2, num_experts=2, vocab_size=300)
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("good"), CONFIG)


@pytest.fixture
def model_dir(tmp_path):
    return write_checkpoint(tmp_path / "m", CONFIG, n_files=3)


def raw_file(path, header, data=b"", n=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if n is None else n
    path.write_bytes((size & (1 << 64) - 1).to_bytes(8, "little") + text + data)
    return path


def header_of(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, os.fstat(fd).st_size, path.name)
    finally:
        os.close(fd)


# ---- good files --------------------------------------------------------------------------


@pytest.mark.parametrize("n_files", [1, 3])
def test_our_files_read_back(tmp_path, n_files):
    path = write_checkpoint(tmp_path, CONFIG, n_files=n_files, dtype="f32")
    with Checkpoint(path) as checkpoint:
        assert checkpoint.config == CONFIG
        assert len(checkpoint.fds) == n_files
        shapes = {name: shape for name, _, _, _, _, shape in checkpoint.sources()}
        assert shapes == CONFIG.tensor_shapes()
        assert checkpoint.dtype == "f32"
        assert checkpoint.nbytes == 4 * CONFIG.parameter_count()
        for _, file, offset, nbytes, _, _ in checkpoint.sources():
            assert offset + nbytes <= os.fstat(checkpoint.fds[file]).st_size


def test_their_reader_reads_our_files(good):
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("ml_dtypes")
    with safetensors.safe_open(good / "model.safetensors", "np") as theirs:
        with Checkpoint(good) as ours:
            assert set(theirs.keys()) == set(ours.tensors)
            for name, entry in ours.tensors.items():
                want = np.asarray(theirs.get_tensor(name))
                raw = os.pread(ours.fds[0], entry.nbytes, entry.offset)
                assert (raw, entry.shape) == (want.tobytes(), want.shape)


def test_our_reader_reads_their_files(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    tensors = {
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((3, 0), np.int8),
        "b": np.arange(6, dtype=np.int64).reshape(2, 3),
        "a": np.ones(5, np.float16),
    }
    numpy_io.save_file(tensors, tmp_path / "x", metadata={"k": "v"})
    entries = header_of(tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    assert {e.name for e in entries} == set(tensors)
    for e in entries:
        assert raw[e.offset : e.offset + e.nbytes] == tensors[e.name].tobytes()
        assert e.shape == tensors[e.name].shape


@pytest.mark.parametrize("n_files", [1, 3])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_tensors_to_look_at(tmp_path, dtype, n_files):
    """The values that another reader finds, as float32 of one's own."""
    torch_io = pytest.importorskip("safetensors.torch")
    path = write_checkpoint(tmp_path, CONFIG, dtype=dtype, n_files=n_files)
    theirs = {}
    for file in path.glob("*.safetensors"):
        theirs |= torch_io.load_file(file)
    with kl.Checkpoint(path) as checkpoint:
        assert set(checkpoint.tensors) == set(theirs)
        for name, want in theirs.items():
            found = checkpoint.read(name)
            assert found.dtype == np.float32 and found.flags.writeable
            np.testing.assert_array_equal(found, want.float().numpy())
        with pytest.raises(kl.WeightsError, match="has no tensor 'nothing'"):
            checkpoint.read("nothing")
    with pytest.raises(ValueError, match="checkpoint: is closed"):
        checkpoint.read("model.norm.weight")


def test_a_tensor_of_another_dtype_is_not_read(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    raw_file(tmp_path / "model.safetensors", {"a": F32 | {"dtype": "F16", "shape": [4]}}, b"12345678")
    with kl.Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(kl.WeightsError, match="'a': dtype must be F32 or BF16, found F16"):
            checkpoint.read("a")


def test_names_that_transformers_writes_for_a_dense_layer(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.KimiLinearConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16,
        qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, num_experts_per_tok=2,
        num_local_experts=4, linear_head_dim=16, linear_num_heads=2, pad_token_id=0,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with Checkpoint(tmp_path) as checkpoint:
        shapes = {name: shape for name, _, _, _, _, shape in checkpoint.sources()}
        assert shapes == checkpoint.config.tensor_shapes()


def test_bf16_rounds_to_nearest_even():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    x[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20]
    assert np.array_equal(to_bf16(x), x.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_leading_whitespace_of_the_header_is_allowed(tmp_path):
    path = raw_file(
        tmp_path / "x", b" \n\t" + json.dumps({"a": F32}).encode() + b"  ", b"8" * 8
    )
    assert [e.shape for e in header_of(path)] == [(2,)]


# ---- bad headers -------------------------------------------------------------------------


def entry(**changes):
    return {"a": F32 | changes}


def two(first, second):
    return {
        "a": F32 | {"data_offsets": list(first)},
        "b": F32 | {"data_offsets": list(second)},
    }


DATA = bytes(8)
BAD_HEADERS = {
    "array": (b"[]", b"", "must be a JSON object"),
    "not utf-8": (b'{"\xff": 1}', b"", "UTF-8"),
    "not json": (b'{"a": }', b"", "valid JSON"),
    "not json inside": (b"{]", b"", "valid JSON"),
    "byte-order mark": (b"\xef\xbb\xbf{}", b"", "JSON object"),
    "deep list": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "nested too deeply"),
    "deep object": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, b"", "nested too deeply"),
    "nan": (b'{"a": NaN}', b"", "finite"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA, "'a' must appear once"),
    "duplicate field": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        DATA, "'dtype' must appear once"),
    "duplicate metadata": (b'{"__metadata__":{},"__metadata__":{}}', b"", "must appear once"),
    "metadata list": ({"__metadata__": []}, b"", "__metadata__"),
    "metadata number": ({"__metadata__": {"a": 1}}, b"", "strings to strings"),
    "tensor is a list": ({"a": []}, b"", "exactly dtype, shape and data_offsets"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, DATA, "exactly"),
    "field too many": (entry(extra=1), DATA, "exactly"),
    "unknown dtype": (entry(dtype="F128"), DATA, "dtype must be one of"),
    "dtype number": (entry(dtype=7), DATA, "dtype must be one of"),
    "dtype list": (entry(dtype=["F32"]), DATA, "dtype must be one of"),
    "negative shape": (entry(shape=[-2]), DATA, "unsigned"),
    "float shape": (entry(shape=[2.0]), DATA, "unsigned"),
    "exponent shape": (b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', DATA,
                       "unsigned"),
    "bool shape": (entry(shape=[True, 2]), DATA, "unsigned"),
    "shape string": (entry(shape="2"), DATA, "unsigned"),
    "shape 2^64": (entry(shape=[1 << 64]), DATA, "unsigned"),
    "negative offset": (entry(data_offsets=[-8, 0]), DATA, "unsigned"),
    "float offset": (entry(data_offsets=[0, 8.0]), DATA, "unsigned"),
    "offset 2^64": (entry(data_offsets=[0, 1 << 64]), DATA, "unsigned"),
    "three offsets": (entry(data_offsets=[0, 8, 16]), DATA, "begin, end"),
    "swapped offsets": (entry(data_offsets=[8, 0]), DATA, "begin, end"),
    "product overflow": (entry(shape=[1 << 40, 1 << 40]), DATA, "64 bits"),
    "overflow back to zero": (entry(shape=[1 << 32, 1 << 32, 2]), DATA, "64 bits"),
    "overflow hidden by zero": (entry(shape=[1 << 63, 4, 0]), b"", "64 bits"),
    "bits overflow": (entry(shape=[1 << 60]), DATA, "64 bits"),
    "half a byte": (entry(dtype="F4", shape=[3], data_offsets=[0, 2]), bytes(2), "whole bytes"),
    "size too small": (entry(shape=[3]), DATA, "must span 12 bytes"),
    "size too big": (entry(shape=[1]), DATA, "must span 4 bytes"),
    "huge claim": (entry(shape=[1 << 50], data_offsets=[0, 1 << 52]), DATA, "must end with"),
    "hole": (two((0, 8), (12, 20)), bytes(20), "must begin where the one before ends"),
    "hole at the start": (entry(data_offsets=[4, 12]), bytes(12), "must begin"),
    "overlap": (two((0, 8), (4, 12)), bytes(12), "must begin"),
    "same bytes twice": (two((0, 8), (0, 8)), DATA, "must begin"),
    "trailing bytes": (entry(), bytes(9), "must end with its last tensor"),
    "truncated": (entry(), bytes(7), "must end with its last tensor"),
    "past the end": (two((0, 8), (8, 16)), DATA, "must end with its last tensor"),
    "bytes and no tensor": ({}, b"x", "must end"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(tmp_path, case):
    header, data, message = BAD_HEADERS[case]
    with pytest.raises(kl.WeightsError, match=message) as info:
        header_of(raw_file(tmp_path / "bad.safetensors", header, data))
    assert str(info.value).startswith("bad.safetensors")
    assert len(str(info.value)) < 400


@pytest.mark.parametrize("n_bytes", range(9))
def test_a_file_of_a_few_bytes(tmp_path, n_bytes):
    (tmp_path / "x").write_bytes(bytes(n_bytes))
    with pytest.raises(kl.WeightsError, match="at least 8 bytes" if n_bytes < 8 else "object"):
        header_of(tmp_path / "x")


@pytest.mark.parametrize(
    "n,message",
    [
        (3, "fit|JSON"),
        (100, "must fit the file's"),
        (100_000_000, "must fit the file's"),
        (100_000_001, "at most 100,000,000"),
        (1 << 63, "at most"),
        ((1 << 64) - 1, "at most"),
    ],
)
def test_a_header_length_that_lies(tmp_path, n, message):
    path = raw_file(tmp_path / "x", {"a": F32}, DATA, n=n)
    with pytest.raises(kl.WeightsError, match=message):
        header_of(path)


def test_many_tensors_take_reasonable_time(tmp_path):
    one = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    path = raw_file(tmp_path / "x", {f"t{i}": one for i in range(50_000)})
    start = now()
    assert len(header_of(path)) == 50_000
    assert within(10, start)


def test_every_truncation_of_a_good_file_is_refused(good, tmp_path):
    raw = (good / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for size in [*range(0, header, 997), header, header + 1, len(raw) // 2, len(raw) - 1]:
        (tmp_path / "x").write_bytes(raw[:size])
        with pytest.raises(kl.WeightsError):
            header_of(tmp_path / "x")


def test_a_flipped_byte_of_the_header_never_escapes_our_errors(tmp_path):
    write_safetensors(tmp_path / "x", [("a", np.zeros((2, 3), np.float32))])
    raw = bytearray((tmp_path / "x").read_bytes())
    rng = np.random.default_rng(0)
    for at in range(8 + int.from_bytes(raw[:8], "little")):
        broken = bytearray(raw)
        broken[at] ^= int(rng.integers(1, 256))
        (tmp_path / "y").write_bytes(broken)
        try:
            header_of(tmp_path / "y")
        except kl.WeightsError:
            continue


# ---- directories -------------------------------------------------------------------------


def change_index(path, change):
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    change(data["weight_map"])
    index.write_text(json.dumps(data))


def refuse(path, message):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kl.WeightsError, match=message):
        Checkpoint(path)
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor leaked"


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "/x.safetensors", "a/b.safetensors", "..", ".", "",
     "a\\b.safetensors", "C:x.safetensors", "x\0.safetensors", ".x.safetensors", "x.bin",
     None, 3, ["x"]],
)  # fmt: skip
def test_an_index_stays_in_its_directory(model_dir, name):
    (model_dir.parent / "x.safetensors").write_bytes(b"")
    change_index(model_dir, lambda m: m.update({"model.norm.weight": name}))
    refuse(model_dir, "without a path")


def test_a_missing_shard(model_dir):
    (model_dir / "model-00002-of-00003.safetensors").unlink()
    refuse(model_dir, "model-00002.*missing")


def test_a_tensor_that_is_not_in_its_shard(model_dir):
    def move(weight_map):
        weight_map["model.norm.weight"] = "model-00003-of-00003.safetensors"

    change_index(model_dir, move)
    refuse(model_dir, "'model.norm.weight' must be in 'model-00003")


def test_a_tensor_in_two_shards(model_dir):
    extra = [("model.norm.weight", np.zeros(64, np.float32))]
    write_safetensors(model_dir / "model-00003-of-00003.safetensors", extra)
    refuse(model_dir, "must be in one file")


def test_a_tensor_that_the_index_forgets(model_dir):
    change_index(model_dir, lambda m: m.pop("model.norm.weight"))
    refuse(model_dir, "must be named by model.safetensors.index.json")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"weight_map": {}}',
                                 b'{"weight_map": []}',
                                 b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}',
                                 b"[" * 100_000])  # fmt: skip
def test_a_bad_index(model_dir, raw):
    (model_dir / "model.safetensors.index.json").write_bytes(raw)
    refuse(model_dir, "index.json")


def test_which_file_must_be_clear(model_dir, good):
    os.link(good / "model.safetensors", model_dir / "model.safetensors")
    refuse(model_dir, "found both")
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").unlink()
    refuse(model_dir, "need model.safetensors.index.json")


def test_pickles_are_refused_with_the_way_out(good, tmp_path):
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    refuse(tmp_path, "found neither")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refuse(tmp_path, "pickle.*never read.*safetensors")


def test_things_that_are_no_files(good, tmp_path):
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    os.mkfifo(tmp_path / "model.safetensors")
    refuse(tmp_path, "found a FIFO")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refuse(tmp_path, "found a directory")


def test_links_as_in_the_hub_cache_work(good, tmp_path):
    for file in good.iterdir():
        (tmp_path / file.name).symlink_to(file)
    with Checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.tensors) == len(CONFIG.tensor_shapes())


def test_a_dangling_link(good, tmp_path):
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    refuse(tmp_path, "missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(model_dir):
    (model_dir / "model-00001-of-00003.safetensors").chmod(0)
    with pytest.raises(PermissionError):
        Checkpoint(model_dir)


@pytest.mark.parametrize("dtype", ["F16", "F64", "I8", "F8_E4M3"])
def test_a_dtype_that_cannot_be_loaded_is_named(good, tmp_path, dtype):
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    bytes_each = {"F16": 2, "F64": 8}.get(dtype, 1)
    header = {"model.norm.weight": F32 | {"dtype": dtype, "data_offsets": [0, 2 * bytes_each]}}
    raw_file(tmp_path / "model.safetensors", header, bytes(2 * bytes_each))
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(kl.WeightsError, match=f"'model.norm.weight'.*found {dtype}"):
            checkpoint.sources()


def test_too_many_dimensions(good, tmp_path):
    (tmp_path / "config.json").write_bytes((good / "config.json").read_bytes())
    header = entry(shape=[1] * 9, data_offsets=[0, 4])
    raw_file(tmp_path / "model.safetensors", header, bytes(4))
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(kl.WeightsError, match="at most 5 dimensions"):
            checkpoint.sources()


# ---- a directory that changes ------------------------------------------------------------


def edit(file):
    with open(file, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")


def touch_later(file):
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def replace(file):
    copy = file.with_suffix(".new")
    copy.write_bytes(file.read_bytes())
    os.replace(copy, file)


@pytest.mark.parametrize(
    "change",
    [edit, touch_later, replace, lambda f: os.truncate(f, 100), lambda f: f.unlink()],
    ids=["edited", "touched", "replaced", "truncated", "removed"],
)
def test_a_file_that_changes_while_loading(model_dir, change):
    with Checkpoint(model_dir) as checkpoint:
        checkpoint.check_unchanged()
        change(model_dir / "model-00002-of-00003.safetensors")
        with pytest.raises(kl.WeightsError, match="model-00002.*must .* while loading"):
            checkpoint.check_unchanged()


def test_close_twice(good):
    checkpoint = Checkpoint(good)
    checkpoint.close()
    checkpoint.close()
    assert checkpoint.fds == []
