"""The node's cache: bounded, shared by processes, consistent after any crash, never wrong bytes."""

import os
import random
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from places import ROOT

from storage.cache import FOLDER, DiskCache, this_process


def content(name: str) -> bytes:
    """The content of an item, derived from its name."""
    rng = random.Random(name)
    return rng.randbytes(rng.randint(500, 5000))


def get(cache: DiskCache, name: str) -> bytes:
    """Read an item, and put it into the cache if it is missing."""
    data = cache.read(name)
    if data is None:
        data = content(name)
        if cache.reserve({name: len(data)})[name]:
            cache.put(name, data)
    return data


def files(cache: DiskCache) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (cache.folder / "items").glob("*/*")}


def bytes_used(cache: DiskCache) -> int:
    """Bytes of complete and reserved items."""
    with cache._transaction() as database:
        return cache._total(database)


def test_items_are_kept_and_read_in_parts(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 10**6)
    assert cache.read("aa") is None
    assert get(cache, "aa") == content("aa")
    assert cache.read("aa", 10, 20) == content("aa")[10:30]
    cache.close()
    again = DiskCache(str(tmp_path), 10**6)
    assert again.read("aa") == content("aa")
    assert bytes_used(again) == len(content("aa"))


def test_the_least_recently_used_items_are_evicted_within_the_budget(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 3000)
    for name in ("a1", "b2", "c3"):
        assert cache.reserve({name: 1000}) == {name: True}
        cache.put(name, name.encode() * 500)
    cache.read("a1")
    cache._recorded = 0.0  # long ago: uses are recorded now
    cache.reserve({"d4": 1000})
    cache.put("d4", b"d4" * 500)
    assert sorted(files(cache)) == ["a1", "c3", "d4"]
    assert cache.counters["cache_evictions"] == 1
    assert bytes_used(cache) == 3000


def test_reserved_items_are_not_evicted_and_count(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 3000)
    assert cache.reserve({"a1": 2000, "b2": 1000}) == {"a1": True, "b2": True}
    assert cache.reserve({"c3": 1}) == {"c3": False}
    assert cache.reserve({"a1": 2000}) == {"a1": False}
    cache.drop(["a1"])
    assert cache.reserve({"c3": 2000}) == {"c3": True}


def test_a_damaged_database_is_replaced_and_other_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    cache = DiskCache(str(tmp_path), 10**6)
    get(cache, "aa")
    cache.close()
    for path in (tmp_path / FOLDER).glob("items.sqlite*"):
        path.write_bytes(b"garbage" * 1000)
    again = DiskCache(str(tmp_path), 10**6)
    assert again.read("aa") is None
    assert get(again, "aa") == content("aa")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache\.folder=.*file/cache cannot be written to"):
        DiskCache(str(tmp_path / "file" / "cache"), 10**6)


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 60_000)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            name = f"{rng.randrange(40):02}"
            assert get(cache, name) == content(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert bytes_used(cache) == sum(files(cache).values()) <= 60_000


PATHS = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests'), str(Path(__file__).parent)]!r}\n"
WORKER = f"""{PATHS}
import random
from test_cache import content, get
from storage.cache import DiskCache
cache, rng = DiskCache(sys.argv[1], 60_000), random.Random(int(sys.argv[2]))
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    name = f"{{rng.randrange(60):02}}"
    assert get(cache, name) == content(name), name
cache.close()
"""


def start(program: str, *arguments: object) -> subprocess.Popen:
    """Run a program that prints a line when it is ready, and wait for that line."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def fill(folder: Path, items: int) -> DiskCache:
    """A closed cache of items of one byte, eight in each folder."""
    cache = DiskCache(str(folder), 10**9)
    names = [f"{number // 8:02x}{number}" for number in range(items)]
    cache.reserve(dict.fromkeys(names, 1))
    for name in names:
        cache.put(name, b"x")
    cache.close()
    return cache


def test_each_opening_checks_the_next_few_items(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("storage.cache.ITEMS_CHECKED", 16)
    cache = fill(tmp_path, 320)  # in 40 folders
    for folder in (cache.folder / "items").iterdir():
        (folder / f"{folder.name}unknown").write_text("after a power cut")
        min(folder.iterdir()).unlink()
    left = [280 + 40]
    while left[-1] > 280:
        DiskCache(str(tmp_path), 10**9).close()
        left.append(len(files(cache)))
        assert left[-2] - 2 <= left[-1] < left[-2]
    assert len(left) == 21
    again = DiskCache(str(tmp_path), 10**9)
    assert bytes_used(again) == sum(files(again).values()) == 280


def test_opening_a_large_cache_reads_as_much_as_opening_a_small_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("storage.cache.ITEMS_CHECKED", 16)
    steps: dict[int, list[None]] = {80: [], 1600: []}
    seen: list[int] = []
    check = DiskCache._check
    monkeypatch.setattr(DiskCache, "_check", lambda *args: seen.append(check(*args)) or seen[-1])
    for items, counted in steps.items():
        fill(tmp_path / str(items), items)
        seen.clear()
        cache = DiskCache(str(tmp_path / str(items)), 10**9)
        assert seen == [8, 8]
        cache._database.set_progress_handler(partial(counted.append, None), 1)  # each instruction of SQLite
        cache._reclaim(cache._database)
        cache._database.set_progress_handler(None, 0)
    assert 0 < len(steps[1600]) <= len(steps[80])


def test_partial_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 10**6)
    for name in (f"{this_process()} 7", f"{2**22 - 1} 123 7", f"{os.getpid()} 1 7"):  # the last number was used before
        (cache.folder / "parts" / name).write_bytes(b"half")
    DiskCache(str(tmp_path), 10**6)
    assert os.listdir(cache.folder / "parts") == [f"{this_process()} 7"]


def test_processes_killed_at_any_moment_leave_a_consistent_cache(tmp_path: Path) -> None:
    rng = random.Random(7)
    survivor = start(WORKER, tmp_path, 1000, 1500)
    for seed in range(6):
        victim = start(WORKER, tmp_path, seed, 10**9)
        time.sleep(rng.uniform(0.01, 0.3))
        victim.kill()
        victim.communicate()
    survivor.communicate(timeout=120)
    assert survivor.returncode == 0  # every item it read was correct
    cache = DiskCache(str(tmp_path), 60_000)  # frees what the killed ones had reserved
    found = files(cache)
    assert all(cache.read(name) == content(name) for name in found)
    assert bytes_used(cache) == sum(found.values()) <= 60_000
    assert not [name for name in found if name.endswith(".part")]
    assert cache.reserve({"zz": 60_000}) == {"zz": True}  # nothing stays reserved for the killed ones


FULL = f"""{PATHS}
import resource, signal
from test_cache import content, get
from storage.cache import DiskCache
cache = DiskCache(sys.argv[1], 10**6)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))  # no file grows beyond
for name in range(30):
    assert get(cache, f"{{name:02}}") == content(f"{{name:02}}")
