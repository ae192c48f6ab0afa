"""accelerate launch -m hf_sparse_attention.train: the command `train`, in every process."""

import sys

from ..cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
