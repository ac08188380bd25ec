import copy
import itertools
import json
import os
import pickle
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import xq.store_part
from xq.models import LinearDecoder, LinearEncoder, Tokenizer
from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ChannelFirst,
    EMACodebook,
    ProductQuantizer,
    Projected,
    Pyramid,
    Quantized,
    Quantizer,
    Refine,
    ResidualQuantizer,
    fit,
)
from xq.token_store import TokenStore

NAMES = ["part-00000-of-00001" + suffix for suffix in (".json", ".lock", ".npy")]


class Rounding(Quantizer):
    """A leaf of one's own, without a config."""

    def __init__(self, levels: int = 5) -> None:
        super().__init__()
        self.dim, self.codebook_size = 1, levels

    def quantize(self, u, depth=None):
        indices = u.squeeze(-1).round().clamp(0, self.codebook_size - 1).long()
        z = self.dequantize(indices)
        return Quantized(z, indices, fit(u, z))

    def dequantize(self, indices):
        return indices[..., None].float()


def refined() -> ProductQuantizer:
    pyramid = Pyramid((1, 2, (3, 4)), [Refine(3)])
    return ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=pyramid), P=2)


def ema(size: int = 11) -> VQ:
    return VQ(4, size, codebook=partial(EMACodebook, decay=0.9))


QUANTIZERS = {
    "vq": (lambda: VQ(4, 300), (3, 2), (3, 2)),
    "side": (lambda: VQ(4, 11), 3, (3, 3)),
    "sequence": (lambda: BSQ(5), (7,), (7,)),
    "one-token": (lambda: LFQ(20, regularize=False), (), ()),
    "residual": (lambda: ResidualQuantizer(ema(), 3), (3, 2), (3, 2, 3)),
    "nest": (
        lambda: ResidualQuantizer(ProductQuantizer(VQ(2, 9), 2), 3),
        (2, 2),
        (2, 2, 3, 2),
    ),
    "pyramid": (lambda: ResidualQuantizer(ema(), multiscale=(1, 2, 3)), None, (14,)),
    "pyramid-product": (refined, None, (17, 2)),
    "channel-first": (lambda: ChannelFirst(VQ(4, 11)), (3, 2), (3, 2)),
    "projected": (lambda: Projected(VQ(3, 11), dim=6), (3, 2), (3, 2)),
    "own-leaf": (lambda: Rounding(), (3, 2), (3, 2)),
}


def vectors(quantizer, n: int, grid) -> torch.Tensor:
    if quantizer.scales:
        grid = quantizer.grids[-1]
    axes = (grid, grid) if isinstance(grid, int) else grid
    if isinstance(quantizer, ChannelFirst):
        return torch.randn(n, quantizer.dim, *axes)
    return torch.randn(n, *axes, quantizer.dim)


def small(size: int = 300) -> VQ:
    """Always the same one."""
    torch.manual_seed(0)
    return VQ(4, size)


def drawn(n: int, *shape: int, size: int = 300) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, size, (n, *shape)))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_tokens_there_and_back(name, tmp_path):
    make, grid, shape = QUANTIZERS[name]
    quantizer = make().eval()
    x = vectors(quantizer, 9, grid)
    tokens, labels = quantizer.encode(x), torch.arange(9) * 7 - 3
    with TokenStore.create(tmp_path / "a.tokens", quantizer, grid, length=9) as writer:
        assert writer.token_shape == shape == tuple(tokens.shape[1:])
        writer.append(tokens[:4], labels[:4])
        writer.append(tokens[4:], labels[4:].tolist())
    store = TokenStore(tmp_path / "a.tokens", quantizer)
    assert len(store) == store.filled == 9
    assert store.rows == range(9)
    whole, all_labels = store[:]
    assert whole.dtype == all_labels.dtype == torch.int64
    assert torch.equal(whole, tokens)
    assert torch.equal(all_labels, labels)
    assert torch.equal(quantizer.decode(whole), quantizer.decode(tokens))
    for i, (row, label) in enumerate(store):
        assert row.dtype == torch.int64
        assert torch.equal(row, tokens[i])
        assert label == labels[i]