cache.drop(["00"])
cache.close()
"""


@pytest.mark.parametrize("size", [0, 4096, 20_000])
def test_on_a_full_disk_reading_continues_without_the_cache(tmp_path: Path, size: int) -> None:
    """Neither the items nor the database can be written."""
    command = [sys.executable, "-c", FULL, str(tmp_path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("reading continues without it") == 1
    cache = DiskCache(str(tmp_path), 10**6)
    assert get(cache, "50") == content("50")
    assert bytes_used(cache) == sum(files(cache).values())


OPEN = f"""{PATHS}
from storage.cache import DiskCache
print("ready", flush=True)
sys.stdin.readline()
for folder in sys.argv[1:]:
    cache = DiskCache(folder, 10**6)
    cache.reserve({{"one": 5}})
    cache.close()
print("opened")
"""


def test_processes_that_open_a_new_cache_at_the_same_time_all_succeed(tmp_path: Path) -> None:
    processes = [start(OPEN, *(tmp_path / str(number) for number in range(40))) for _ in range(6)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=120) == ("opened\n", "")
        assert process.returncode == 0


def test_without_its_database_reading_continues_without_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process reopens the database after a fork and after `close`; the disk may be full by then."""
    cache = DiskCache(str(tmp_path), 10**6)
    assert get(cache, "one") == content("one")
    cache.close()
    (cache.folder / "opening").unlink()
    (cache.folder / "opening").mkdir()
    assert get(cache, "one") == content("one")
    assert get(cache, "two") == content("two")
    cache.close()
    assert "reading continues without it" in caplog.text


def test_a_cache_of_an_earlier_version_is_upgraded(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    (folder / "items" / "aa").mkdir(parents=True)
    (folder / "items" / "aa" / "aa").write_bytes(content("aa"))
    with sqlite3.connect(folder / "items.sqlite") as database:
        database.executescript("""
            CREATE TABLE items (name TEXT PRIMARY KEY, size INTEGER NOT NULL, used REAL NOT NULL, owner TEXT)
            WITHOUT ROWID; CREATE INDEX by_use ON items (used); CREATE TABLE total (bytes INTEGER NOT NULL);
            CREATE TRIGGER added AFTER INSERT ON items BEGIN UPDATE total SET bytes = bytes + new.size; END;
            CREATE TRIGGER removed AFTER DELETE ON items BEGIN UPDATE total SET bytes = bytes - old.size; END;
        """)
        database.execute("INSERT INTO total VALUES (0)")
        database.execute("INSERT INTO items VALUES ('aa', ?, 1.0, NULL)", (len(content("aa")),))
        database.execute("INSERT INTO items VALUES ('ab', 500, 1.0, '4194303 1')")
    database.close()
    cache = DiskCache(str(tmp_path), 10**6)
    assert cache.read("aa") == content("aa")
    assert bytes_used(cache) == len(content("aa"))
    assert list(files(cache)) == ["aa"]
