"""Folders of reads: who may take up which, what goes when one is done, and where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from faletl.config import Settings
from faletl.errors import StorageError, TamperedError
from faletl.fal.pages import Page
from faletl.landing import extracts
from faletl.landing.extracts import Call, LandedPage, Manifest, OpenExtract, SealedExtract
from faletl.windows import Window
from tests.conftest import settings_for

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
DAY = Window.of_day(date(2026, 11, 22))
UP_TO_NOON = Window(DAY.start, DAY.start + timedelta(hours=12))
BODY = b'{"usage":[],"next_cursor":null,"has_more":false}'
ASKED = {"endpoint_id": ("fal-ai/flux/dev",)}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Nothing has landed; nobody is asked."""
    return settings_for("http://127.0.0.1:1", tmp_path)


def read(settings: Settings, at: datetime = NOW, window: Window = DAY) -> OpenExtract:
    """A read of acme's window that began then, with one page so far."""
    attempt = extracts.begin(settings, "acme", "usage", window, at)
    attempt.land("rows", ASKED, page(1))
    return attempt


def page(number: int) -> Page:
    """A page of the only question that is asked here."""
    return Page(number, BODY, f"request-{number}", 0, None)


def sealed(attempt: OpenExtract, run_id: str = "a-run", window: Window = DAY) -> SealedExtract:
    """The read, made complete with the page that it has."""
    return attempt.seal(
        manifest_of(attempt, attempt.describe_existing("rows", ASKED, page(1)), run_id, window)
    )


def manifest_of(
    attempt: OpenExtract, record: LandedPage, run_id: str = "a-run", window: Window = DAY
) -> Manifest:
    """The paper of a read of that one page."""
    return Manifest(
        load_id=attempt.load_id, run_id=run_id, account="acme", resource="usage",
        window_start=window.start, window_end=window.end, started_at=attempt.started_at,
        finished_at=NOW, planned_from=DAY.day, fencing_token=0,
        calls=[Call("rows", "/models/usage", {"endpoint_id": ["fal-ai/flux/dev"]}, [record])],
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    """The pages and papers of a read: what lies in its folder, but for its lock."""
    return sorted(path.name for path in folder.glob("[!.]*"))


# --- Where a read lies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("account", "readable"),
    [
        ("a" * 65, "a" * 40),
        ("Acme GmbH", "acme-gmbh"),
        ("../acme/", "acme"),
        ("-acme", "acme"),
        ("ac_me.", "ac_me"),
        ("☃", "account"),
    ],
)
def test_an_account_has_a_folder_that_people_can_read_and_no_other_account_has(
    account: str, readable: str, settings: Settings
) -> None:
    digest = hashlib.sha256(account.encode()).hexdigest()[:12]

    assert parts(settings, account)[0] == f"{readable}.{digest}"


@pytest.mark.parametrize("account", ["acme", "4-acme_2", "a" * 64])
def test_a_plain_label_is_a_folder_as_it_is(account: str, settings: Settings) -> None:
    folder, resource, day, load_id = parts(settings, account)

    assert (folder, resource, day) == (account, "usage", "2026-11-22")
    assert load_id.startswith("20261124T120000000000Z-")


def parts(settings: Settings, account: str) -> tuple[str, ...]:
    """Where a read of the account's usage lies."""
    attempt = extracts.begin(settings, account, "usage", DAY, NOW)
    attempt.close()
    assert attempt.started_at == NOW
    return attempt.folder.relative_to(extracts.root(settings)).parts


# --- Batches that were asked ahead ----------------------------------------------------------------


@pytest.fixture
def ahead(settings: Settings) -> list[str]:
    """Three reads of one window, each with the first pages to a question of its own."""
    ids = [extracts.new_extract_id(NOW + timedelta(seconds=n)) for n in range(3)]
    for number, load_id in enumerate(ids):
        attempt = extracts.open_ahead(settings, "acme", "analytics", DAY, load_id)
        assert attempt is not None
        attempt.land("rows", {"endpoint_id": (f"batch-{number}",)}, page(1))
        attempt.close()
    return ids


def gathered(settings: Settings, ahead: Sequence[str], since: datetime = NOW) -> OpenExtract | None:
    """One read of all of them, of no page older than `since`."""
    return extracts.gather(settings, "acme", "analytics", DAY, ahead, since)


