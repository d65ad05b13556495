"""Keeps what other commands write out of packed corpora, which are copied, checked and served as a whole."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import UserError

HEAD = 4096  # bytes of a corpus.json that identify it


def check_outside_corpora(path: str | Path, setting: str) -> None:
    """Raise UserError where `path`, which does not need to exist, is or lies directly in a packed corpus.

    Deeper folders are free: one may have indexed the tars of a folder that holds other things too. URLs are not
    looked at. setting: how the user has named it, such as "--output".
    """
    if "://" in str(path):
        return
    absolute = Path(path).absolute()
    for folder in (absolute, absolute.parent):
        if _is_corpus(folder):
            where = "is" if folder == absolute else "lies in"
            raise UserError(f"{setting} {path} {where} the packed corpus {folder}: choose a folder outside of it")


def _is_corpus(folder: Path) -> bool:
    from sharding.shards.schema import FORMAT

    try:
        with (folder / "corpus.json").open("rb") as file:
            return FORMAT.encode() in file.read(HEAD)
    except OSError:
        return False
