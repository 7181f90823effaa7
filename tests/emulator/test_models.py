"""The models of instructions give what plain loops give, in any order of threads; counters; mutation sites."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.equivalent import WITHOUT_EFFECT

from .conftest import Emulator

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCE = HERE / "models.cu"
MODELS = re.findall(r"^MODEL\((\w+)\)", SOURCE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_model(emulator: Emulator, name: str, seed: int) -> None:
    emulator.configure(seed=seed)
    assert emulator.text("emulator_run_model", name) == ""
    assert emulator.findings() == []


# ---- counters ----


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(SOURCE.read_text().splitlines(), 1) if text in line)


def counted(emulator: Emulator, model: str, **wanted: Any) -> list[dict[str, Any]]:
    emulator.configure(profile=True)
    emulator.counters()
    assert emulator.text("emulator_run_model", model) == ""
    return [entry for entry in emulator.counters() if all(entry.get(key) == value for key, value in wanted.items())]


def test_sectors_of_a_row_and_of_a_column(emulator: Emulator) -> None:
    entries = counted(emulator, "counted_columns", space="global", access="load", kernel="columns")
    by_line = {entry["line"]: entry for entry in entries}
    column, row = by_line[line_of("COUNT column")], by_line[line_of("COUNT row")]
    assert (column["requests"], column["bytes"], column["sectors"], column["ideal_sectors"]) == (1, 128, 32, 4)
    assert (row["requests"], row["bytes"], row["sectors"], row["ideal_sectors"]) == (1, 128, 4, 4)


def test_bank_conflicts_of_a_column(emulator: Emulator) -> None:
    [store] = counted(emulator, "counted_columns", space="shared", access="store")
    assert (store["wavefronts"], store["ideal_wavefronts"], store["bank_conflicts"]) == (32, 1, 31)


def test_matrix_flops(emulator: Emulator) -> None:
    [mma] = counted(emulator, "mma_bf16", space="matrix")
    assert mma["flops"] == 2 * 16 * 8 * 16
    [wgmma] = counted(emulator, "wgmma_registers_k", space="matrix")
    assert wgmma["flops"] == 2 * 64 * 64 * 64


def test_bytes_of_tma(emulator: Emulator) -> None:
    loads = counted(emulator, "wgmma_k_k", space="global", access="load")
    assert sum(entry["bytes"] for entry in loads) == 2 * 64 * 64 * 2


def test_launches_by_kernel_and_shape(emulator: Emulator) -> None:
    counted(emulator, "counted_columns")
    emulator.text("fastgpt_emulator_launches")
    for _ in range(2):
        counted(emulator, "counted_columns")
    [launch] = json.loads(emulator.text("fastgpt_emulator_launches"))
    assert launch == {"kernel": "columns", "threads": 32, "shared_bytes": 4096, "launches": 2, "blocks": 2}
    assert json.loads(emulator.text("fastgpt_emulator_launches")) == []


def test_counters_are_emptied_and_off_by_default(emulator: Emulator) -> None:
    assert emulator.counters() == []
    assert counted(emulator, "mma_bf16")
    assert emulator.counters() == []
    emulator.configure()
    emulator.text("emulator_run_model", "mma_bf16")
    assert emulator.counters() == []


# ---- mutation sites ----


def test_every_site_that_is_switched_off_or_altered_is_noticed(emulator: Emulator) -> None:
    """Of kernels with barriers of every kind: without any one of them, or where one is wrong, there is a finding, or a
    wrong result."""
    met_by: dict[int, list[str]] = {}  # the models that meet a site
    for model in MODELS:
        emulator.configure()
        assert emulator.text("emulator_run_model", model) == ""
        for site in emulator.sites():
            if site["met"]:
                met_by.setdefault(site["id"], []).append(model)
    ours = [
        site for site in emulator.sites() if site["file"] in ("tests/emulator/models.cu", "tests/emulator/kernels.cuh")
    ]
    kinds = {site["kind"] for site in ours}
    ours = [site for site in ours if site["kind"] not in WITHOUT_EFFECT]
    assert kinds >= {"__syncthreads", "__syncwarp", "mbarrier.try_wait", "wgmma.fence", "wgmma.commit_group"}
    assert kinds >= {"wgmma.wait_group", "cluster arrive", "cluster wait", "cp.async.wait_group", "mbarrier.arrive"}
    alterations = {alteration for site in ours for alteration in site["alterations"]}
    assert alterations >= {"the other parity", "16 bytes more", "16 bytes fewer", "half of the bytes", "twice"}
    assert alterations >= {"leaves one more group", "one arrival more", "one arrival fewer"}
    unnoticed = []
    for site in ours:
        for alteration in (None, *site["alterations"]):
            if alteration is None:
                emulator.configure(disabled_site=site["id"])
            else:
                emulator.configure(altered_site=site["id"], alteration=alteration)
            if not any(emulator.text("emulator_run_model", model) for model in met_by[site["id"]]):
                unnoticed.append((site["kind"], alteration, f"{site['file']}:{site['line']}"))
    emulator.findings()
    assert Counter(found[:2] for found in unnoticed) == {
        ("fence.mbarrier_init", None): 2,  # for the TMA unit, and these mbarriers are met by threads alone
        ("cp.async.bulk.wait_group", "waits for reading alone"): 3,  # the kernel ends there, which waits for the rest
    }, unnoticed


def test_sites_keep_their_numbers(emulator: Emulator) -> None:
    def sites() -> list[dict[str, Any]]:
        return [{name: value for name, value in site.items() if name != "met"} for site in emulator.sites()]

    emulator.text("emulator_run_model", "cluster")
    before = sites()
    emulator.text("emulator_run_model", "stmatrix")
    after = sites()
    assert after[: len(before)] == before
    assert [site["id"] for site in after] == list(range(len(after)))


def test_sites_of_a_run_are_known(emulator: Emulator) -> None:
    """Those met since the emulator was configured."""
    emulator.text("emulator_run_model", "mma_bf16")
    emulator.text("emulator_run_model", "cluster")
    emulator.configure()
    assert not [site for site in emulator.sites() if site["met"]]
    emulator.text("emulator_run_model", "cluster")
    assert "cluster wait" in {site["kind"] for site in emulator.sites() if site["met"]}
    assert [site for site in emulator.sites() if not site["met"]]
