"""python -m trimoe, torchrun -m trimoe."""

from trimoe.cli import main

main()
