"""`fxopt cache`: what is in the directory of emitted kernels; empty it, take it elsewhere, bring it here."""

from __future__ import annotations

import json
import zipfile
import zlib
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from fxopt.commands.outputs import check_output, writing
from fxopt.errors import UserError
from fxopt.runtime.kernel_cache import KernelCache, sealed, unsealed


class NotAnArchive(UserError, ValueError):
    """A file that `fxopt cache import` cannot read."""

    message = "{file} cannot be read as an archive of `fxopt cache export`: {reason}."


def info(cache: KernelCache, console: Console, *, as_json: bool = False) -> int:
    """Where the cache is, what it holds and what is broken in it. Exit code 0."""
    entries = cache.entries()
    broken = [path.name for path, _ in entries if cache.read(path) is None]
    facts = {
        "directory": str(cache.directory),
        "kernels": sum(path.suffix == ".py" for path, _ in entries),
        "measurements": sum(path.suffix == ".json" for path, _ in entries),
        "broken": broken,
        "bytes": sum(state.st_size for _, state in entries),
        "limit": cache.limit,
        "oldest_use": entries[0][1].st_mtime if entries else None,
        "newest_use": entries[-1][1].st_mtime if entries else None,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    table = Table(show_header=False, box=None)
    table.add_row("directory", str(cache.directory))
    table.add_row("kernels", str(facts["kernels"]))
    table.add_row("measurements", str(facts["measurements"]))
    size, limit = decimal(sum(state.st_size for _, state in entries)), decimal(cache.limit)
    table.add_row("size", f"{size} of {limit}")
    if entries:
        table.add_row("used", f"{_day(entries[0][1].st_mtime)} to {_day(entries[-1][1].st_mtime)}")
    if broken:
        table.add_row("[yellow]broken[/yellow]", f"{len(broken)}, written anew when needed")
    console.print(table)
    return 0


def clear(cache: KernelCache, console: Console) -> int:
    """Remove all. Exit code 0."""
    count = cache.clear()
    console.print(f"{count} file{'' if count == 1 else 's'} removed from {cache.directory}", highlight=False)
    return 0


def export(cache: KernelCache, file: Path, console: Console) -> int:
    """Write all intact entries to a zip archive. Exit code 0.

    Raises:
        CannotWrite: the file cannot be written.
    """
    check_output(file)
    count = 0
    with writing(file), zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, _ in sorted(cache.entries()):
            text = cache.read(path)
            if text is not None:
                archive.writestr(path.name, sealed(text))
                count += 1
    console.print(f"{count} entries written to {file}", highlight=False)
    return 0


def import_(cache: KernelCache, file: Path, console: Console) -> int:
    """Take over the intact entries of an archive; the others are counted. Exit code 1 if there is any other.

    Raises:
        NotAnArchive: the file is missing, no zip archive, a damaged or an encrypted one.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise NotAnArchive(file=file, reason=error) from error
    taken = sum(_taken(cache, name, content) for name, content in members.items())
    refused = len(members) - taken
    tail = f", [yellow]{refused} refused: not written by fxopt, or damaged[/yellow]" if refused else ""
    console.print(f"{taken} entries taken over to {cache.directory}{tail}", highlight=False)
    return int(bool(refused))


def _taken(cache: KernelCache, name: str, content: bytes) -> bool:
    """Store one entry under its own name. A file is run only if it is what fxopt emits, whoever wrote it."""
    text = unsealed(content.decode(errors="replace"))
    plain = Path(name).name == name and Path(name).suffix in (".py", ".json")
    return plain and text is not None and cache.store(cache.directory / name, text)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
