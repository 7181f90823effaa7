"""The test that switches sites off (tests/mutation) fails where it must: for barriers that nothing needs or reaches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastgpt import native
from tests.mutation import equivalent, mutants, test_mutation
from tests.mutation.mutants import SURVIVED, Mutant, Mutation, Scenario, Verdict
from tests.mutation.scan import Sources, functions_of

from .conftest import ROOT, Emulator

SOURCE = "tests/emulator/mutants.cu"
LINES = (ROOT / SOURCE).read_text().splitlines()
MODELS = re.findall(r"^MODEL\((\w+)\)", "\n".join(LINES), re.MULTILINE)
NEEDLESS = {  # the keys of what nothing needs
    (
        f"{SOURCE}, sum_of_block: __syncthreads();",
        f"{SOURCE}, sums_twice: const float first = sum_of_block(shared, 1);",
    ),
    (f"{SOURCE}, waits_twice: __syncthreads();",),
    (f"{SOURCE}, waits_twice: __syncthreads(); (2)",),
    (f"{SOURCE}, waits_for_all: cp_async_wait<0>();",),
    ("leaves one more group", f"{SOURCE}, waits_for_all: cp_async_wait<0>();"),
}


@pytest.fixture
def mutation(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Mutation:
    monkeypatch.setattr(mutants, "LEAST_SECONDS", 0.5)

    def scenario(model: str) -> Scenario:
        def run() -> list[torch.Tensor]:
            text = emulator.text("emulator_run_model", model)
            if emulator.findings():
                raise RuntimeError(text)
            return [torch.tensor(list(text.encode()), dtype=torch.uint8)]

        return Scenario(model, run)

    @contextmanager
    def inside(scenario: Scenario, mutant: Mutant | None) -> Iterator[None]:
        if mutant is None:
            emulator.configure()
        elif mutant.alteration is None:
            emulator.configure(disabled_site=mutant.site.id)
        else:
            emulator.configure(altered_site=mutant.site.id, alteration=mutant.alteration)
        yield

    def met() -> list[native.Site]:
        return [native.Site.of(site) for site in emulator.sites() if site["met"]]

    return Mutation([scenario(model) for model in MODELS], Sources(ROOT, ("csrc", "tests/emulator")), inside, met)


def verdicts(mutation: Mutation, function: str) -> list[Verdict]:
    """Of the sites of a kernel, by line."""
    of = [mutant for mutant in mutation.mutants if f", {function}: " in mutant.key[-1]]
    return mutation.verdicts(sorted(of, key=lambda mutant: mutant.places[::-1]))


def test_what_nothing_needs_survives_and_all_else_does_not(mutation: Mutation) -> None:
    """A helper's barrier is asked about for each of its callers: the second one needs it, the first does not. What is
    made wrong is a mutant of its own."""
    assert mutation.control.outcome == SURVIVED, mutation.control.text()
    found = mutation.verdicts(mutation.mutants)
    survivors = [verdict.mutant for verdict in found if verdict.outcome == SURVIVED]
    fences = [mutant for mutant in survivors if mutant.site.kind in equivalent.WITHOUT_EFFECT]
    assert [mutant.site.kind for mutant in fences] == ["__threadfence_block"]  # needed, but not here
    assert {mutant.key for mutant in survivors if mutant not in fences} == NEEDLESS
    said = test_mutation.complaints(found)
    assert said.count("nothing notices that this is switched off") == len(NEEDLESS)
    for line in (number for number, text in enumerate(LINES, 1) if text == "  __syncthreads();" and number > 40):
        assert f"__syncthreads at {SOURCE}:{line}\n" in said
    assert "survived; ran: waits_twice" in said
    assert f"cp.async.wait_group, leaves one more group, at {SOURCE}" in said


def test_how_a_mutant_is_noticed(mutation: Mutation) -> None:
    """Whatever it does, the tests go on."""
    assert [verdict.outcome for verdict in verdicts(mutation, "sums_twice")] == [SURVIVED, *["finding"] * 3]
    for kernel, outcome in {"other_numbers": "another result", "runs_on": "no end", "crashes": "crash"}.items():
        [verdict] = verdicts(mutation, kernel)
        assert verdict.outcome == outcome and verdict.ran == (kernel,), verdict.text()
    altered = {v.mutant.alteration for v in verdicts(mutation, "waits_for_all") if v.mutant and v.outcome == "finding"}
    assert altered == {None, "one arrival more", "one arrival fewer", "twice", "the other parity"}


def test_a_list_of_equivalent_mutants_is_believed_and_checked(
    mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [*verdicts(mutation, "waits_twice"), *verdicts(mutation, "other_numbers")]
    listed: dict[tuple[str, ...], str] = dict.fromkeys(NEEDLESS, "there is another one")
    monkeypatch.setattr(equivalent, "EQUIVALENT", listed)
    assert test_mutation.complaints(found) == ""
    monkeypatch.setattr(equivalent, "EQUIVALENT", {verdict.mutant.key: "wrong" for verdict in found})
    said = test_mutation.complaints(found)
    assert said.startswith("listed as equivalent (wrong), and noticed: in_bounds at") and said.count("noticed") == 1
    monkeypatch.setattr(test_mutation, "EQUIVALENT", {("gone",): "it was not needed"})
    with pytest.raises(AssertionError, match="gone"):
        test_mutation.test_what_is_listed_as_equivalent_is_there(mutation)


def test_what_no_scenario_reaches_is_reported(mutation: Mutation) -> None:
    ours = [call for call in mutation.unreached if call.file == SOURCE]
    assert [(call.name, call.function) for call in ours] == [("in_bounds", "never_asks")]
    with pytest.raises(AssertionError, match=f"in_bounds at {SOURCE}:{ours[0].line}"):
        test_mutation.test_every_site_of_the_sources_is_reached(mutation)


def test_results_that_change_by_themselves_are_no_basis(mutation: Mutation) -> None:
    mutation.results["runs_on"] = [torch.zeros(1, dtype=torch.uint8)]
    assert (mutation.control.outcome, mutation.control.ran[-1]) == ("another result", "runs_on")


# ---- reading the sources ---------------------------------------------------------------------------------

TOY = {
    "emulator/barriers.cpp": 'void block_barrier() { if (site_disabled("__syncthreads")) return; wait(); }',
    "emulator/cuda.h": "EMULATED void __syncthreads() { emulator::block_barrier(); }",
    "toy/toy.cu": """
