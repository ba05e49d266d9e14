"""How many functions are there, and which known ones are among them?

    python results/spaces.py                     half an hour on one core; three tables, in Markdown
    python results/spaces.py --ops base          one set of operations: a minute

Values equal to 1e-6 of the largest at 97 points of [-5, 5] count as one function.
"""
import argparse
import math
import resource
import sys
import time
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from activation import Activation
from space import Space, keys

SETS = ('base', 'no-composites', 'base,periodic', 'base,swish', 'base,periodic,swish')
CURVES = {
    'SiLU': F.silu, 'GELU': F.gelu, 'ELU': F.elu, 'Mish': F.mish, 'hard-swish': F.hardswish, 'ReLU6': F.relu6,
    'softsign': F.softsign, 'SELU': F.selu, 'ReLU^2': lambda x: F.relu(x) ** 2,
    'squareplus': lambda x: (x + torch.sqrt(x * x + 4)) / 2,
    'GELU(x) + 0.1 sin(x)': lambda x: F.gelu(x) + 0.1 * torch.sin(x),
    'GELU(x) (1 + 0.5 sinc(x))': lambda x: F.gelu(x) * (1 + 0.5 * torch.sinc(x / math.pi)),
    'snake, x + sin(x)^2': lambda x: x + torch.sin(x) ** 2,
    'logish, x log(1 + sigmoid(x))': lambda x: x * torch.log1p(torch.sigmoid(x)),
}

def count(space: Space, free: bool) -> int:
    """Distinct functions; free: up to output scale and shift."""
    found = (keys(part.values, free, free) for part in space.made(space.binary, space.rows))
    return len(np.unique(np.fromiter(chain.from_iterable(found), float)))

if __name__ == '__main__':
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=look)
    parser.add_argument('--ops', help='this set alone')
    sets = [given] if (given := parser.parse_args().ops) else SETS
    torch.set_num_threads(1)
    print('| operations | spellings | functions | up to scale and shift | CPU seconds of a scan | MB |')
    print('|---|---|---|---|---|---|')
    tables = {}
    for ops in sets:
        start = time.process_time()
        space = Space(ops)
        tables[ops] = {'SiLU': space.nearest(F.silu)[0]}
        seconds, mb = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        numbers = math.prod(map(len, space.kinds)), count(space, False), count(space, True)
        print(f"| {ops} | {' | '.join(f'{n:,}' for n in numbers)} | {seconds:.1f} | {mb:.0f} |", flush=True)
        if ops in ('base', 'base,periodic'):
            tables[ops] |= {name: space.nearest(f)[0] for name, f in CURVES.items()}
    for ops in tables.keys() & {'base', 'base,periodic'}:
        print(f'\n| curve | {ops}: length, distance, formula |\n|---|---|')
        for name, front in tables[ops].items():
            close = [match for match in front if match.score < 0.001][:1] or front[-2:]
            words = [f'{m.length}: {100 * m.score:.2f} %, {Activation(m.tree).formula}' for m in close]
            print(f"| {name} | {'; '.join(words)} |")
