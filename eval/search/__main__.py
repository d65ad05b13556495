"""Searches packed images or clips by text; shows hits in a table, a contact sheet, or on a local web page."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import AccessError, UserError, command
from runtime.program import command_line
from sharding.shards.outside import check_outside_corpora

if TYPE_CHECKING:
    from eval.search.visual_search import VisualSearch

log = logging.getLogger(__name__)


def usual_cache() -> Path:
    """The default folder of encoded visuals."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "singularity" / "features"


@contextmanager
def cache_folder(asked: Path | None) -> Iterator[Path]:
    """The folder of encoded visuals: `asked`, the default, or a temporary one where the default cannot be written.

    Raises:
        AccessError: `asked` cannot be written.
    """
    folder = asked or usual_cache()
    try:
        if asked is None and not folder.is_absolute():
            raise FileNotFoundError(errno.ENOENT, "there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # only writing shows a read-only file system
            pass
    except OSError as error:
        if asked is not None:
            raise AccessError(f"--cache {asked} cannot be written ({error.strerror}): give another folder") from None
        log.warning(
            "%s cannot be written (%s): not caching encoded visuals; set --cache FOLDER",
            folder,
            error.strerror,
        )
        with tempfile.TemporaryDirectory(prefix="singularity-features-") as temporary:
            yield Path(temporary)
        return
    yield folder


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=command_line("eval.search"),
        description=__doc__,
        epilog=f'example: {command_line("eval.search")} runs/msrvtt data/my_clips "a red car" --output hits.jpg',
    )
    result.add_argument("checkpoint", metavar="CHECKPOINT", help="a run, a weights folder or an official .pth")
    result.add_argument("corpus", metavar="CORPUS", help="folder or URL of a packed corpus")
    result.add_argument(
        "query", nargs="?", metavar="QUERY", help="description of what to find; not needed with --serve"
    )
    result.add_argument("--top", type=int, default=12, metavar="N", help="hits (default: %(default)s)")
    result.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help="most similar visuals re-ranked by VTM; 0: none (default: 32, or 0 where the validation of the checkpoint "
        "found re-ranking no better)",
    )
    result.add_argument("--frames", type=int, default=4, metavar="N", help="frames per clip (default: %(default)s)")
    result.add_argument("--output", default="hits.jpg", metavar="FILE", help="contact sheet (default: %(default)s)")
    result.add_argument("--tokenizer", metavar="VOCAB", help="vocabulary, if the checkpoint has none")
    result.add_argument(
        "--cache", type=Path, metavar="FOLDER", help=f"folder of encoded visuals (default: {usual_cache()})"
    )
    result.add_argument("--device", help="cuda or cpu (default: a GPU if PyTorch has one)")
    result.add_argument("--serve", action="store_true", help="serve a search page until Ctrl-C")
    result.add_argument("--host", default="127.0.0.1", help="address of the web page (default: %(default)s)")
    result.add_argument(
        "--port", type=int, default=8765, help="port of the web page; 0: any free one (default: %(default)s)"
    )
    return result  # fmt: skip


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: search once, or serve a page."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.query is None and not options.serve:
        raise UserError("no query: give a QUERY, or --serve for a web page")
    if options.top < 1 or (options.candidates or 0) < 0 or options.frames < 1:
        raise UserError("--top and --frames must be at least 1, --candidates at least 0")
    check_outside_corpora(options.cache or usual_cache(), "--cache")
    from eval.search.server import SearchServer
    from eval.search.visual_search import hits_table, search_sheet

    if options.serve:
        with SearchServer(options.host, options.port, options.top, options.candidates) as server:
            with _encoded(options) as server.search:
                server.serve_until_interrupted()
        return 0
    check_outside_corpora(options.output, "--output")
    with _encoded(options) as search:
        hits = search.find(options.query, options.top, options.candidates)
        search_sheet(search, options.query, hits).save(options.output, "JPEG", quality=88)
    sys.stdout.write(f"{hits_table(hits)}\n\ncontact sheet: {options.output}\n")
    return 0


@contextmanager
def _encoded(options: argparse.Namespace) -> Iterator[VisualSearch]:
    """The search for the given options, with its cache."""
    from eval.search.visual_search import VisualSearch
    from loaders.decode.choice import usual_device

    device = options.device or usual_device()
    with cache_folder(options.cache) as cache:
        yield VisualSearch(options.checkpoint, options.corpus, cache, options.frames, options.tokenizer, device)


if __name__ == "__main__":
    sys.exit(main())