def test_a_tokenizers_images(tmp_path):
    model = Tokenizer(LinearEncoder(4, 2), VQ(4, 16), LinearDecoder(4, 2)).eval()
    images = torch.rand(3, 3, 6, 4) * 2 - 1
    with TokenStore.create(tmp_path, model.quantizer, (3, 2), length=3) as writer:
        writer.append(model.encode(images))
    tokens, label = TokenStore(tmp_path, model.quantizer)[0]
    torch.testing.assert_close(model.decode(tokens[None]), model(images[:1]).image)
    assert label == -1


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(1, "uint8"), (8, "uint8"), (9, "uint16"), (16, "uint16"), (17, "uint32"), (33, "uint64")],
)
def test_the_smallest_integers(bits, dtype, tmp_path):
    quantizer = BSQ(bits, regularize=False)
    ends = torch.tensor([[0, 2**bits - 1]])
    with TokenStore.create(tmp_path, quantizer, (2,), length=1) as store:
        store.append(ends)
        assert store.dtype == np.dtype(dtype)
        assert torch.equal(store[0][0], ends[0])
    rows = np.load(tmp_path / NAMES[2], mmap_mode="r")
    assert rows["tokens"].dtype == np.dtype(dtype)
    assert rows["tokens"].tolist() == ends.tolist()
    assert rows["label"].tolist() == [-1]


def test_the_smallest_codebook(tmp_path):
    with TokenStore.create(tmp_path, VQ(4, 1), (2,), length=1) as store:
        store.append(torch.zeros(1, 2, dtype=torch.int64))
        assert store.dtype == np.uint8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, np.uint16, np.int64])
def test_tokens_of_any_width(dtype, tmp_path):
    tokens = drawn(3, 2, size=11)
    given = tokens.to(dtype) if isinstance(dtype, torch.dtype) else tokens.numpy().astype(dtype)
    with TokenStore.create(tmp_path, small(11), (2,), length=3) as store:
        store.append(given, np.arange(3, dtype=np.int16))
        assert torch.equal(store[:][0], tokens)
        assert store[:][1].tolist() == [0, 1, 2]


def test_indexing(tmp_path):
    tokens = drawn(10, 2)
    with TokenStore.create(tmp_path, small(), (2,), length=12) as store:
        store.append(tokens, range(10))
        assert store[-1][1] == 9
        assert store[np.int64(3)][1] == 3
        assert store[torch.tensor(3)][1] == 3
        for part in (slice(2, 5), slice(-3, None), slice(8, 1, -3), slice(5, 5), slice(4, 99, 2)):
            got, labels = store[part]
            assert torch.equal(got, tokens[list(range(10)[part])])
            assert labels.tolist() == list(range(10)[part])
        # two rows have room but are not there
        for index in (10, -11):
            with pytest.raises(IndexError, match="out of range"):
                store[index]
        got = store[0][0]
        got += 1
        assert torch.equal(store[0][0], tokens[0])


def test_the_files_do_not_depend_on_the_batches(tmp_path):
    tokens = drawn(20, 3, 2)
    for name, sizes in {"one": [20], "many": [1, 7, 2, 0, 10]}.items():
        with TokenStore.create(tmp_path / name, small(), (3, 2), length=20) as store:
            for part, labels in zip(
                tokens.split(sizes), torch.arange(20).split(sizes), strict=True
            ):
                store.append(part, labels)
    assert files(tmp_path / "one") == files(tmp_path / "many")
    assert sorted(files(tmp_path / "one")) == NAMES


def test_a_reader_has_the_rows_of_its_time(tmp_path):
    tokens = drawn(6, 2)
    with TokenStore.create(tmp_path, small(), (2,), length=6) as writer:
        writer.append(tokens[:2])
        reader = TokenStore(tmp_path)
        writer.append(tokens[2:])
        assert (len(reader), len(writer), len(TokenStore(tmp_path))) == (2, 6, 6)
        assert torch.equal(writer[:][0], tokens)


