"""Kill a search 25 times at random moments and see that it ends as if nothing had happened: python tests/kill_many.py

By hand, some minutes. Each kill is a kill -9, of a process that has lived between none and `--longest` seconds; then the
search is resumed. When it ends before all kills are spent, the result is compared and a new one begins.
"""
import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_resume import OPTIONS, ROOT, result  # noqa: E402


def search(arguments: list[str], seconds: float = 600.0) -> int:
    """Run search.py for so long, at most; its exit code, -9 when it was killed."""
    process = subprocess.Popen([sys.executable, str(ROOT / 'search.py'), *arguments, '--no-plot'], stdout=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=25)
    parser.add_argument('--longest', type=float, default=12.0, help='seconds; about as long as the whole search takes')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    given = parser.parse_args()
    moments, kills, searches = random.Random(given.seed), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        whole, folder = Path(temporary) / 'whole', Path(temporary) / 'run'
        assert search([*OPTIONS, '--out', str(whole)]) == 0
        while kills < given.kills:
            shutil.rmtree(folder, ignore_errors=True)
            code, arguments = 1, [*OPTIONS, '--out', str(folder)]
            while code:
                limit = moments.uniform(0.0, given.longest) if kills < given.kills else 600.0
                code = search(arguments, limit)
                assert code in (0, -signal.SIGKILL), f'exit code {code}'
                kills += code != 0
                if (folder / 'config.json').exists():
                    arguments = ['--resume', str(folder)]
                here = sorted(path.name for path in folder.glob('*'))
                lines = len((folder / 'log.jsonl').read_bytes().splitlines()) if 'log.jsonl' in here else 0
                print(f"{kills:3d} kills, {'killed' if code else 'finished'} after at most {limit:4.1f} s; "
                      f"{lines} lines of log, {' '.join(here)}", flush=True)
            searches += 1
            assert result(folder) == result(whole), f'search {searches} ended in another result'
    print(f'{kills} kills in {searches} searches: each ended in the same result and the same log, bit for bit')


if __name__ == '__main__':
    main()
