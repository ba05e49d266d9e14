"""Kills programs at random moments, goes on with them, and compares: nothing may change. Not for Windows.

    python results/kills.py --seed 0      3 minutes; prints a line a kill, and fails if a result differs

Two searches and an evaluation are killed (SIGKILL) 25 times each. All that they write must then be as without
kills, bit for bit, but for the seconds. The searches save after every step here, and not once a minute.
"""
import argparse
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._dynamo  # optimisers import it, which takes seconds: now it is done before the processes fork

import evaluate
import search

COMMON = ['--out', 'out', '--candidates', '5', '--ops', 'identity,tanh,bias,scale,relu,silu,elu,add,mul,mix']
PROGRAMS: dict[str, tuple[Callable, list[str]]] = {
    'search, gradient': (search.main, ['--steps', '20', '--batch-size', '4', *COMMON]),
    'search, project': (search.main, ['--model', 'toy', '--steps', '20', *COMMON]),
    'evaluation': (evaluate.main, ['tanh', '--model', 'toy', '--steps', '40', '--seeds', '8',
                                   '--baselines', 'elu', '--out', 'out/ledger.jsonl']),
}


def child(main: Callable, options: list[str]) -> None:
    """Run a program without its output; a search saves after every step."""
    def after(run: search.Run, *arguments: Any) -> None:
        run.saved = -math.inf  # long ago
        original(run, *arguments)

    original, search.Run.after = search.Run.after, after
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main([*options, '--device', 'cpu'])


def killed(main: Callable, options: list[str], saves: float, seconds: float) -> bool:
    """Run or resume a program, and kill it `seconds` after it saved so often. False: it ended before."""
    files = [Path('out/checkpoint.pt'), Path('out/ledger.jsonl')]
    options = ['--resume', 'out'] if files[0].exists() else options
    times = [file.exists() and file.stat().st_mtime_ns for file in files]
    process = multiprocessing.get_context('fork').Process(target=child, args=(main, options))
    process.start()
    while process.is_alive() and saves > 0:
        time.sleep(0.003)
        before, times = times, [file.exists() and file.stat().st_mtime_ns for file in files]
        saves -= times != before
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f'exit code {process.exitcode}; see {os.getcwd()}'
    return process.exitcode != 0


def written() -> str:
    """All that a program wrote, without seconds."""
    files = [file for pattern in ('*.jsonl', '*.json', '*.py') for file in Path('out').glob(pattern)]
    return re.sub('"(seconds|ms_step)": [^,}]*', '', ''.join(file.read_text() for file in files))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--kills', type=int, default=25, help='of each program')
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())
    moments, failed = random.Random(given.seed), 0
    for name, program in PROGRAMS.items():
        assert not killed(*program, math.inf, 0.0)
        whole, kills, ends, wrong = written(), 0, 0, 0
        while kills < given.kills:
            shutil.rmtree('out')
            while killed(*program, moments.randrange(6) if kills < given.kills else math.inf,
                         moments.random() / 5):
                kills += 1
                rows = [len(re.findall('^{"', text, re.MULTILINE)) for text in (written(), whole)]
                print(f'{name}: kill {kills}, after row {rows[0]} of {rows[1]}', flush=True)
            ends, wrong = ends + 1, wrong + (written() != whole)
        print(f'{name}: {kills} kills, {ends} ends, {wrong} of them other than without kills', flush=True)
        shutil.rmtree('out')
        failed += wrong
    os.rmdir(os.getcwd())
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
