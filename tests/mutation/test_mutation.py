"""Every barrier and index test of the kernels in csrc is needed by something that a scenario sees.

Here one of each thing that can be wrong in a file, and those of the files that have changed; in `make test-all` all.
That this can fail is shown by tests/emulator/test_mutants.py.
"""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.mutation.changes import COMMITS, changed_files
from tests.mutation.equivalent import EQUIVALENT, reason
from tests.mutation.mutants import SURVIVED, Mutant, Mutation, Scenario, Verdict
from tests.mutation.scan import Sources
from tests.native_cases import built

ROOT = Path(__file__).resolve().parents[2]
SECONDS_OF_CHANGED = 20.0  # of processor time; a change that needs more leaves the rest to `make test-all`

# What can be wrong in attention's kernels on tensor cores, at least: kind of site, alteration.
SM80 = {
    ("__syncthreads", None),
    ("cp.async.commit_group", None),
    ("cp.async.wait_group", None),
    ("cp.async.wait_group", "leaves one more group"),
}
SM90 = {
    *(("mbarrier.init", how) for how in (None, "one arrival fewer", "one arrival more")),
    *(("mbarrier.arrive", how) for how in (None, "twice", "16 bytes fewer", "16 bytes more", "half of the bytes")),
    *(("mbarrier.try_wait", how) for how in (None, "the other parity")),
    *((f"fence.{what}", None) for what in ("mbarrier_init", "proxy.async")),
    *((f"wgmma.{what}", None) for what in ("fence", "commit_group", "wait_group")),
    ("wgmma.wait_group", "leaves one more group"),
    *((f"cp.async.bulk.{what}", None) for what in ("commit_group", "wait_group")),
    ("cp.async.bulk.wait_group", "leaves one more group"),
}
ATTENTION = {"forward_sm80.cu": SM80, "backward_sm80.cu": SM80, "forward_sm90.cu": SM90}


def scenarios() -> list[Scenario]:
    found = []
    for path in sorted((Path(__file__).parent / "scenarios").glob("[!_]*.py")):
        found += importlib.import_module(f"tests.mutation.scenarios.{path.stem}").SCENARIOS
    return found


@pytest.fixture(scope="module")
def mutation() -> Mutation:
    built("emulated")
    return Mutation(scenarios(), Sources(ROOT))


def complaints(verdicts: Iterable[Verdict]) -> str:
    """Of mutants that survived and are not listed, and of those that are listed and did not."""
    found = []
    for verdict in verdicts:
        assert verdict.mutant
        why = reason(verdict.mutant.site.kind, verdict.mutant.key)
        if verdict.outcome == SURVIVED and why is None:
            found.append(f"nothing notices that this is switched off: {verdict.text()}")
        elif verdict.outcome != SURVIVED and why is not None:
            found.append(f"listed as equivalent ({why}), and noticed: {verdict.text()}")
    return "\n\n".join(found)


def test_the_unchanged_kernels_give_the_same_in_a_child(mutation: Mutation) -> None:
    """Bit by bit, and without a finding: what a mutant does otherwise is the mutant's."""
    assert mutation.control.outcome == SURVIVED, mutation.control.text()


def test_every_site_of_the_sources_is_reached(mutation: Mutation) -> None:
    key = mutation.sources.key
    unlisted = [call for call in mutation.unreached if (key(call.place),) not in EQUIVALENT]
    said = [f'{call.name} at {call.place}\n    "{key(call.place)}",' for call in unlisted]
    assert not unlisted, "no scenario meets\n" + "\n".join(said)


def test_every_site_that_is_met_was_found_in_the_sources(mutation: Mutation) -> None:
    """Or the test above would miss what is not met."""
    found = {call.place for call in mutation.sources.calls}
    missing = [mutant.text() for mutant in mutation.mutants if not found.issuperset(mutant.places)]
    assert not missing, "\n".join(missing)


def test_no_line_has_two_sites_that_cannot_be_told_apart(mutation: Mutation) -> None:
    assert not mutation.sources.crowded(), "put them on lines of their own"
    keys = [(mutant.site.kind, mutant.key) for mutant in mutation.mutants]
    assert len(set(keys)) == len(keys)


