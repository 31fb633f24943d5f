"""Batches of which each number says where it belongs, for tests of who holds what."""

import numpy as np

from jaxtax.data.batch import Batch

ROWS, TOKENS = 8, 12


class Numbers:
    """Stands in for data.loader.Batches; notes which rows were made."""

    def __init__(self):
        self.made = []
        self.shape = (ROWS, TOKENS)

    def rows(self, step, chosen):
        self.made.append(list(chosen))
        whole = np.arange(ROWS * TOKENS, dtype=np.int32).reshape(ROWS, TOKENS) + 1000 * step
        part = whole[list(chosen)]
        return Batch(part, part + 1, part.astype(np.float32), part + 2, part + 3)

    def __getitem__(self, step):
        return self.rows(step, range(ROWS))
