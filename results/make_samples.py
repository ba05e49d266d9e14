"""Makes the files of samples/ anew from the published sets: `python results/make_samples.py FOLDER`."""
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from data import END, SAMPLES, load

def make_samples(data_dir: str) -> None:
    """Write samples/: in each class the images of the smallest checksums, in whatever order the files are."""
    full, small = load('cifar10', data_dir), load('cifar10', data_dir, side=16)
    text = iter(bytes(load('tinystories', data_dir).train.numpy()).split(b'\0'))
    for part, each, size in ('train', 500, 950_000), ('test', 100, 100_000):
        (x, y), (pixels, _) = getattr(full, part), getattr(small, part)
        rank = torch.tensor([zlib.crc32(image) for image in x.numpy()]).argsort()
        chosen = rank[F.one_hot(y[rank]).cumsum(0).gather(1, y[rank, None])[:, 0] <= each]  # first of a class
        records = torch.cat([y[chosen, None].byte(), pixels[chosen].flatten(1)], 1)
        (SAMPLES / f'cifar10_16_{part}.bin').write_bytes(records.numpy().tobytes())
        with open(SAMPLES / f'tinystories_sample_{part}.txt', 'wb') as file:
            while file.tell() < size:
                file.write(next(text) + b'\n' + END + b'\n')

if __name__ == '__main__':
    make_samples(sys.argv[1])