def batches_in(attempt: OpenExtract) -> list[int]:
    """Of which batches the read has the page that was asked ahead."""
    return [
        number
        for number in range(3)
        if list(attempt.resumable_pages("rows", {"endpoint_id": (f"batch-{number}",)})) == [BODY]
    ]


def test_what_was_asked_ahead_becomes_one_read(settings: Settings, ahead: list[str]) -> None:
    whole = gathered(settings, ahead)

    assert whole is not None
    assert (whole.load_id, whole.started_at) == (ahead[0], NOW)
    assert batches_in(whole) == [0, 1, 2]
    assert [folder.name for folder in extracts.all_reads(settings)] == ahead[:1]


def test_a_batch_that_somebody_is_at_is_left_to_them(settings: Settings, ahead: list[str]) -> None:
    theirs = extracts.open_ahead(settings, "acme", "analytics", DAY, ahead[1])
    assert theirs is not None

    whole = gathered(settings, ahead)

    assert whole is not None
    assert batches_in(whole) == [0, 2]
    theirs.land("rows", {"endpoint_id": ("batch-1",)}, page(2))
    assert len(names(theirs.folder)) == 2


def test_a_batch_that_nobody_asked_ahead_is_missing_and_no_more(
    settings: Settings, ahead: list[str]
) -> None:
    whole = gathered(settings, [*ahead, extracts.new_extract_id(NOW)])

    assert whole is not None
    assert batches_in(whole) == [0, 1, 2]
    assert list(whole.resumable_pages("rows", {"endpoint_id": ("batch-3",)})) == []


def test_nothing_is_gathered_of_batches_that_are_too_old_taken_or_none(
    settings: Settings, ahead: list[str]
) -> None:
    assert gathered(settings, []) is None
    assert gathered(settings, ahead, since=NOW + timedelta(microseconds=1)) is None
    at_work = extracts.open_ahead(settings, "acme", "analytics", DAY, ahead[0])
    assert at_work is not None
    assert gathered(settings, ahead) is None
    at_work.close()
    assert gathered(settings, ahead) is not None


def test_a_read_that_is_complete_is_not_asked_ahead_again(settings: Settings) -> None:
    done = sealed(read(settings)).manifest.load_id

    assert extracts.open_ahead(settings, "acme", "usage", DAY, done) is None
    assert extracts.resume(settings, "acme", "usage", DAY, NOW) is not None  # as another read


def test_a_folder_that_another_run_took_up_first_is_left_to_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed(read(settings))
    theirs = read(settings)
    ids = iter([theirs.load_id, extracts.new_extract_id(NOW)])
    monkeypatch.setattr(extracts, "new_extract_id", lambda _: next(ids))
    monkeypatch.setattr(extracts, "_folder_next_to", lambda _: theirs.folder)

    assert extracts.resume(settings, "acme", "usage", DAY, NOW) is None
    ours = extracts.begin(settings, "acme", "usage", DAY, NOW)
    assert ours.folder != theirs.folder
    assert len(names(theirs.folder)) == 1


# --- Reads of a run -------------------------------------------------------------------------------


def test_a_run_finds_its_own_newest_read_of_that_very_window(settings: Settings) -> None:
    later = [NOW + timedelta(minutes=n) for n in range(5)]
    sealed(read(settings, later[0]), "mine")
    mine = sealed(read(settings, later[1]), "mine")
    sealed(read(settings, later[2]), "other")
    of_a_part = sealed(read(settings, later[3], UP_TO_NOON), "mine", UP_TO_NOON)
    read(settings, later[4]).close()  # of no run yet: it has no manifest

    def found(window: Window, run_id: str = "mine") -> SealedExtract | None:
        return extracts.read_of_run(settings, "acme", "usage", window, run_id)

    assert found(DAY) == mine
    assert found(UP_TO_NOON) == of_a_part
    assert found(DAY, "nobody's") is None
    assert found(Window.of_day(date(2026, 11, 21))) is None


