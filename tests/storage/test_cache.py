"""The node's cache: bounded, shared, whole after any crash, and never wrong."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from functools import partial
from pathlib import Path

import pytest
from places import ROOT

from storage.cache import FOLDER, DiskCache, this_process


def content(name: str) -> bytes:
    """What an item of that name must hold: its bytes tell whose they are."""
    rng = random.Random(name)
    return rng.randbytes(rng.randint(500, 5000))


def get(cache: DiskCache, name: str) -> bytes:
    """An item as a reader gets it."""
    data = cache.read(name)
    if data is None:
        data = content(name)
        if cache.reserve({name: len(data)})[name]:
            cache.put(name, data)
    return data


def files(cache: DiskCache) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (cache.folder / "items").glob("*/*")}


def test_items_are_kept_and_read_in_parts(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 10**6)
    assert cache.read("aa") is None
    assert get(cache, "aa") == content("aa")
    assert cache.read("aa", 10, 20) == content("aa")[10:30]
    cache.close()
    again = DiskCache(str(tmp_path), 10**6)
    assert again.read("aa") == content("aa")
    assert again.bytes_used() == len(content("aa"))


def test_the_least_recently_used_leave_first_and_the_budget_holds(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 3000)
    for name in ("a1", "b2", "c3"):
        assert cache.reserve({name: 1000}) == {name: True}
        cache.put(name, name.encode() * 500)
    cache.read("a1")
    cache._recorded = 0.0  # long ago: uses are noted now
    cache.reserve({"d4": 1000})
    cache.put("d4", b"d4" * 500)
    assert sorted(files(cache)) == ["a1", "c3", "d4"]
    assert cache.counters["cache_evictions"] == 1
    assert cache.bytes_used() == 3000


def test_what_is_being_fetched_does_not_leave_and_counts(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 3000)
    assert cache.reserve({"a1": 2000, "b2": 1000}) == {"a1": True, "b2": True}
    assert cache.reserve({"c3": 1}) == {"c3": False}
    assert cache.reserve({"a1": 2000}) == {"a1": False}
    cache.drop(["a1"])
    assert cache.reserve({"c3": 2000}) == {"c3": True}


def test_a_damaged_list_begins_anew_and_touches_nothing_else(tmp_path: Path) -> None:
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
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            name = f"{rng.randrange(40):02}"
            if get(cache, name) != content(name):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(files(cache).values()) <= 60_000
    assert cache.bytes_used() == sum(files(cache).values())


PATHS = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
WORKER = """
import random, sys
sys.path[:0] = {paths!r}
from test_cache import content, get
from storage.cache import DiskCache
cache, rng = DiskCache(sys.argv[1], 60_000), random.Random(int(sys.argv[2]))
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    name = f"{{rng.randrange(60):02}}"
    assert get(cache, name) == content(name), name
cache.close()
"""


def start(folder: Path, seed: int, rounds: int) -> subprocess.Popen:
    program = WORKER.format(paths=PATHS)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(seed), str(rounds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_process_was_removing_when_it_died_takes_no_room(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 60_000)
    assert cache.reserve({"00": 100}) == {"00": True}
    cache.put("00", b"x" * 100)
    (path,) = (tmp_path / FOLDER / "items").glob("*/*")
    path.unlink()  # the file leaves before its row does
    assert DiskCache(str(tmp_path), 60_000).bytes_used() == 0


def fill(folder: Path, items: int) -> DiskCache:
    """A closed cache that holds so many items of one byte, eight in each folder."""
    cache = DiskCache(str(folder), 10**9)
    names = [f"{number // 8:02x}{number}" for number in range(items)]
    cache.reserve(dict.fromkeys(names, 1))
    for name in names:
        cache.put(name, b"x")
    cache.close()
    return cache


def test_opening_looks_at_a_few_items_and_the_next_opening_at_the_next_ones(tmp_path: Path, monkeypatch) -> None:
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
    assert again.bytes_used() == sum(files(again).values()) == 280


def test_opening_a_large_cache_reads_no_more_than_opening_a_small_one(tmp_path: Path, monkeypatch) -> None:
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
        cache._database.set_progress_handler(partial(counted.append, None), 1)  # each step of SQLite's machine
        cache._reclaim(cache._database)
        cache._database.set_progress_handler(None, 0)
    assert 0 < len(steps[1600]) <= len(steps[80])


def test_a_cache_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
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
    assert cache.bytes_used() == len(content("aa"))
    assert list(files(cache)) == ["aa"]


def test_what_a_dead_process_was_writing_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 10**6)
    for name in (
        f"{this_process()} 7",
        f"{2**22 - 1} 123 7",
        f"{os.getpid()} 1 7",
    ):  # the last one's number was used before
        (cache.folder / "parts" / name).write_bytes(b"half")
    DiskCache(str(tmp_path), 10**6)
    assert os.listdir(cache.folder / "parts") == [f"{this_process()} 7"]


def test_processes_killed_at_any_moment_leave_a_whole_cache_to_the_others(tmp_path: Path) -> None:
    rng = random.Random(7)
    survivor = start(tmp_path, 1000, 1500)
    for seed in range(6):
        victim = start(tmp_path, seed, 10**9)
        time.sleep(rng.uniform(0.01, 0.3))
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
    assert survivor.wait(120) == 0  # every item it read was right
    survivor.stdout.close()
    cache = DiskCache(str(tmp_path), 60_000)  # takes back what the dead had reserved
    found = files(cache)
    assert all(zlib.crc32(cache.read(name)) == zlib.crc32(content(name)) for name in found)
    assert cache.bytes_used() == sum(found.values()) <= 60_000
    assert not [name for name in found if name.endswith(".part")]
    assert cache.reserve({"zz": 60_000}) == {"zz": True}  # nothing holds room for the dead


FULL = """
import resource, signal, sys
sys.path[:0] = {paths!r}
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
def test_a_disk_that_is_full_costs_the_cache_and_nothing_else(tmp_path: Path, size: int) -> None:
    """Neither the items nor their list can be written."""
    program = FULL.format(paths=PATHS)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(size)], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("reading continues without it") == 1
    cache = DiskCache(str(tmp_path), 10**6)
    assert get(cache, "50") == content("50")
    assert cache.bytes_used() == sum(files(cache).values())


OPEN = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from storage.cache import DiskCache
print("begun", flush=True)
sys.stdin.readline()
for folder in sys.argv[1:]:
    cache = DiskCache(folder, 10**6)
    cache.reserve({{"one": 5}})
    cache.close()
print("opened")
"""


def test_processes_that_open_a_new_cache_at_once_all_get_it(tmp_path: Path) -> None:
    folders = [str(tmp_path / str(number)) for number in range(40)]
    command = [sys.executable, "-c", OPEN, *folders]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(6)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=120) == ("opened\n", "")
        assert process.returncode == 0


def test_a_list_that_cannot_be_opened_again_costs_the_cache_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process opens its list anew after a fork, and after `close`; the disk may have become full meanwhile."""
    cache = DiskCache(str(tmp_path), 10**6)
    assert get(cache, "one") == content("one")
    cache.close()
    (cache.folder / "opening").unlink()
    (cache.folder / "opening").mkdir()
    assert get(cache, "one") == content("one")
    assert get(cache, "two") == content("two")
    cache.close()
    assert "reading continues without it" in caplog.text
