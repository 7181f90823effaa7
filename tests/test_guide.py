"""The guide: every chapter runs and prints what it says, every exercise is solvable and says so while it is not."""

import ast
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.native import toolchain
from tests.test_architecture import LAYERS

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "guide"
EXERCISES, SOLUTIONS = GUIDE / "exercises", GUIDE / "solutions"


def _load(path):
    spec = importlib.util.spec_from_file_location(f"guide_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


guide = _load(GUIDE / "run.py")
CHAPTERS = guide.chapters()
ARCHITECTURE, ATTENTION = ROOT / "docs" / "architecture.md", ROOT / "docs" / "attention.md"
PAGES_THAT_RUN = [*CHAPTERS, ARCHITECTURE, ATTENTION]
SOLVED = sorted(SOLUTIONS.glob("[0-9]*.py"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- chapters --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda path: path.stem)
def test_page_runs(page):
    with torch.random.fork_rng(devices=[]):
        try:
            guide.run(page)
        except toolchain.Missing as missing:
            pytest.skip(str(missing))
    torch.set_printoptions(profile="default")


@pytest.mark.parametrize("chapter", PAGES_THAT_RUN, ids=lambda path: path.stem)
def test_every_output_is_in_the_text(chapter):
    """A block that prints is followed by what it prints, so that a reader need not run it to follow."""
    for block in guide.blocks(chapter.read_text(encoding="utf-8")):
        assert ("print(" in block.code) == (block.printed is not None), f"{chapter.name}, line {block.line}"


def test_each_chapter_has_its_exercise_and_its_next_reading():
    assert len(CHAPTERS) == len(SOLVED) > 0
    for chapter, solution in zip(CHAPTERS, SOLVED, strict=True):
        text = chapter.read_text(encoding="utf-8")
        assert chapter.name[:2] == solution.name[:2]
        for name in (f"exercises/{solution.name}", f"exercises/test_{solution.name}", f"solutions/{solution.name}"):
            assert f"docs/guide/{name}" in text, f"{chapter.name} does not name {name}"
        assert "\n## Read next\n" in text


@pytest.mark.parametrize("page", [*sorted(GUIDE.glob("*.md")), ARCHITECTURE, ATTENTION], ids=lambda p: p.stem)
def test_what_a_page_points_to_exists(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:fastgpt|docs|tests|benchmarks|tools)/[\w./-]+)`", prose):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    labels = set(re.findall(r"\]\[([\w-]+)\]", prose))
    defined = re.findall(r"^\[([\w-]+)\]: https://\S+$", text, flags=re.MULTILINE)
    assert labels == set(defined), "sources cited and sources listed differ"
    assert len(defined) == len(set(defined))


def test_the_drawing_of_the_layers_is_the_rule():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    rule = text[text.index("## The dependency rule") :]
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    drawn = [
        [level[name] for name in line.split() if name in level]
        for line in rule.split("```")[1].splitlines()
        if line.strip()
    ]
    # lower lines are lower layers; every layer but `python -m fastgpt` is drawn
    assert all(min(above) > max(below) for above, below in itertools.pairwise(drawn))
    names = {name for line in rule.split("```")[1].splitlines() for name in line.split()}
    assert set().union(*LAYERS) - names == {"__main__"}


# ---- the runner ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "printed, expected, same",
    [
        ("loss 1.23\n", "loss 1.23", True),
        ("loss 1.24", "loss 1.23", True),  # one in the last digit
        ("loss 1.25", "loss 1.23", False),
        ("loss -1.23", "loss 1.23", False),
        ("loss 1.230", "loss 1.23", False),
        ("12 tokens", "13 tokens", False),
        ("1.00 cats", "1.00 dogs", False),
        ("a\nb", "a", False),
        ("", "a", False),
    ],
)
def test_outputs_are_compared_closely(printed, expected, same):
    assert (guide.difference(printed, expected) is None) == same


def test_examples_are_compared_in_words():
    assert guide.difference("step 5: 1,234 of 0.5", "step 7: 99 of 0.25", example=True) is None
    assert guide.difference("step 5: up", "step 5: down", example=True)


def test_a_wrong_output_names_the_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nprint(1 + 1)\n```\n```text\n3\n```\n")
    with pytest.raises(guide.ChapterError, match=r"page\.md, the block at line 4"):
        guide.run(page)


def test_a_cuda_block_is_the_file_that_it_names(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```cuda\n// twice.cu: of x\nint x;\n```\n```python\nprint(open('twice.cu').read())\n```\n"
    )
    assert guide.run(page) and (tmp_path / "twice.cu").read_text() == "// twice.cu: of x\nint x;\n"
    page.write_text("# A page\n\n```cuda\nint x;\n```\n")
    with pytest.raises(guide.ChapterError, match="line 4: a cuda block begins with"):
        guide.run(page)


def test_an_error_has_the_line_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        guide.run(page)
    last = error.traceback[-1]
    assert (Path(str(last.path)).name, last.lineno + 1) == ("page.md", 5)


# ---- exercises -------------------------------------------------------------------------------


def _without_bodies(path):
    """(docstring, signature, docstring of the function) of an exercise or a solution, as comparable text."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    function = tree.body[-1]
    assert isinstance(function, ast.FunctionDef), f"{path.name}: the function to write comes last"
    given = [ast.dump(node) for node in tree.body[:-1] if isinstance(node, ast.FunctionDef)]
    return ast.get_docstring(tree), ast.unparse(function.args), ast.get_docstring(function), function.name, given


@pytest.mark.parametrize("solution", SOLVED, ids=lambda path: path.stem)
def test_exercise_and_solution_ask_the_same(solution):
    """Holds for an exercise that a learner has filled in as well."""
    assert _without_bodies(EXERCISES / solution.name) == _without_bodies(solution)


def _check(folder, *options):
    command = [sys.executable, "-m", "pytest", str(EXERCISES), "--answers", str(folder), "-p", "no:cacheprovider"]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)


def test_the_solutions_pass():
    result = _check(SOLUTIONS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_unsolved_exercise_fails_and_says_what_to_do(tmp_path):
    for solution in SOLVED:
        text = solution.read_text(encoding="utf-8")
        function = ast.parse(text).body[-1]
        signature_and_docstring = text.splitlines(keepends=True)[: function.body[0].end_lineno]
        (tmp_path / solution.name).write_text("".join(signature_and_docstring), encoding="utf-8")
    result = _check(tmp_path, "-rN")
    assert result.returncode == 1
    outcome = re.search(r"^(\d+) failed in", result.stdout, re.MULTILINE)
    assert outcome, f"some test passes although nothing is written:\n{result.stdout[-2000:]}"
    for solution in SOLVED:
        name = ast.parse(solution.read_text(encoding="utf-8")).body[-1].name
        assert f"{name} returns nothing yet: write it in {tmp_path / solution.name}" in result.stdout