def test_a_damaged_manifest_of_a_run_is_told_and_not_passed_over(settings: Settings) -> None:
    done = sealed(read(settings))
    (done.folder / extracts.MANIFEST).write_bytes(b"{}")

    with pytest.raises(TamperedError, match=r"manifest\.json cannot be read"):
        extracts.read_of_run(settings, "acme", "usage", DAY, "a-run")


# --- What is left behind --------------------------------------------------------------------------


@pytest.fixture
def left(settings: Settings) -> Iterator[dict[str, Path]]:
    """Reads in each state, in the order of their beginning."""
    done = sealed(read(settings))
    at_work, interrupted, fresh = (read(settings, NOW + timedelta(seconds=n)) for n in (1, 2, 3))
    interrupted.close()
    fresh.close()
    yield {
        "done": done.folder,
        "at work": at_work.folder,
        "interrupted": interrupted.folder,
        "fresh": fresh.folder,
    }
    at_work.close()


def test_interrupted_is_what_began_before_and_is_neither_done_nor_at_work(
    settings: Settings, left: dict[str, Path]
) -> None:
    def found(before: int) -> list[Path]:
        return list(extracts.interrupted_reads(settings, NOW + timedelta(seconds=before)))

    assert found(3) == [left["interrupted"]]
    assert found(2) == []
    assert list(extracts.all_reads(settings)) == list(left.values())
    assert list(extracts.complete_reads(settings)) == [left["done"]]
    assert list(extracts.complete_reads(settings, DAY.day)) == [left["done"]]
    assert list(extracts.complete_reads(settings, date(2026, 11, 21))) == []


def test_a_read_is_deleted_whole_and_its_day_with_the_last(settings: Settings) -> None:
    first, second = sealed(read(settings)), sealed(read(settings, NOW + timedelta(seconds=1)))
    assert extracts.size(first.folder) == sum(path.stat().st_size for path in first.folder.iterdir())

    extracts.drop(first.folder)
    assert list(extracts.all_reads(settings)) == [second.folder]
    extracts.drop(second.folder)
    assert not second.folder.parent.exists()


def test_a_sealed_read_holds_the_pages_of_its_manifest_and_nothing_else(settings: Settings) -> None:
    attempt = read(settings)
    attempt.land("rows", {"endpoint_id": ("a batch that was halved",)}, page(1))

    done = sealed(attempt)

    (kept,) = done.manifest.pages("rows")
    assert names(done.folder) == sorted([extracts.MANIFEST, kept.file])
    assert not (done.folder / extracts._LOCK).exists()
    assert done.body(kept) == BODY


def test_a_read_whose_pages_were_deleted_is_never_complete(settings: Settings) -> None:
    attempt = read(settings)
    record = attempt.describe_existing("rows", ASKED, page(1))
    (attempt.folder / record.file).unlink()

    with pytest.raises(StorageError, match=f"{record.file} was deleted while the window was fetched"):
        attempt.seal(manifest_of(attempt, record))
    assert not extracts.is_complete(attempt.folder)


def test_a_read_takes_over_the_rows_of_the_one_before_under_another_name(settings: Settings) -> None:
    before = sealed(read(settings))
    attempt = read(settings, NOW + timedelta(seconds=1))

    (part,) = before.manifest.parts
    (again,) = attempt.copy_rows_of(before, part)

    (was,), (now,) = before.manifest.pages("rows"), again.pages
    assert (again.label, again.path, again.query) == (
        "again",
        "/models/usage",
        before.manifest.calls[0].query,
    )
    assert now.file == f"again-0-{was.file}"
    assert (now.sha256, now.bytes, now.rows) == (was.sha256, was.bytes, was.rows)
    assert (attempt.folder / now.file).read_bytes() == (before.folder / was.file).read_bytes()


def test_a_read_keeps_a_part_of_the_one_before_as_it_is(settings: Settings) -> None:
    before = sealed(read(settings))
    attempt = read(settings, NOW + timedelta(seconds=1))
    (part,) = before.manifest.parts

    assert attempt.keep(before, part) == before.manifest.calls
    (kept,) = before.manifest.pages("rows")
    assert (attempt.folder / kept.file).read_bytes() == (before.folder / kept.file).read_bytes()


def asked_for(label: str, first: int, end: int) -> Call:
    """A call for these hours of the day."""
    hours = {"start": [f"2026-11-22T{first:02d}:00:00Z"], "end": [f"2026-11-22T{end:02d}:00:00Z"]}
    return Call(label, "/models/usage", hours, [])