def test_what_is_listed_as_equivalent_is_there(mutation: Mutation) -> None:
    there = {mutant.key for mutant in mutation.mutants}
    there |= {(mutation.sources.key(call.place),) for call in mutation.unreached}
    assert not EQUIVALENT.keys() - there


def one_of_each(mutation: Mutation) -> dict[tuple[str, str, str | None], Mutant]:
    """By file of the kernel, or of a helper that was not inlined, kind and alteration the first mutant that can be
    noticed."""
    found: dict[tuple[str, str, str | None], Mutant] = {}
    for mutant in mutation.mutants:
        if reason(mutant.site.kind, mutant.key) is None:
            file = mutant.places[-1].rpartition(":")[0]
            found.setdefault((file, mutant.site.kind, mutant.alteration), mutant)
    return found


@pytest.mark.parametrize("file", ATTENTION)
def test_what_can_be_wrong_in_attention(mutation: Mutation, file: str) -> None:
    """Fences, waits, arrivals, commits, parities, byte counts: each is a mutant."""
    things = {(kind, how) for of, kind, how in one_of_each(mutation) if of == f"csrc/attention/{file}"}
    assert not ATTENTION[file] - things


def test_one_of_each_and_the_changed_files(mutation: Mutation) -> None:
    sample, changed = list(one_of_each(mutation).values()), changed_files(ROOT)
    verdicts = mutation.verdicts(sample)
    spent = 0.0
    for mutant in mutation.mutants:
        if mutant in sample or spent >= SECONDS_OF_CHANGED:
            continue
        if any(place.rpartition(":")[0] in changed for place in mutant.places):
            verdicts.append(mutation.verdict(mutant))
            spent += verdicts[-1].seconds
    assert not (said := complaints(verdicts)), said


@pytest.mark.slow
def test_every_mutant(mutation: Mutation) -> None:
    verdicts = mutation.verdicts(mutation.mutants)
    print(f"{len(verdicts)} mutants, {sum(verdict.seconds for verdict in verdicts):.0f} s of processor time")
    for verdict in verdicts:
        print(verdict.text())
    assert not (said := complaints(verdicts)), said


# ---- which files have changed --------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """On main, with COMMITS + 2 commits, each of a file of its own, csrc/0.cu, csrc/1.cu ..."""
    (tmp_path / "csrc").mkdir()
    git(tmp_path, "init", "-q", "-b", "main")
    for number in range(COMMITS + 2):
        write(tmp_path, f"{number}.cu")
        commit(tmp_path)
    return tmp_path


def git(root: Path, *command: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *command], check=True, capture_output=True)


def write(root: Path, name: str) -> None:
    (root / "csrc" / name).write_text(name)


def commit(root: Path) -> None:
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "change")


def test_on_main_the_last_commits_count(repository: Path) -> None:
    assert changed_files(repository) == {f"csrc/{number}.cu" for number in range(2, COMMITS + 2)}


def test_on_a_branch_what_it_changed_counts(repository: Path) -> None:
    """Committed or not, known to git or not."""
    git(repository, "checkout", "-q", "-b", "mine")
    write(repository, "committed.cu")
    commit(repository)
    write(repository, "new.cu")
    (repository / "csrc/0.cu").write_text("changed")
    (repository / "elsewhere.py").write_text("")
    assert changed_files(repository) == {"csrc/committed.cu", "csrc/new.cu", "csrc/0.cu"}


def test_without_history_or_git_nothing_has_changed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shallow = tmp_path_factory.mktemp("shallow") / "clone"
    git(repository, "clone", "-q", "--depth=1", f"file://{repository}", str(shallow))
    assert changed_files(shallow) == set()
    write(shallow, "new.cu")
    assert changed_files(shallow) == {"csrc/new.cu"}
    archive = tmp_path_factory.mktemp("archive")
    (archive / "csrc").mkdir()
    write(archive, "new.cu")
    assert changed_files(archive) == set()
    unpacked = repository / "vendor"
    (unpacked / "csrc").mkdir(parents=True)
    write(unpacked, "new.cu")
    assert changed_files(unpacked) == set()
