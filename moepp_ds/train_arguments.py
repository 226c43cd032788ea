"""The command line of the training program: read by every rank, and before any is started by what starts them."""

from __future__ import annotations

import argparse
from pathlib import Path


def train_parser() -> argparse.ArgumentParser:
    """The parser; `--local_rank` is what DeepSpeed's launcher adds."""
    parser = argparse.ArgumentParser(
        prog="moepp_ds.train", description="Train a MoE++ model from a recipe.", allow_abbrev=False
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, a.b=c")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<name of the recipe>")
    parser.add_argument("--resume", default="none", metavar="auto|none|PATH", help="default: none")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser
