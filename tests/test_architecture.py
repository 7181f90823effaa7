"""The rules that keep the code readable, held by reading it: directions of imports, one stem per op, sizes, words."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastgpt"

# A module imports only from lines above its own; names on one line are independent of each other.
# A package (ops, data, native, demo) counts as one name; inside it the files may import each other.
LAYERS = [
    {"errors", "config", "files", "interrupts", "machine", "units"},
    {"arguments", "native", "schedule", "flops"},
    {"ops", "tokenizer"},
    {"linear"},
    {"model", "optim", "data", "accuracy"},
    {"checkpoint", "generate", "evaluate", "precision"},
    {"metrics", "resume", "step"},
    {"train"},
    {"progress", "estimate", "memory", "plot", "doctor"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
# What is imported upwards all the same, inside a function, and why.
UPWARD = {
    ("model", "generate"): "GPT.generate is the method that people look for",
    ("demo", "cli"): "`python -m fastgpt.demo` is `fastgpt demo`, with its refusals and exit codes",
}

OPS = {
    "layer_norm",
    "rms_norm",
    "swiglu",
    "gelu",
    "attention",
    "rotary",
    "cross_entropy",
    "linear_cross_entropy",
    "embedding",
    "adamw",
    "grad_norm",
}
OP_HELPERS = {"__init__", "contract", "documents", "registry"}  # shared by the ops, no op themselves

ANY_TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".sh", ".yml", ".yaml", ".json", ".cu", ".cuh", ".cpp", ".h", ""}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def dotted(path: Path) -> str:
    """fastgpt/ops/gelu.py -> fastgpt.ops.gelu; a package's __init__ is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def unit(name: str) -> str:
    """fastgpt.ops.gelu -> ops: the name that LAYERS knows it by; fastgpt itself is ''."""
    return name.split(".")[1] if "." in name else ""


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def runtime_nodes(node: ast.AST) -> list[ast.AST]:
    """Every node under `node` but those that only a type checker reads."""
    found = [node]
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            found += runtime_nodes(child)
    return found


