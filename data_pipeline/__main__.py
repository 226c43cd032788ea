"""`moepp-data`, and `python -m data_pipeline`: see `data_pipeline.commands`."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    # Worker processes import this module too, and would wait half a second for what they have no use for.
    from data_pipeline.commands import run

    run()


if __name__ == "__main__":
    main()