def test_copies_read_and_hold_no_rows(tmp_path):
    tokens = drawn(1000, 30)
    with TokenStore.create(tmp_path, small(), (30,), length=1000) as store:
        store.append(tokens)
        pickled = pickle.dumps(store)
        assert len(pickled) < 3000
        for twin in (pickle.loads(pickled), copy.deepcopy(store)):
            assert torch.equal(twin[:][0], tokens)
            with pytest.raises(ValueError, match="is open for reading"):
                twin.append(tokens[:0])


def test_it_says_what_it_is(tmp_path):
    with TokenStore.create(tmp_path / "a.tokens", small(), (3, 2), length=7) as store:
        store.append(drawn(2, 3, 2))
        assert repr(store).endswith("a.tokens', 2 of 7 rows, each (3, 2) uint16)")


# processes, killed at any moment


ROWS, BATCH = 160, 4


def appended(store: TokenStore) -> None:
    """All that remains, batch by batch."""
    tokens = drawn(len(store.rows), 6)
    while todo := store.rows[store.filled :][:BATCH]:
        store.append(tokens[todo.start : todo.stop], todo)


def forked(work) -> int:
    """A process of one's own, at once: it shares no file, lock or thread with this one."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def forks(test):
    """Marks a test that does so."""
    test = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")(test)
    message = "ignore:.*multi-threaded.*fork:DeprecationWarning"
    return pytest.mark.filterwarnings(message)(test)


def end(process: int) -> int:
    """Kills it; says which signal ended it, if any."""
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@forks
def test_workers_read_it(tmp_path):
    tokens = drawn(50, 3)
    with TokenStore.create(tmp_path, small(), (3,), length=50) as store:
        store.append(tokens, range(50))
    store = TokenStore(tmp_path)
    assert torch.equal(store[:][0], tokens)
    loader = DataLoader(store, 8, num_workers=2, multiprocessing_context="fork")
    got = [torch.cat(column) for column in zip(*loader, strict=True)]
    assert torch.equal(got[0], tokens)
    assert got[1].tolist() == list(range(50))


@forks
def test_killed_at_random_moments(tmp_path):
    with TokenStore.create(tmp_path / "whole", small(), (6,), length=ROWS) as store:
        appended(store)
    folder, quantizer = tmp_path / "killed", small()
    TokenStore.create(folder, quantizer, (6,), length=ROWS).close()

    def work() -> None:
        appended(TokenStore.create(folder, quantizer, (6,), length=ROWS))

    random = np.random.default_rng()
    tokens, filled, kills = drawn(ROWS, 6), 0, 0
    while filled < ROWS:
        process = forked(work)
        # it gets some way, then is killed wherever it is
        deadline = time.monotonic() + 30
        while len(TokenStore(folder)) < min(filled + 4 * BATCH, ROWS):
            assert time.monotonic() < deadline
        time.sleep(random.uniform(0, 0.01))
        kills += end(process) == signal.SIGKILL
        store = TokenStore(folder, quantizer)
        assert store.filled > filled
        assert store.filled % BATCH == 0
        assert torch.equal(store[:][0], tokens[: store.filled])
        assert store[:][1].tolist() == list(range(store.filled))
        filled = store.filled
    assert kills >= 3
    left = files(folder)
    left.pop("part-00000-of-00001.json.new", None)
    assert left == files(tmp_path / "whole")


class Killed(BaseException):
    """Stands for the end of the process."""


def steps(monkeypatch, last: int) -> list[str]:
    """Ends the process, so to speak, before the given step towards the disk."""
    done: list[str] = []

    def before(name, function):
        def wrapped(*args, **kwargs):
            if len(done) == last:
                raise Killed
            done.append(name)
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(xq.store_part, "_to_disk", before("sync", xq.store_part._to_disk))
    for name in ("open", "replace"):
        monkeypatch.setattr(Path, name, before(name, getattr(Path, name)))
    return done


def test_ended_before_each_step(tmp_path, monkeypatch):
    with TokenStore.create(tmp_path / "whole", small(), (6,), length=3 * BATCH) as store:
        appended(store)
    want = files(tmp_path / "whole")
    for last in itertools.count():
        folder = tmp_path / str(last)
        with monkeypatch.context() as patch:
            done = steps(patch, last)
            try:
                appended(TokenStore.create(folder, small(), (6,), length=3 * BATCH))
                break
            except Killed:
                assert len(done) == last
        if (folder / NAMES[0]).exists():
            store = TokenStore(folder)
            assert torch.equal(store[:][0], drawn(3 * BATCH, 6)[: store.filled])
        with TokenStore.create(folder, small(), (6,), length=3 * BATCH) as store:
            appended(store)
        left = files(folder)
        left.pop("part-00000-of-00001.json.new", None)
        assert left == want, done
    # files are opened, synchronized and one replaced: to begin, and for each of three batches
    assert done.count("replace") == 4
    assert done.count("sync") == 8


def test_half_a_batch_does_not_count(tmp_path):
    tokens = drawn(8, 6)
    store = TokenStore.create(tmp_path, small(), (6,), length=8)
    store.append(tokens[:3])
    store.close()
    before = files(tmp_path)
    part = store._parts[0]
    part._commit = lambda record: (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        part.append(np.ones(2, part.dtype))
    assert files(tmp_path)[NAMES[2]] != before[NAMES[2]]
    assert len(TokenStore(tmp_path)) == 3
    with TokenStore.create(tmp_path, small(), (6,), length=8) as store:
        store.append(tokens[3:])
    assert torch.equal(TokenStore(tmp_path)[:][0], tokens)


def test_a_write_that_is_cut_short_goes_on(tmp_path, monkeypatch):
    """The system may write fewer bytes than it was given."""
    tokens = drawn(8, 6)
    opened = Path.open

    def reluctant(path, *args, **kwargs):
        file = opened(path, *args, **kwargs)
        if kwargs.get("buffering") != 0:
            return file

        class Reluctant:
            def write(self, data):
                return file.write(data[:5])

            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

        return Reluctant()

    with TokenStore.create(tmp_path, small(), (6,), length=8) as store:
        monkeypatch.setattr(Path, "open", reluctant)
        store.append(tokens)
        monkeypatch.undo()
        assert torch.equal(store[:][0], tokens)


def test_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    tokens = drawn(8, 6)
    with TokenStore.create(tmp_path, small(), (6,), length=8) as store:
        store.append(tokens[:3])

        def full(file):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(xq.store_part, "_to_disk", full)
            with pytest.raises(OSError, match="No space left"):
                store.append(tokens[3:])
        assert store.filled == len(TokenStore(tmp_path)) == 3
        store.append(tokens[3:])
    assert torch.equal(TokenStore(tmp_path)[:][0], tokens)


# one writer


@forks
def test_two_writers_are_refused(tmp_path):
    def create() -> TokenStore:
        return TokenStore.create(tmp_path, small(), (6,), length=ROWS)

    refused = pytest.raises(ValueError, match="part-00000-of-00001 is being written already")
    first = create()
    with refused:
        create()
    first.close()
    first.close()
    with pytest.raises(ValueError, match=r"is open for reading; TokenStore.create"):
        first.append(drawn(1, 6))

    def work() -> None:
        store = create()
        (tmp_path / "ready").touch()
        time.sleep(60)
        store.close()

    process = forked(work)
    try:
        wait_for(tmp_path / "ready")
        with refused:
            create()
    finally:
        end(process)
    create().close()


@forks
def test_a_worker_does_not_keep_the_lock_of_its_parent(tmp_path):
    store = TokenStore.create(tmp_path, small(), (6,), length=ROWS)

    def work() -> None:
        with pytest.raises(ValueError, match="is open for reading"):
            store.append(drawn(1, 6))
        (tmp_path / "ready").touch()
        time.sleep(60)

    worker = forked(work)
    try:
        wait_for(tmp_path / "ready")
        # the parent lets go, as if it had ended; the worker lives on
        store.append(drawn(1, 6))
        store.close()
        TokenStore.create(tmp_path, small(), (6,), length=ROWS).close()
    finally:
        end(worker)


def test_a_store_that_is_dropped_is_unlocked(tmp_path):
    TokenStore.create(tmp_path, small(), (6,), length=ROWS)
    TokenStore.create(tmp_path, small(), (6,), length=ROWS).close()


# several processes


@pytest.mark.parametrize(("length", "world"), [(10, 3), (12, 4), (2, 5), (0, 2), (7, 1)])
def test_parts_read_as_one(length, world, tmp_path):
    tokens, covered = drawn(length, 2), []
    writers = [
        TokenStore.create(tmp_path, small(), (2,), length=length, part=(rank, world))
        for rank in range(world)
    ]
    # all at the same time, in turns
    for k in range(-(-length // world) + 1):
        for writer in writers:
            place = writer.rows[k : k + 1]
            writer.append(tokens[place.start : place.stop], place)
    for writer in writers:
        assert writer.filled == len(writer.rows)
        assert torch.equal(writer[:][0], tokens[writer.rows.start : writer.rows.stop])
        covered += writer.rows
        writer.close()
    assert covered == list(range(length))
    store = TokenStore(tmp_path, small())
    assert store.rows == range(length)
    assert torch.equal(store[:][0], tokens)
    assert torch.equal(store[::-2][0], tokens[list(range(length))[::-2]])
    assert [label for _, label in store] == list(range(length))
    assert torch.equal(pickle.loads(pickle.dumps(store))[:][0], tokens)


def test_parts_resume_apart(tmp_path):
    tokens = drawn(10, 2)
    for rank in (1, 0, 1, 0):
        with TokenStore.create(tmp_path, small(), (2,), length=10, part=(rank, 2)) as store:
            todo = store.rows[store.filled :][:3]
            store.append(tokens[todo.start : todo.stop])
    assert torch.equal(TokenStore(tmp_path)[:][0], tokens)


def test_parts_that_are_not_complete(tmp_path):
    tokens = drawn(10, 2)
    with TokenStore.create(tmp_path, small(), (2,), length=10, part=(0, 2)) as store:
        store.append(tokens[:3])
    with pytest.raises(FileNotFoundError, match=r"lacks some of its parts; it has \(0, 2\)"):
        TokenStore(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks part \(1, 2\); it has \(0, 2\)"):
        TokenStore(tmp_path, part=(1, 2))
    with TokenStore.create(tmp_path, small(), (2,), length=10, part=(1, 2)) as store:
        store.append(tokens[5:])
    message = r"part-00000-of-00002 has 3 of its 5 rows, .* one by one with part=\(0, 2\)"
    with pytest.raises(ValueError, match=message):
        TokenStore(tmp_path)
    assert torch.equal(TokenStore(tmp_path, part=(0, 2))[:][0], tokens[:3])
    assert TokenStore(tmp_path, small(), part=(1, 2)).rows == range(5, 10)


def test_another_number_of_processes(tmp_path):
    TokenStore.create(tmp_path, small(), (2,), length=10, part=(0, 2)).close()
    with pytest.raises(ValueError, match="is another store: world_size is 2 there, 3 here"):
        TokenStore.create(tmp_path, small(), (2,), length=10, part=(1, 3))
    assert not list(tmp_path.glob("*of-00003*"))
    other = tmp_path / "other"
    TokenStore.create(other, small(), (2,), length=10, part=(0, 3)).close()
    for path in other.iterdir():
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match="holds parts of 2 and of 3: two stores"):
        TokenStore(tmp_path)


def test_parts_of_two_stores(tmp_path):
    TokenStore.create(tmp_path, small(), (2,), length=10, part=(0, 2)).close()
    with pytest.raises(ValueError, match=r"is another store: quantizer.weights is "):
        TokenStore.create(tmp_path, VQ(4, 300), (2,), length=10, part=(1, 2))
    with TokenStore.create(tmp_path / "b", VQ(4, 300), (2,), length=10, part=(1, 2)):
        pass
    for path in (tmp_path / "b").iterdir():
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match=r"has parts that differ: quantizer.weights is "):
        TokenStore(tmp_path)


# another quantizer


def changed(quantizer: Quantizer) -> Quantizer:
    """With one code moved by a hair."""
    other = copy.deepcopy(quantizer)
    with torch.no_grad():
        codes = next(t for k, t in other.state_dict().items() if k.endswith("weight"))
        codes.view(-1)[-1] *= 1 + 1e-6
    return other


VQ_PYRAMID = ResidualQuantizer(VQ(4, 8), multiscale=(1, 2))
OTHERS = {
    "codes": (VQ(4, 8), changed, "weights is .{10}... there, .{10}... here"),
    "ema-codes": (ema(), changed, "weights is"),
    "refinement": (refined(), changed, "weights is"),
    "projection": (Projected(VQ(3, 8), 6), changed, "weights is"),
    "size": (VQ(4, 8), lambda q: VQ(4, 9), "codebook_size is 8 there, 9 here"),
    "class": (BSQ(4), lambda q: LFQ(4), "config.class is BSQ there, LFQ here"),
    "option": (VQ(4, 8), lambda q: VQ(4, 8, normalize=True), "normalize is false there, true here"),
    "nested": (
        ProductQuantizer([BSQ(3), BSQ(3)]),
        lambda q: ProductQuantizer([BSQ(3), LFQ(3)]),
        r"config.quantizer.1.class is BSQ there, LFQ here",
    ),
    "steps": (
        ResidualQuantizer(BSQ(4), 3),
        lambda q: ResidualQuantizer(BSQ(4), 4),
        r"code_shape is \[3\] there, \[4\] here",
    ),
    "scales": (
        VQ_PYRAMID,
        lambda q: q.with_scales((1, 3)),
        r"grids is \[\[1, 1\], \[2, 2\]\] there, \[\[1, 1\], \[3, 3\]\] here",
    ),
    "shrink": (
        ResidualQuantizer(BSQ(4), 3),
        lambda q: ResidualQuantizer(BSQ(4), 3, shrink=0.7),
        "config.shrink is null there, 0.7 here",
    ),
    "wrapper": (ChannelFirst(BSQ(4)), lambda q: q.quantizer, "class is ChannelFirst there, BSQ"),
    "own": (Rounding(), lambda q: Rounding(6), "codebook_size is 5 there, 6 here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_quantizer_is_an_error(name, tmp_path):
    quantizer, other, message = OTHERS[name]
    grid = None if quantizer.scales else (2,)
    TokenStore.create(tmp_path, quantizer, grid, length=3).close()
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"holds tokens of another quantizer: .*{message}"):
        TokenStore(tmp_path, other(quantizer))
    with pytest.raises(ValueError, match="is another store: "):
        TokenStore.create(tmp_path, other(quantizer), grid, length=3)
    assert files(tmp_path) == before
    TokenStore(tmp_path, quantizer)


def test_the_same_quantizer_in_another_form(tmp_path):
    quantizer = ResidualQuantizer(ema(), 2, shared=True)
    for _ in range(2):
        quantizer(torch.randn(9, 4))
    TokenStore.create(tmp_path / "s", quantizer, (2,), length=3).close()
    quantizer.save_pretrained(tmp_path / "q")
    TokenStore(tmp_path / "s", Quantizer.from_pretrained(tmp_path / "q"))
    for twin in (copy.deepcopy(quantizer).bfloat16(), copy.deepcopy(quantizer).double()):
        TokenStore(tmp_path / "s", twin)
    # statistics that have not become codes, and how they are collected
    counted = copy.deepcopy(quantizer)
    for book in counted.modules():
        if isinstance(book, EMACodebook):
            book.count += 1
            book.decay = 0.5
    TokenStore(tmp_path / "s", counted)
    quantizer.train()
    for _ in range(2):
        quantizer(torch.randn(9, 4))
    with pytest.raises(ValueError, match="another quantizer: weights is"):
        TokenStore(tmp_path / "s", quantizer)


def test_arguments_of_another_version_do_not_count(tmp_path):
    TokenStore.create(tmp_path, small(), (2,), length=3).close()
    sidecar = tmp_path / NAMES[0]
    record = json.loads(sidecar.read_text())
    del record["quantizer"]["config"]["normalize"]
    record["quantizer"]["config"]["spelling"] = "new"
    sidecar.write_text(json.dumps(record))
    TokenStore(tmp_path, small())
    record["quantizer"]["config"]["metric"] = "cosine"
    sidecar.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"config.metric is cosine there, euclidean here$"):
        TokenStore(tmp_path, small())


def test_no_more_than_four_differences_are_told(tmp_path):
    TokenStore.create(tmp_path, BSQ(4), (2,), length=3).close()
    other = BSQ(5, temperature=2.0, group_size=5, regularize=False)
    message = (
        r"codebook_size is 16 there, 32 here; config.dim is 4 there, 5 here; "
        r"config.temperature is 1.0 there, 2.0 here; "
        r"config.group_size is null there, 5 here; 1 more$"
    )
    with pytest.raises(ValueError, match=message):
        TokenStore(tmp_path, other)


def test_the_sidecar(tmp_path):
    with TokenStore.create(tmp_path, refined(), length=5) as store:
        store.append(drawn(2, 17, 2, size=8))
    record = json.loads((tmp_path / NAMES[0]).read_text())
    assert len(record["quantizer"].pop("weights")) == 64
    assert record["quantizer"].pop("config")["class"] == "ProductQuantizer"
    assert record == {
        "format": "xq.TokenStore",
        "version": 1,
        "filled": 2,
        "part": [0, 1],
        "length": 5,
        "token_shape": [17, 2],
        "dtype": "uint8",
        "quantizer": {
            "codebook_size": 8,
            "code_shape": [2],
            "grids": [[1, 1], [2, 2], [3, 4]],
        },
    }


# bad input


@pytest.mark.parametrize(
    ("tokens", "labels", "message"),
    [
        (drawn(2, 3), None, r"takes tokens of shape \(n, 3, 2\), got \(2, 3\)"),
        (drawn(3, 2), None, r"takes tokens of shape \(n, 3, 2\), got \(3, 2\)"),
        (drawn(2, 2, 3), None, r"takes tokens of shape \(n, 3, 2\), got \(2, 2, 3\)"),
        (drawn(2, 3, 2).float(), None, "takes integer tokens, got torch.float32"),
        (drawn(2, 3, 2) > 5, None, "takes integer tokens, got torch.bool"),
        (drawn(2, 3, 2).numpy() / 2, None, "takes integer tokens, got float64"),
        (drawn(2, 3, 2) - 300, None, r"takes tokens in 0\.\.299, got -\d+\.\.-\d+; were they"),
        (drawn(2, 3, 2) + 299, None, r"takes tokens in 0\.\.299, got \d+\.\.\d+; were they"),
        (drawn(2, 3, 2), [1], r"takes a label for each of 2 rows, got shape \(1,\)"),
        (drawn(2, 3, 2), [[1], [2]], r"takes a label for each of 2 rows, got shape \(2, 1\)"),
        (drawn(2, 3, 2), [0.5, 1], "takes integer labels, got float64"),
        (drawn(2, 3, 2), torch.rand(2), "takes integer labels, got torch.float32"),
        (drawn(8, 3, 2), None, r"has room for 7 more of its 9 rows, got 8; after a restart"),
    ],
)
def test_what_cannot_be_appended(tokens, labels, message, tmp_path):
    with TokenStore.create(tmp_path, small(), (3, 2), length=9) as store:
        store.append(drawn(2, 3, 2))
        before = files(tmp_path)
        with pytest.raises(ValueError, match=message):
            store.append(tokens, labels)
        assert files(tmp_path) == before
        store.append(drawn(7, 3, 2))
        with pytest.raises(ValueError, match="has room for 0 more of its 9 rows, got 1"):
            store.append(drawn(1, 3, 2))


def test_readers_do_not_append(tmp_path):
    TokenStore.create(tmp_path, small(), (2,), length=3).close()
    with pytest.raises(ValueError, match=r"is open for reading; TokenStore.create with the arg"):
        TokenStore(tmp_path).append(drawn(1, 2))


@pytest.mark.parametrize(
    ("quantizer", "arguments", "message"),
    [
        (small(), {"length": 3}, r"VQ makes as many tokens as its input has; say grid=\(height"),
        (small(), {"grid": (3, 0), "length": 3}, r"grid of positive sizes, got \(3, 0\)"),
        (refined(), {"grid": 3, "length": 3}, "ProductQuantizer has scales, .* leave out grid=3"),
        (small(), {"grid": 3, "length": -1}, "length of 0 or more; got .* length=-1"),
        (small(), {"grid": 3, "length": 3, "part": (2, 2)}, r"got part=\(2, 2\)"),
        (small(), {"grid": 3, "length": 3, "part": (-1, 2)}, r"got part=\(-1, 2\)"),
        (
            Tokenizer(LinearEncoder(4, 2), small(), LinearDecoder(4, 2)),
            {"grid": 3, "length": 3},
            "belongs to a quantizer, got Tokenizer; of a tokenizer, pass its .quantizer",
        ),
    ],
    ids=["no-grid", "empty-grid", "scales", "length", "rank", "negative", "tokenizer"],
)
def test_what_cannot_be_created(quantizer, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TokenStore.create(tmp_path / "a", quantizer, **arguments)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (2, 3), "length": 9}, r"token_shape is \[3, 2\] there, \[2, 3\] here"),
        ({"grid": (3, 2), "length": 8}, "length is 9 there, 8 here"),
    ],
)
def test_what_does_not_resume(arguments, message, tmp_path):
    TokenStore.create(tmp_path, small(), (3, 2), length=9).close()
    with pytest.raises(ValueError, match=f"is another store: {message}"):
        TokenStore.create(tmp_path, small(), **arguments)


def test_no_store(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is no token store; TokenStore.create makes"):
            TokenStore(path)
    assert not (tmp_path / "nowhere").exists()


def edited(**changes):
    def edit(folder: Path) -> None:
        path = folder / NAMES[0]
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def cut(name: str, size: int):
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(NAMES[0], 50), r"\.json is damaged: JSONDecodeError"),
        (cut(NAMES[0], 0), r"\.json is damaged: JSONDecodeError"),
        (lambda f: (f / NAMES[0]).write_text("[]"), r"\.json is damaged: TypeError"),
        (lambda f: (f / NAMES[0]).write_text("{}"), r"\.json is damaged: KeyError"),
        (edited(version=2), "describes no part of a TokenStore of version 1"),
        (edited(format="npz"), "describes no part of a TokenStore"),
        (edited(filled=99), "describes no part of a TokenStore"),
        (edited(part=[1, 2]), "describes no part of a TokenStore"),
        (edited(dtype="uint32"), r"\.npy holds \(9,\) rows of .*'<u2'.*wants .*'<u4'"),
        (edited(length=10), r"\.npy holds \(9,\) rows of .*wants \(10,\)"),
        (cut(NAMES[2], -1), r"\.npy is damaged, cut short or not there"),
        (cut(NAMES[2], 30), r"\.npy is damaged, cut short or not there"),
        (cut(NAMES[2], 0), r"\.npy is damaged, cut short or not there"),
        (lambda f: (f / NAMES[2]).unlink(), r"\.npy is damaged, cut short or not there"),
    ],
)
def test_damaged_files(damage, message, tmp_path):
    with TokenStore.create(tmp_path, small(), (3, 2), length=9) as store:
        store.append(drawn(9, 3, 2))
    damage(tmp_path)
    before = files(tmp_path)
    for opened in (TokenStore, partial(TokenStore.create, length=9, grid=(3, 2))):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path, small())
    assert files(tmp_path) == before


def test_nothing_is_pickled(tmp_path):
    rows = np.empty(9, object)
    with TokenStore.create(tmp_path, small(), (3, 2), length=9):
        pass
    np.save(tmp_path / NAMES[2], rows, allow_pickle=True)
    with pytest.raises(ValueError, match=r"\.npy is damaged.*Python objects in dtype"):
        TokenStore(tmp_path)
