"""Megatron's checkpoint format: regions across cuts, and that damaged or hostile files are refused by name."""

from __future__ import annotations

import io
import itertools
import pickle
import resource
import signal

import pytest
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints import safe_pickle
from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
from ldt_schedules.megatron.checkpoints.torch_dist_writer import ChunkWriter, write_common, write_index

WHOLE = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)


def write(directory, chunks, common=None):
    """A checkpoint of `key -> [(offsets, tensor), ...]` in two files, chunk after chunk in turn."""
    directory.mkdir()
    files = [ChunkWriter(directory, f"__{rank}_0.distcp") for rank in range(2)]
    with files[0], files[1]:
        turn = itertools.cycle(files)
        for key, (shape, parts) in chunks.items():
            for offsets, part in parts:
                next(turn).put(key, part, offsets, shape)
    write_index(directory, [file.written for file in files])
    write_common(directory, {"iteration": 3, **(common or {})})
    return directory


def cut(tensor, rows, columns):
    """Offsets and parts of a grid."""
    return tensor.shape, [
        ((top, left), tensor[top : top + rows, left : left + columns])
        for top in range(0, tensor.shape[0], rows)
        for left in range(0, tensor.shape[1], columns)
    ]


def read(path, key, offsets, shape):
    checkpoint = open_checkpoint(path)
    region = checkpoint.region(key, offsets, shape)
    with checkpoint.reading() as reader:
        return reader.read(region)


@pytest.mark.parametrize(("rows", "columns"), [(7, 6), (2, 6), (3, 2), (1, 1), (5, 4)])
def test_any_region_of_any_cut(tmp_path, rows, columns):
    path = write(tmp_path / "c", {"w": cut(WHOLE, rows, columns)})
    for top, left in itertools.product(range(7), range(6)):
        for height, width in itertools.product((1, 2, 7 - top), (1, 6 - left)):
            if top + height <= 7:
                got = read(path, "w", (top, left), (height, width))
                assert torch.equal(got, WHOLE[top : top + height, left : left + width])


def test_a_layer_is_found_under_its_number_and_in_the_stack(tmp_path):
    stack = torch.randn(3, 4, 2)
    parts = [((layer, row, 0), stack[layer : layer + 1, row : row + 2]) for layer in range(3) for row in (0, 2)]
    path = write(tmp_path / "c", {"decoder.layers.mlp.w": (stack.shape, parts)})
    assert torch.equal(read(path, "decoder.layers.1.mlp.w", (1, 0), (2, 2)), stack[1, 1:3])
    checkpoint = open_checkpoint(path)
    assert checkpoint.region("decoder.layers.3.mlp.w", (0, 0), (4, 2)) is None
    assert checkpoint.region("decoder.layers.0.mlp.v", (0, 0), (4, 2)) is None


@pytest.mark.parametrize("left_out", [0, 2, -1])
def test_parts_that_do_not_make_up_a_tensor(tmp_path, left_out):
    """What no part holds would be read as whatever was in memory."""
    shape, parts = cut(WHOLE, 2, 3)
    whole = open_checkpoint(write(tmp_path / "whole", {"w": (shape, parts)}))
    assert whole.uncovered("w") == ""
    fewer = [part for number, part in enumerate(parts) if number != left_out % len(parts)]
    checkpoint = open_checkpoint(write(tmp_path / "fewer", {"w": (shape, fewer)}))
    assert "the parts of w do not make up a tensor of [7, 6]" in checkpoint.uncovered("w")
    huge = open_checkpoint(write(tmp_path / "huge", {"w": ((10**12, 6), parts)}))
    assert huge.uncovered("w")


def test_classes_of_this_process_stay_what_they_are(tmp_path):
    """A pickle may set attributes of what it names; it gets subclasses of its own."""
    from argparse import Namespace

    code = b"cargparse\nNamespace\nN}(Vpoison\nVhere\nu\x86b."
    poisoned = safe_pickle.load(io.BytesIO(code))
    assert poisoned.poison == "here" and not hasattr(Namespace, "poison")


def test_padding_that_is_not_there_stays(tmp_path):
    path = write(tmp_path / "c", {"w": (WHOLE.shape, [((0, 0), WHOLE)])})
    assert torch.equal(read(path, "w", (6, 0), (3, 6))[1:], torch.zeros(2, 6))