def test_the_parts_of_a_window_are_those_that_were_asked_for_in_order_of_time(
    settings: Settings,
) -> None:
    manifest = sealed(read(settings)).manifest
    assert [part.window for part in manifest.parts] == [DAY]  # calls without bounds
    assert manifest.whole is None
    calls = [asked_for("rows", 0, 12), asked_for("rows", 12, 18), asked_for("proof", 0, 12)]

    halved = msgspec.structs.replace(manifest, calls=calls)

    assert [(part.window.end.hour, len(part.calls)) for part in halved.parts] == [(12, 2), (18, 1)]
    assert [part.has("proof") for part in halved.parts] == [True, False]
    assert halved.whole is None
    bounds = {"start": ["2026-11-22T00:00:00Z"], "end": ["2026-11-23T00:00:00Z"]}
    total = Call("proof", "/models/usage", bounds, [])
    totalled = msgspec.structs.replace(halved, calls=[*calls, total])
    assert totalled.parts == halved.parts
    assert totalled.whole == extracts.Part(DAY, [total])


@pytest.mark.parametrize(
    "bounds",
    [("2026-11-22T12:00:00Z", "2026-11-22T00:00:00Z"), ("x", "2026-11-22T00:00:00Z"),
     ("2026-11-22T00:00:00+01:00", "2026-11-22T12:00:00+01:00"), ("2026-11-22T00:00:00", "2026-11-22")],
    ids=["backwards", "no instant", "not in UTC", "without an offset"],
)  # fmt: skip
def test_a_manifest_whose_parts_cannot_be_is_none(bounds: tuple[str, str], settings: Settings) -> None:
    done = sealed(read(settings))
    call = Call("rows", "/models/usage", {"start": [bounds[0]], "end": [bounds[1]]}, [])
    paper = json.loads(msgspec.json.encode(done.manifest))
    paper["calls"] = [json.loads(msgspec.json.encode(call))]
    (done.folder / extracts.MANIFEST).write_text(json.dumps(paper), encoding="utf-8")

    with pytest.raises(TamperedError, match="cannot be read"):
        extracts.open_read(done.folder)


def test_a_manifest_of_an_older_faletl_does_not_say_when_fal_began(settings: Settings) -> None:
    done = sealed(read(settings))
    paper = json.loads(msgspec.json.encode(done.manifest))
    del paper["fal_started_at"]
    (done.folder / extracts.MANIFEST).write_text(json.dumps(paper), encoding="utf-8")

    assert extracts.open_read(done.folder).manifest.fal_started_at is None


def test_a_read_that_is_given_up_leaves_nothing(settings: Settings) -> None:
    attempt = read(settings)
    attempt.discard()

    assert list(extracts.all_reads(settings)) == []
    assert extracts.resume(settings, "acme", "usage", DAY, NOW) is None


def test_what_is_in_the_way_of_a_read_is_told_with_its_path(settings: Settings) -> None:
    load_id = extracts.new_extract_id(NOW)
    day = settings.landing / Path("acme", "usage", "2026-11-22")
    day.mkdir(parents=True)
    (day / load_id).write_bytes(b"")

    with pytest.raises(StorageError, match=f"{day / load_id}"):
        extracts.open_ahead(settings, "acme", "usage", DAY, load_id)


def test_a_page_that_was_changed_is_told_with_what_to_do(settings: Settings) -> None:
    done = sealed(read(settings))
    (kept,) = done.manifest.pages("rows")
    (done.folder / kept.file).write_bytes(b"")

    told = "is not the one that fal sent; restore it, or fetch the window again with faletl run --start"
    with pytest.raises(TamperedError, match=f"{kept.file} {told}"):
        done.body(kept)


def test_a_receipt_that_cannot_be_read_is_told_with_its_path(settings: Settings) -> None:
    done = sealed(read(settings))
    (done.folder / extracts.RECEIPT).mkdir()

    with pytest.raises(StorageError, match=r"cannot read .*loaded\.json: Is a directory") as told:
        extracts.receipt_of(done.folder)
    assert told.value.facts["file"] == str(done.folder / extracts.RECEIPT)
