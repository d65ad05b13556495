"""Annotation files with flipped, lost and inserted bytes: rows, or one line that names the file; nothing else."""

import bz2
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.errors import UserError
from sharding.annotations.columns import Columns
from sharding.annotations.config import Reading
from sharding.annotations.reading import read_rows
from sharding.annotations.staging import stage

RECORDS = [
    {"image": f"{n}.jpg", "caption": f'a "big" dog,\n{n} é 😀', "question_id": n, "start": n / 2, "end": n + 1.0}
    for n in range(12)
]
COCO = {
    "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(5)],
    "annotations": [{"image_id": n % 5, "caption": f"text {n}"} for n in range(9)],
}
QUOTED = "".join(
    '{image},"{caption}",{start},{end}\n'.format(**{**r, "caption": r["caption"].replace('"', '""')}) for r in RECORDS
)
PIECES = [b"\\ud83d", b"\\u", b"NaN", b"\xed\xa0\x80", b"9" * 30, *(bytes([byte]) for byte in b'"\0\xff[},\n\r\\')]


def parquet() -> bytes:
    buffer = io.BytesIO()
    options = {"row_group_size": 5, "compression": "none", "write_page_checksum": True}
    pq.write_table(pa.Table.from_pylist(RECORDS), buffer, **options)
    return buffer.getvalue()


FILES = {
    "a.json": (json.dumps(RECORDS).encode(), "auto"),
    "b.json": (json.dumps(RECORDS, indent=1, ensure_ascii=False).encode(), "auto"),
    "c.json": (json.dumps(COCO).encode(), "coco"),
    "d.jsonl": ("\n".join(map(json.dumps, RECORDS)).encode(), "auto"),
    "e.csv": (f"image,caption,start,end\n{QUOTED}".encode(), "auto"),
    "f.tsv": (b"image\tcaption\n" + b"".join(b'%d.jpg\ta "dog"\n' % n for n in range(12)), "auto"),
    "g.parquet": (parquet(), "auto"),
    "h.json.gz": (gzip.compress(json.dumps(RECORDS).encode()), "auto"),
    "i.csv.bz2": (bz2.compress(f"image,caption,start,end\n{QUOTED}".encode()), "auto"),
    "j.token": (b"".join(b"%d.jpg#0\ta dog\n" % n for n in range(12)), "flickr"),
}


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one to three faults."""
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            data = data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place] + data[place + chance.randint(1, 9) :]
        elif kind == 2:
            data = data[:place] + chance.choice(PIECES) + data[place:]
        elif chance.random() < 0.3:
            data = data[:place]
    return data


@pytest.mark.parametrize("name", FILES)
def test_damage_gives_rows_or_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    data, form = FILES[name]
    chance = random.Random(name)
    columns = Columns(media="file_name") if form == "coco" else Columns()
    path = tmp_path / name
    messages = []
    for attempt in range(120):
        path.write_bytes(damaged(data, chance))
        try:
            rows = list(read_rows([str(path)], Reading(format=form, columns=columns, skip_bad_rows=attempt % 2 == 0)))
        except UserError as error:
            messages.append(str(error))
            continue
        staged = stage(rows, tmp_path / "rows.sqlite", tmp_path)
        assert staged.rows == len(rows)
        assert sum(item.rows for item in staged.between(0, staged.items)) == staged.kept
    assert messages
    assert not [each for each in messages if name not in each or "\n" in each or "codec can't" in each]