namespace toy {
// __syncthreads() in a comment
struct Pipe {
  template <class T>
  __device__ void wait(T& x) const {
    log("{ __syncthreads()");
    __syncthreads();
  }
};
__global__ __launch_bounds__(Tile::kThreads, (Tile::kBlocks)) void kernel(Pipe pipe) {
  pipe.wait<int>(x); /* two
  lines */ __syncthreads();
  if (x) { __syncthreads(); __syncthreads(); }
}
void host() { wait(); launch(kernel); }
}
""",
}


def test_what_the_scan_reads(tmp_path: Path) -> None:
    for name, text in TOY.items():
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text(text)
    sources = Sources(tmp_path)
    assert sources.primitives == {"block_barrier": "block_barrier", "__syncthreads": "block_barrier"}
    assert [(call.line, call.function, call.name) for call in sources.calls] == [
        (8, "wait", "__syncthreads"),
        (12, "kernel", "wait"),
        (13, "kernel", "__syncthreads"),
        (14, "kernel", "__syncthreads"),
    ]
    assert sources.crowded() == ["csrc/toy/toy.cu:14: if (x) { __syncthreads(); __syncthreads(); }"]
    assert sources.key("csrc/toy/toy.cu:8") == "csrc/toy/toy.cu, wait: __syncthreads();"
    assert sources.key("csrc/toy/toy.cu:99") == "csrc/toy/toy.cu:99"
    assert [f.name for f in functions_of("a.cu", "int a() { if (b) { c(); } }\nenum class E { x };\nE f(E e) {}")] == [
        "a",
        "f",
    ]
