"""How fast `prepare` is beside tiktoken itself, and how much memory it takes.

    python benchmarks/bench_prepare.py [--mb 100] [--repeats 3] [--kind jsonl|txt] [--rss] [--out FILE.json]

The yardstick: tiktoken's own `encode_ordinary` over the same documents, already decoded and in memory, on the same
cores; the faster of processes and of tiktoken's threads counts. prepare does the same encoding and besides reads,
parses, decodes, hashes and drops duplicates, checksums and writes, and starts its workers. The two alternate, and
medians are compared. `--rss` then runs prepare on the text once and on four times as much, and prints the peak
resident memory of the process and of its largest worker.

The text: the Python standard library, over and over, each copy of a file told apart by a first line of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import tiktoken
from harness import machine, write_result

from fastgpt.config import PrepareConfig
from fastgpt.data import prepare
from fastgpt.machine import cores
from fastgpt.tokenizer import Tokenizer


def documents(megabytes: float):
    """Distinct documents of this many megabytes in all."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "encodings"}
    texts: dict[str, None] = {}  # each once, in order
    for path in sorted(root.rglob("*.py")):
        if not skipped & set(path.relative_to(root).parts):
            texts[path.read_text(encoding="utf-8", errors="ignore")] = None
    left, copy = megabytes * 1e6, 0
    while left > 0:
        for text in texts:
            text = f"# copy {copy}\n{text}"
            yield text
            left -= len(text.encode())
            if left <= 0:
                break
        copy += 1


def write_corpus(folder: Path, megabytes: float, kind: str) -> None:
    """As one .jsonl file, or as a folder of .txt files."""
    folder.mkdir()
    if kind == "jsonl":
        with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
            for text in documents(megabytes):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        return
    for number, text in enumerate(documents(megabytes)):
        (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8", newline="")


def encoding_of(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """tiktoken as its users construct it."""
    _, (pattern, ranks, special, _) = tokenizer.__reduce__()
    return tiktoken.Encoding("yardstick", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _encode_share(tokenizer_file, megabytes, first, step, barrier, results):
    encoding = encoding_of(Tokenizer.load(tokenizer_file))
    texts = [text for number, text in enumerate(documents(megabytes)) if number % step == first]
    encoding.encode_ordinary(texts[0])
    barrier.wait()
    began = time.time()
    for text in texts:
        encoding.encode_ordinary(text)
    results.put((began, time.time()))


def tiktoken_processes(tokenizer_file: Path, megabytes: float, workers: int) -> float:
    """Seconds from the first process's beginning to the last one's end."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=_encode_share, args=(tokenizer_file, megabytes, i, workers, barrier, results))
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    times = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return max(end for _, end in times) - min(began for began, _ in times)


def tiktoken_threads(tokenizer_file: Path, megabytes: float, workers: int) -> float:
    """Seconds of encode_ordinary_batch, a few megabytes at a time so that its lists do not fill the memory."""
    encoding = encoding_of(Tokenizer.load(tokenizer_file))
    seconds, group, size = 0.0, [], 0
    for text in [*documents(megabytes), ""]:
        group.append(text)
        size += len(text)
        if size > 16 << 20 or not text:
            began = time.perf_counter()
            encoding.encode_ordinary_batch(group, num_threads=workers)
            seconds += time.perf_counter() - began
            group, size = [], 0
    return seconds


def prepared(corpus: Path, out: Path, tokenizer_file: Path, workers: int) -> tuple[float, dict]:
    """Seconds of the whole call, from outside, and dataset.json."""
    config = PrepareConfig(
        inputs=(str(corpus),), out_dir=str(out), tokenizer=str(tokenizer_file), workers=workers, val_fraction=0.01
    )
    began = time.perf_counter()
    meta = prepare(config, progress=False)
    return time.perf_counter() - began, meta


RSS = """
import json, resource, sys
from pathlib import Path
sys.path[:0] = [{benchmarks!r}]
import bench_prepare, harness
seconds, _ = bench_prepare.prepared(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([seconds, harness.memory_of_this_process("VmHWM"), worker / 1024]))
"""


def peak_memory(corpus: Path, out: Path, tokenizer_file: Path, workers: int) -> dict:
    """Peak resident MiB of a prepare in a process of its own, and of the largest of its workers."""
    code = RSS.format(benchmarks=str(Path(__file__).resolve().parent))
    command = [sys.executable, "-c", code, str(corpus), str(out), str(tokenizer_file), str(workers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, own, worker = json.loads(done.stdout)
    return {"seconds": seconds, "process_mib": own, "largest_worker_mib": worker}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=100.0, help="megabytes of text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind", choices=["jsonl", "txt"], default="jsonl")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--rss", action="store_true", help="also the peak memory, on --mb and on four times as much")
    parser.add_argument("--dir", help="where to put corpus and shards for the time being")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        tokenizer_file = Tokenizer.train(texts=documents(10), vocab_size=args.vocab_size).save(folder / "tok.json")
        corpus = folder / "corpus"
        write_corpus(corpus, args.mb, args.kind)
        rates: dict[str, list[float]] = {"tiktoken processes": [], "tiktoken threads": [], "prepare": []}
        for _ in range(args.repeats):
            rates["tiktoken processes"].append(args.mb / tiktoken_processes(tokenizer_file, args.mb, args.workers))
            seconds, meta = prepared(corpus, folder / "out", tokenizer_file, args.workers)
            rates["prepare"].append(args.mb / seconds)
            if meta["duplicates"]:
                raise SystemExit(f"{meta['duplicates']} documents were duplicates; the comparison would not be fair")
            shutil.rmtree(folder / "out")
            rates["tiktoken threads"].append(args.mb / tiktoken_threads(tokenizer_file, args.mb, args.workers))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        yardstick = max(medians["tiktoken processes"], medians["tiktoken threads"])
        facts = machine()
        print(f"{args.mb:g} MB as {args.kind}, {args.workers} workers on {facts['cpu']} ({facts['cores']} cores)")
        for name, values in rates.items():
            print(f"  {name:20} {medians[name]:7.2f} MB/s   ({', '.join(f'{v:.2f}' for v in values)})")
        print(f"  prepare / tiktoken   {medians['prepare'] / yardstick:7.3f}")
        result = {
            "machine": facts,
            "workers": args.workers,
            "tiktoken": tiktoken.__version__,
            "mb": args.mb,
            "kind": args.kind,
            "vocab_size": args.vocab_size,
            "mb_per_second": rates,
            "ratio": medians["prepare"] / yardstick,
        }
        if args.rss:
            result["memory"] = {}
            for size in (args.mb, 4 * args.mb):
                shutil.rmtree(corpus)
                write_corpus(corpus, size, args.kind)
                memory = peak_memory(corpus, folder / "out", tokenizer_file, args.workers)
                shutil.rmtree(folder / "out")
                result["memory"][f"{size:g} MB"] = memory
                print(
                    f"  peak memory at {size:g} MB: {memory['process_mib']:.0f} MiB, largest worker "
                    f"{memory['largest_worker_mib']:.0f} MiB, in {memory['seconds']:.1f} s"
                )
        if args.out:
            write_result(args.out, result)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