def local_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it, as dotted names."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    found: set[str] = set()
    for node in runtime_nodes(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fastgpt"}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = ".".join(filter(None, [base if node.level else "", node.module]))
            if base.split(".")[0] == "fastgpt":
                # `from . import ops` names a module, `from .ops import gelu` one below it
                found |= {f"{base}.{alias.name}" for alias in node.names} if base == "fastgpt" else {base}
    return found


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_go_one_way(path):
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    here = unit(dotted(path))
    if not here:
        return  # fastgpt/__init__.py imports by name when asked
    assert here in level, f"{path.name} has no place in LAYERS"
    for name in local_imports(path):
        there = unit(name)
        if there in ("", here, "__version__") or (here, there) in UPWARD:
            continue
        assert there in level, f"{dotted(path)} imports {name}, which has no place in LAYERS"
        assert level[there] < level[here], f"{dotted(path)} imports {name}: {here} stands below or beside {there}"


def test_every_exception_is_still_needed():
    used = {(unit(dotted(path)), unit(name)) for path in modules() for name in local_imports(path)}
    assert set(UPWARD) <= used


def test_leaves_import_nothing_local():
    for name in ("config", "errors", "interrupts", "machine", "units"):
        assert not local_imports(PACKAGE / f"{name}.py")


def test_the_import_reader_sees_every_form(tmp_path, monkeypatch):
    """The tests above are as good as this reader."""
    code = """
from __future__ import annotations
import os, fastgpt.train
from . import ops
from .data import Dataset
from .. import demo
if TYPE_CHECKING:
    from . import plot
def f():
    from .cli import main
"""
    monkeypatch.setattr(sys.modules[__name__], "tree", lambda path: ast.parse(code))
    found = local_imports(PACKAGE / "x.py")
    assert found >= {"fastgpt.train", "fastgpt.ops", "fastgpt.data", "fastgpt.cli"}
    assert "fastgpt.plot" not in found


# ---- ops -----------------------------------------------------------------------------------------


def op_files() -> set[str]:
    return {path.stem for path in (PACKAGE / "ops").glob("*.py")} - OP_HELPERS


def test_the_list_of_ops_is_complete():
    assert op_files() == OPS


@pytest.mark.parametrize("op", sorted(OPS))
def test_one_stem_per_op(op):
    """One page with the contract, the reference and the public function of the page's name; and its tests."""
    page = PACKAGE / "ops" / f"{op}.py"
    functions = {node.name: node for node in tree(page).body if isinstance(node, ast.FunctionDef)}
    assert "reference" in functions
    public = functions.get(op) or functions.get(f"{op}_")  # a trailing underscore says that it works in place
    assert public is not None and ast.get_docstring(public)
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()


def test_an_op_is_asked_for_by_the_name_of_its_page():
    """`native.select` and `native.require` look for it among the pages that a library serves."""
    from fastgpt import native
    from fastgpt.config import ModelConfig
    from fastgpt.model import ops_of

    assert set(native.OPS) == OPS
    for op in OPS:
        calls = [node for node in ast.walk(tree(PACKAGE / "ops" / f"{op}.py")) if isinstance(node, ast.Call)]
        asked = [call.args[1] for call in calls if ast.unparse(call.func) == "native.select"]
        assert asked and all(isinstance(name, ast.Constant) and name.value == op for name in asked), op
    assert {"adamw", "grad_norm"} <= set(ops_of(ModelConfig.preset("tiny"))) <= OPS


def test_public_ops_are_exported():
    from fastgpt import ops

    for op in OPS:
        assert any(callable(getattr(ops, name, None)) for name in (op, f"{op}_")), op


# ---- sizes and forms -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "limit"), [("fastgpt/model.py", 400), ("fastgpt/train.py", 400), ("README.md", 150)])
def test_what_is_read_in_one_sitting_stays_short(name, limit):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < limit


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_public_names_say_what_they_are(path):
    """Modules, and public classes and functions in them. A `reference` is documented by its op's contract, a function
    of one statement by its name; the demo is a program and no library."""
    assert ast.get_docstring(tree(path)), f"{dotted(path)} has no docstring"
    if unit(dotted(path)) == "demo":
        return
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and len(node.body) > 1):
            told = node.name.startswith("_") or node.name == "reference" or ast.get_docstring(node)
            assert told, f"{dotted(path)}.{node.name} has no docstring"


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_nothing_is_pickled(path):
    """A pickle runs code when it is read. There is no exception to this rule."""
    for node in ast.walk(tree(path)):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {n.split(".")[0] for n in names} & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save"), f"{dotted(path)}:{node.lineno}"
            assert not any(k.arg == "allow_pickle" for k in node.keywords), f"{dotted(path)}:{node.lineno}"


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_preconditions_are_never_assert(path):
    found = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
    assert not found, f"{dotted(path)}: lines {found}"


# ---- csrc ----------------------------------------------------------------------------------------------

CSRC = ROOT / "csrc"
SHARED = {
    "device",
    "ptx",
    "host",
    "emulator",
    "python",
}  # every other folder is an op, or a family of ops with one stem

# op.cpp -> op.h <- op.cu -> device -> ptx: what a file may include of csrc, by folder or by name; <op> is its folder.
INCLUDES = {
    "<op>/*.h": {"<op>", "device/types.h"},
    "<op>/*.cu": {"<op>", "device", "ptx", "host/launch.h", "host/multiprocessors.h"},
    "<op>/*.cuh": {"<op>", "device", "ptx", "host/launch.h"},
    "<op>/*.cpp": {"<op>", "host/tensor.h", "host/path.h"},
    "host": {"host", "device", "emulator/emulator.h"},
    "device": {"device", "ptx", "emulator/cuda.h"},
    "ptx": {"ptx", "device/cuda.h", "emulator"},
    "emulator": {"emulator"},
    "python": {"python"},  # sees the libraries through their C interface alone
}
TORCH = {"<op>/*.cpp", "host/tensor.h"}  # may include torch's headers
CUDA = {"device/cuda.h", "emulator/*", "ptx/*_gpu.cuh"}  # may include CUDA's
BOTH_BUILDS = {"device/cuda.h", "host/*", "ptx/*"}  # may ask which build it is


def cpp_sources() -> list[str]:
    return sorted(path.relative_to(CSRC).as_posix() for path in CSRC.glob("*/*") if path.suffix in CPP)


