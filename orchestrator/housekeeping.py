"""`python -m orchestrator.store`: what lies in the store, whether it is whole, and what of it may go."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

from cavs_model.errors import InputError
from orchestrator import cli
from orchestrator.entries import KINDS, DamagedError, Entries, Entry

DAMAGED_STATUS = 1
UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60}
RUN_KINDS = ("sweep", "comparison", "run")
DEBUG_ENTRIES = 2  # of each kind


def housekeeping() -> int:
    """The verb."""
    made = argparse.ArgumentParser(prog="python -m orchestrator.store", description="List, verify or prune the store.")
    verbs = made.add_subparsers(dest="verb", metavar="list|verify|prune")
    listing = verbs.add_parser("list", help="all entries with size, age, last use and label (the default)")
    verify = verbs.add_parser("verify", help="read everything; status 1 where something is damaged")
    verify.add_argument("--repair", action="store_true", help="set damaged entries aside, to be computed again when needed")
    prune = verbs.add_parser("prune", help="show what would be deleted; with --yes delete it")
    chosen = prune.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--older-than", metavar="AGE", help="what was not used for 30d, 12h or 90m; leftovers and damaged too")
    for kind in RUN_KINDS:
        chosen.add_argument(f"--{kind}", metavar="NAME", help=f"what this {kind} alone used; not while it runs")
    prune.add_argument("--yes", action="store_true", help="delete")
    for each in (made, listing, verify, prune):
        each.add_argument(
            "--outputs", type=Path, default=argparse.SUPPRESS, help="folder of all results, of which store/ is one"
        )
        cli.add_store(each, default=argparse.SUPPRESS)
        each.add_argument("--dry-run", action="store_true", default=argparse.SUPPRESS,
                          help="say what would be read or deleted; change nothing")  # fmt: skip
        each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                          help=f"the first {DEBUG_ENTRIES} entries of each kind alone; not with --yes")  # fmt: skip
    arguments = made.parse_args()
    dry_run, debug = hasattr(arguments, "dry_run"), hasattr(arguments, "debug")
    if getattr(arguments, "yes", False) and (dry_run or debug):
        raise InputError("--yes deletes, --dry-run and --debug only show; leave out one of the two")
    outputs = cli.outputs_folder(getattr(arguments, "outputs", None))
    entries = cli.store_of(getattr(arguments, "store", None), outputs)
    if not entries.exists():
        raise InputError(f"no store at {entries.name}; choose another by --store, --outputs, CAVS_STORE or CAVS_OUTPUTS")
    found = entries.scan()
    if debug:
        found = [entry for kind in KINDS for entry in [each for each in found if each.kind == kind][:DEBUG_ENTRIES]]
    if dry_run and arguments.verb != "prune":
        print(f"would {'read all of' if arguments.verb == 'verify' else 'list'} these in {entries.name}:")
        _print_sums(found)
        return 0
    if arguments.verb == "verify" or getattr(arguments, "yes", False):  # prune without --yes only shows
        entries.make()
        entries.end_dead_leases(lambda text: print(text, flush=True))
    if arguments.verb == "verify":
        return verify_all(entries, found, arguments.repair)
    if arguments.verb == "prune":
        if arguments.older_than is not None:
            prune_old(entries, found, seconds_of(arguments.older_than), arguments.yes)
        else:
            kind = next(kind for kind in RUN_KINDS if getattr(arguments, kind) is not None)
            prune_run(entries, found, f"{kind}/{getattr(arguments, kind)}", arguments.yes)
        return 0
    _print_entries(found)
    _print_sums(found)
    return 0


def verify_all(entries: Entries, found: Sequence[Entry], repair: bool) -> int:
    """Reads every entry found and prints the damaged ones, which are set aside with `repair`. 0, or 1 where some are."""
    damaged = 0
    for entry in found:
        if _problem(entries, entry) is None:
            continue
        with entries.locked_now(entry.key) as held:
            # Under its lock, for it may have been replaced or deleted while it was read.
            problem = _problem(entries, entry) if held else None
            if problem is None:
                continue
            damaged += 1
            aside = f"; set aside as {entries.repair(entry.kind, entry.key)}" if repair else ""
            print(f"damaged: {entries.where(entry.kind, entry.key)}: {problem}{aside}")
    total = _bytes(sum(entry.size_bytes for entry in found))
    print(f"{len(found)} entries, {total}: {f'{damaged} damaged' if damaged else 'all intact'}")
    return DAMAGED_STATUS if damaged else 0


def prune_old(entries: Entries, found: Sequence[Entry], age_seconds: float, delete: bool) -> None:
    """Deletes, or shows, entries found not used for so long, and what killed runs left and damaged entries of that age."""
    limit = time.time() - age_seconds
    _prune(entries, [entry for entry in found if entry.used < limit], delete, limit)
    for leftover, key in entries.leftovers():
        with entries.locked_now(key) if delete else nullcontext(True) as held:
            size, changed = entries.measure(leftover) or (0, limit)
            if not held or changed >= limit:
                continue
            print(f"{'deleted' if delete else 'would delete'} leftover {entries.name}/{leftover}, {_bytes(size)}")
            if delete:
                entries.discard(leftover)


def prune_run(entries: Entries, found: Sequence[Entry], user: str, delete: bool) -> None:
    """Deletes, or shows, what one run alone used of those found. InputError for one that used nothing, with those that did."""
    users = entries.users()
    if user not in users:
        known = ", ".join(sorted(users)) or "none"
        raise InputError(f"the store has no record of {user}; it has: {known}")
    shared = {each for other, used in users.items() if other != user for each in used}
    alone = users[user] - shared
    kept = _prune(entries, [entry for entry in found if (entry.kind, entry.key) in alone], delete)
    print(f"{len(users[user] & shared)} entries are used by others too and stay")
    if delete:
        for kind, key in users[user] - kept:
            entries.forget(user, kind, key)


def seconds_of(age: str) -> float:
    """ "30d", "12h" or "90m" in seconds. InputError."""
    match = re.fullmatch(r"([0-9]{1,6})([dhm])", age)
    if match is None:
        raise InputError(f"--older-than {age!r}: write a whole number and d, h or m for days, hours or minutes, such as 30d")
    return int(match[1]) * float(UNIT_SECONDS[match[2]])


def _prune(entries: Entries, chosen: Sequence[Entry], delete: bool, limit: float | None = None) -> set[tuple[str, str]]:
    """Deletes or shows the entries; those that somebody holds, or used since `limit`, stay and are returned."""
    _print_entries(chosen)
    kept = set()
    for entry in chosen if delete else ():
        with entries.locked_now(entry.key) as held:
            again = entries.last_use(entry.kind, entry.key)
            if held and (limit is None or again is None or again < limit):
                entries.delete(entry.kind, entry.key)
                continue
        print(f"kept, in use: {entry.kind} {entry.key}")
        kept.add((entry.kind, entry.key))
    gone = [entry for entry in chosen if (entry.kind, entry.key) not in kept]
    size = _bytes(sum(entry.size_bytes for entry in gone))
    print(f"{len(gone)} entries, {size}: {'deleted' if delete else 'nothing deleted yet; add --yes to delete them'}")
    return kept


def _problem(entries: Entries, entry: Entry) -> str | None:
    """What is wrong with an entry, None where nothing is."""
    try:
        entries.check(entry.kind, entry.key)
    except DamagedError as error:
        return str(error)
    return None


def _print_sums(entries: Sequence[Entry]) -> None:
    for kind in KINDS:
        of_kind = [entry for entry in entries if entry.kind == kind]
        print(f"{kind}: {len(of_kind)} entries, {_bytes(sum(entry.size_bytes for entry in of_kind))}")


def _print_entries(entries: Iterable[Entry]) -> None:
    now = time.time()
    rows = [("kind", "key", "size", "age", "last use", "label")]
    for entry in entries:
        age = "damaged" if entry.made is None else _age(now - entry.made)
        rows.append((entry.kind, entry.key, _bytes(entry.size_bytes), age, _age(now - entry.used), entry.label))
    if len(rows) == 1:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _age(seconds: float) -> str:
    for unit, length in UNIT_SECONDS.items():
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return "now"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
