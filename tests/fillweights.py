"""The weights of a golden case: each entry is drawn from its own name, so that
a case needs a list of names and shapes instead of a weight file."""
import math
import zlib

import numpy as np


def fill(name, shape, dtype="float32"):
    "The array of one entry: noise seeded by the name's CRC-32, scaled by what the entry is."
    if any(k in dtype for k in ("int", "bool")):
        return np.zeros(shape, dtype)
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        x = 1 + 0.1 * np.abs(x)
    elif leaf == "running_mean":
        x = 0.1 * x
    elif len(shape) >= 2:
        x = x / math.sqrt(math.prod(shape[1:]))
    elif leaf in ("weight", "scale"):
        x = 1 + 0.1 * x
    else:
        x = 0.05 * x
    return np.asarray(x, dtype)


def filled(manifest):
    "All arrays of {name: [shape, dtype]}."
    return {k: fill(k, *v) for k, v in manifest.items()}