CPP = (".cu", ".cuh", ".cpp", ".h")


def included(name: str) -> list[str]:
    return re.findall(r'^\s*#include ["<]([^">]+)[">]', (CSRC / name).read_text(encoding="utf-8"), re.M)


def is_one_of(name: str, patterns: set[str]) -> bool:
    folder = name.split("/")[0]
    generic = f"<op>/{name.split('/')[1]}" if folder not in SHARED else name
    return any(fnmatch(generic, pattern) for pattern in patterns)


@pytest.mark.parametrize("name", cpp_sources())
def test_includes_go_one_way(name):
    folder = name.split("/")[0]
    key = folder if folder in SHARED else f"<op>/*{Path(name).suffix}"
    allowed = {entry.replace("<op>", folder) for entry in INCLUDES[key]}
    for header in included(name):
        if (CSRC / header).is_file():
            assert {header, header.split("/")[0]} & allowed, f"{name} includes {header}"
        assert not header.startswith("torch/") or is_one_of(name, TORCH), f"{name} includes {header}"
        assert not header.startswith("cuda") or is_one_of(name, CUDA), f"{name} includes {header}"


@pytest.mark.parametrize("name", cpp_sources())
def test_kernels_do_not_know_the_emulator(name):
    text = (CSRC / name).read_text(encoding="utf-8")
    asks = re.search(r"FASTGPT_EMULATED|__CUDACC__|__CUDA_ARCH__", text)
    assert not asks or is_one_of(name, BOTH_BUILDS), f"{name} asks which build it is"


def test_every_kernel_is_launched_by_launch():
    for name in cpp_sources():
        assert "<<<" not in (CSRC / name).read_text(encoding="utf-8"), name


# ---- every tracked file ------------------------------------------------------------------------------


@cache
def tracked() -> list[Path]:
    """Text files of the repository; of a source archive without git, everything that is not hidden."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        files = [path for path in ROOT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    return [path for path in files if path.suffix in ANY_TEXT and path.is_file() and path.stat().st_size < 1 << 20]


def matches(pattern: str, paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(pattern, line) and path != Path(__file__).resolve():
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


def test_no_path_of_one_machine():
    assert not matches(r"(?<![\w.$}~-])/(root|work|home|Users|mnt)/\w", tracked())


def test_no_host_of_a_package_index():
    """Whoever installs this has configured their own."""
    hosts = r"pypi\.org|pythonhosted|download\.pytorch\.org|artifactory|--(extra-)?index-url\s*=?\s*https?:"
    assert not matches(hosts, tracked())


def test_asm_stays_in_its_place():
    """A GPU's instructions in csrc/ptx; the CPU's own, to switch between fibers, in the emulator."""
    sources = [path for path in tracked() if path.suffix in (".cu", ".cuh", ".cpp", ".h")]
    outside = [p for p in sources if not p.relative_to(ROOT).as_posix().startswith(("csrc/ptx/", "csrc/emulator/"))]
    assert not matches(r"\basm\s*(volatile\s*)?\(", outside)


def test_nothing_is_left_for_later():
    assert not matches(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", tracked())


# ---- what an import costs ------------------------------------------------------------------------------

LIGHT = """
import sys

class Blocked:
    names = set({blocked!r})
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
import fastgpt
assert "torch" not in sys.modules, "import fastgpt is instant"
import fastgpt.model, fastgpt.ops, fastgpt.optim
import torch
from fastgpt.config import OptimConfig
model = fastgpt.GPT(fastgpt.ModelConfig.preset("tiny", n_layer=1, n_embd=32, vocab_size=64, block_size=16))
idx = torch.arange(32).reshape(2, 16)
for kind in ("adamw", "muon"):
    optimizer = fastgpt.optim.build_optimizer(model, OptimConfig(optimizer=kind))
    loss = model(idx, idx)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("light")
"""


def test_the_core_needs_torch_and_numpy_only():
    """Importing the ops, the model and the optimizers, and a training step, with everything else blocked."""
    blocked = ["tokenizers", "tiktoken", "tyro", "rich", "safetensors", "tomli_w", "matplotlib", "pyarrow", "zstandard"]
    code = LIGHT.format(blocked=blocked)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.strip() == "light", done.stderr
