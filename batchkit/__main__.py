"""`python -m batchkit` is the command `batchkit`."""

from batchkit.cli import main

main(prog_name="batchkit")