def test_a_view_is_written_without_what_surrounds_it(tmp_path):
    """torch.save writes the whole storage of a view: 400 MB for 16 bytes, and another site's rows with them."""
    secret = torch.full((1000, 100), 12345.0)
    secret[0] = 1.0
    path = write(tmp_path / "c", {"w": ((1, 4), [((0, 0), secret[:1, :4])])})
    stored = b"".join(file.read_bytes() for file in path.glob("*.distcp"))
    assert torch.tensor(12345.0).numpy().tobytes() not in stored and len(stored) < 4000


class Hostile:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_no_code_of_a_checkpoint_runs(tmp_path):
    marker = tmp_path / "it_ran"
    for name in (".metadata", "common.pt", "object"):
        path = write(tmp_path / name.strip("."), {"w": (WHOLE.shape, [((0, 0), WHOLE)])})
        if name == ".metadata":
            (path / name).write_bytes(pickle.dumps(Hostile(marker)))
        elif name == "common.pt":
            torch.save({"iteration": Hostile(marker)}, path / name)
        else:
            with ChunkWriter(path, "__9_0.distcp") as writer:
                writer.put_object("rng/shard_0_1", [Hostile(marker)])
            write_index(path, [writer.written])
        with pytest.raises(ConfigError, match=r"is refused: .*it would call (io|builtins)\.open"):
            checkpoint = open_checkpoint(path)
            assert not checkpoint.common.get("never")
            with checkpoint.reading() as reader:
                reader.object("rng/shard_0_1")
        assert not marker.exists()


class MemberByGetattr:
    """As Python 3.11.0 to 3.11.3 pickle a member of an enum."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_members_of_enums_are_written_by_getattr_by_some_pythons():
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    kind = safe_pickle.load(io.BytesIO(pickle.dumps(MemberByGetattr(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"))))
    assert isinstance(kind, safe_pickle.Inert)
    for owner, name in ((torch.Size, "__new__"), ("text", "format")):
        with pytest.raises(safe_pickle.Forbidden, match="getattr"):
            safe_pickle.load(io.BytesIO(pickle.dumps(MemberByGetattr(owner, name))))


def test_a_hostile_tensor_is_refused(tmp_path):
    path, marker = write(tmp_path / "c", {"w": (WHOLE.shape, [((0, 0), WHOLE)])}), tmp_path / "it_ran"
    with ChunkWriter(path, "__0_0.distcp") as writer:
        writer.put("w", WHOLE)
        start, length = writer._entries[0].chunk.stored.start, writer._entries[0].chunk.stored.length
    torch.save(Hostile(marker), path / "evil")
    evil = (path / "evil").read_bytes()
    assert start == 0 and len(evil) <= length + 2000
    (path / "__0_0.distcp").write_bytes(evil.ljust(length, b"\0"))
    with pytest.raises(ConfigError, match=r"__0_0.distcp"):
        read(path, "w", (0, 0), (7, 6))
    assert not marker.exists()


def test_a_file_outside_the_directory_is_refused(tmp_path):
    path = write(tmp_path / "c", {"w": (WHOLE.shape, [((0, 0), WHOLE)])})
    index = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(index.replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(ConfigError, match=r"names a file outside its directory: ../../secret"):
        open_checkpoint(path)


def test_every_truncation_is_told(tmp_path):
    path = write(tmp_path / "c", {"w": cut(WHOLE, 3, 3)})
    whole = {file: file.read_bytes() for file in path.iterdir()}
    for file, content in whole.items():
        for size in (0, 1, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:size])
            with pytest.raises(ConfigError, match=file.name.replace(".", r"\.")):
                assert open_checkpoint(path).common["iteration"] == 3
                read(path, "w", (0, 0), (7, 6))
        file.unlink()
        with pytest.raises(ConfigError, match=file.name.replace(".", r"\.")):
            assert open_checkpoint(path).common["iteration"] == 3
            read(path, "w", (0, 0), (7, 6))
        file.write_bytes(content)


@pytest.mark.parametrize("content", [{"iteration": 3}, ["x"], None, 3])
def test_an_index_that_is_something_else(tmp_path, content):
    path = write(tmp_path / "c", {"w": (WHOLE.shape, [((0, 0), WHOLE)])})
    (path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match=r"\.metadata is damaged"):
        open_checkpoint(path)


def test_no_space_left(tmp_path):
    """A limit on the size of files stands for a full disk: both fail in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"__0_0\.distcp cannot be written: File too large"):
            write(tmp_path / "c", {"w": ((300, 300), [((0, 0), torch.zeros(300, 300))])})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
